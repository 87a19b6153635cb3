"""What judges say of a run: rates of each system, differences between systems, named defects, and each judge's noise.

The judge "local" computes how likely answers are: it checks their form. Every other judge is a reader, of a language
model or of people's preferences, and only readers have win rates.
"""

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from pasta_jax.evaluate.errors import EvalError
from pasta_jax.evaluate.metrics import wins
from pasta_jax.evaluate.metrics.length_control import length_controlled
from pasta_jax.evaluate.metrics.measures import natural, parts_class
from pasta_jax.evaluate.report.run_record import Run

FORM_JUDGE = "local"
FORM_CHECK = "check of form (likelihood)"


def reads(judge: str) -> bool:
  """Whether a judge is a reader."""
  return judge != FORM_JUDGE


def rate_name(judge: str) -> str:
  """What the share of answers that a judge prefers is called, in tables, plots and thresholds."""
  return f"win rate ({judge})" if reads(judge) else FORM_CHECK


def parts_name(judge: str) -> str:
  """What the table and figure of `parts` are called."""
  return f"{rate_name(judge)[:1].upper()}{rate_name(judge)[1:]} by number of promises or points"


def quality(run: Run, judge: str, system: str, difficulty: dict[str, float] | None) -> dict[str, float]:
  """A system against the baseline: rates in per cent, with standard errors and 95 % intervals, and counts.

  `difficulty` is each prompt's, by id, for the length-controlled rate; None: without. Raises EvalError if it
  lacks a prompt. Figures that a few answers do not have are left out.
  """
  rows = run.judgements[judge][system]
  answers = [{r["id"]: r for r in run.responses.get(n, [])} for n in (system, run.baseline)]
  ids = [i for i in rows if all(i in of for of in answers)]
  preference = np.array([rows[i]["preference"] for i in ids])
  won, tied, lost = wins.outcomes(preference)
  out = {"judged": len(ids), "win_rate": 100 * float(preference.mean()) if len(ids) else math.nan}
  out |= {"wins": won, "ties": tied, "losses": lost}
  out |= _interval("win_rate", wins.mean(100 * _by_prompt(run, judge, system)))
  finished = [i for i in ids if all(of[i]["finish_reason"] == "stop" for of in answers)]
  both = wins.mean(100 * _by_prompt(run, judge, system, only=finished))
  out |= {"judged_both_finished": both.n}
  if both.n:
    out |= {"win_rate_both_finished": both.value} | _interval("win_rate_both_finished", both)
  if len(ids) >= 3:
    if difficulty is not None and (lacking := [i for i in ids if i not in difficulty]):
      raise EvalError(
        f"eval.difficulty has no entry for prompt {lacking[0]!r} and {len(lacking) - 1} other prompts"
      )
    gamma = None if difficulty is None else np.array([difficulty[i] for i in ids])
    characters = [np.array([float(len(of[i]["text"])) for i in ids]) for of in answers]
    fit = length_controlled(preference, characters[1], characters[0], gamma, resamples=200)
    out |= {
      "win_rate_error": fit.win_rate_error,
      "length_controlled": fit.length_controlled,
      "length_controlled_error": fit.length_controlled_error,
    }
  return out


def _interval(key: str, found: wins.Mean) -> dict[str, float]:
  return {} if math.isnan(found.low) else {f"{key}_low": found.low, f"{key}_high": found.high}


def _prompts(run: Run) -> list[str]:
  return [r["id"] for r in run.responses.get(run.baseline, [])]


def _by_prompt(run: Run, judge: str, system: str, only: Sequence[str] | None = None) -> np.ndarray:
  """Preferences for a system over the baseline's prompts, [N], NaN where there is none; `only`: of these ids."""
  rows = run.judgements[judge].get(system, {})
  chosen = rows.keys() if only is None else rows.keys() & set(only)
  return np.array([rows[i]["preference"] if i in chosen else math.nan for i in _prompts(run)])


def differences(run: Run, judge: str) -> list[dict]:
  """The difference of each two systems' win rates in points, paired by prompt, with its 95 % interval."""
  out = []
  of_systems = {n: _by_prompt(run, judge, n) for n in run.systems if n in run.judgements[judge]}
  for one, other in combinations([n for n in of_systems if n != run.baseline], 2):
    found = wins.difference(100 * of_systems[one], 100 * of_systems[other])
    if found.n:
      out.append({
        "system": one, "less": other, "points": found.value, **_interval("points", found), "prompts": found.n,
      })  # fmt: skip
  return out


def parts(run: Run, judge: str) -> dict[str, dict[str, dict]]:
  """By system and class of answers by their number of parts (`parts_class`): `judged`, `win_rate` in per cent with its
  95 % interval, `wins`, `ties` and `losses`. Systems of which no answer has parts are left out."""
  out = {}
  for system in run.systems:
    rows = run.judgements[judge].get(system, {})
    by_class: dict[str, list[str]] = {}
    for row in run.responses.get(system, []):
      if row["id"] in rows:
        by_class.setdefault(parts_class(row), []).append(row["id"])
    found = {}
    for name in sorted(by_class, key=natural):
      preferences = _by_prompt(run, judge, system, only=by_class[name])
      rate = wins.mean(100 * preferences)
      if rate.n:
        counts = wins.outcomes(preferences[~np.isnan(preferences)])._asdict()
        found[name] = {"judged": rate.n, "win_rate": rate.value, **_interval("win_rate", rate), **counts}
    if system != run.baseline and found.keys() - {parts_class({"promises": 0})}:
      out[system] = found
  return out


def of_judge(run: Run, judge: str) -> dict:
  """What is known of one judge: `differences` between systems, `position` bias, agreement of `repeats` and `defects`
  by system, and of one that reads `parts`; what it did not measure is left out."""
  by_system = run.judgements.get(judge, {})
  rows = [row for of_system in by_system.values() for row in of_system.values()]
  out: dict = {"reads": reads(judge)}
  if found := differences(run, judge) if by_system else []:
    out["differences"] = found
  if by_parts := parts(run, judge) if by_system and reads(judge) else {}:
    out["parts"] = by_parts
  place, repeats = wins.position(rows), wins.repeats(rows)
  if place.readings_first.n:
    out["position"] = {
      "changed": place.changed._asdict() if place.changed.n else None,
      "first": place.first._asdict() if place.first.n else None,
      "first_preference": place.first_preference,
      "lean": place.lean,
      "decides": place.decides,
    }
  if repeats.n:
    out["repeats"] = repeats._asdict()
  if named := run.defects.get(judge):
    counted = {n: wins.defects([*named[n].values()]) for n in run.systems if n in named}
    out["defects"] = {n: {d: s._asdict() for d, s in of.items()} for n, of in counted.items()}
  return out
