"""All figures of a run (`summary.json`), and whether they reach what a pilot asks for."""

import math
from typing import NamedTuple

import numpy as np

from pasta_jax.decode.record import SCHEMA
from pasta_jax.evaluate.errors import EvalError
from pasta_jax.evaluate.metrics.length_control import length_controlled, read_difficulty
from pasta_jax.evaluate.metrics.measures import grouped, length_class, summarise
from pasta_jax.evaluate.report.run_record import Run


def summarise_run(run: Run) -> dict:
  """The figures of every system, ready for JSON."""
  path = run.config["eval"].get("difficulty")
  difficulty = read_difficulty(path) if path else None
  systems = {}
  for name in run.systems:
    entry: dict = {}
    for kind, rows in (("responses", run.responses), ("timed", run.timed)):
      if name not in rows:
        continue
      baseline = rows.get(run.baseline, []) if name != run.baseline else []
      entry[kind] = summarise(rows[name], baseline)
      entry[f"{kind}_by_category"] = grouped(rows[name], baseline, lambda r: r.get("category") or "all")
      entry[f"{kind}_by_length"] = grouped(rows[name], baseline, length_class)
    entry["quality"] = {
      judge: quality(run, judge, name, difficulty)
      for judge, judged in run.judgements.items()
      if name in judged
    }
    systems[name] = entry
  return {
    "schema": SCHEMA,
    "baseline": run.baseline,
    "model": run.config["model"]["source"],
    "dtype": run.config["decode"]["dtype"],
    "prompts": len(run.responses.get(run.baseline, next(iter(run.responses.values())))),
    "timed": max(map(len, run.timed.values()), default=0),
    "version": ", ".join(run.versions),
    "machine": " and ".join(run.machines),
    "systems": systems,
  }


def quality(run: Run, judge: str, system: str, difficulty: dict[str, float] | None) -> dict[str, float]:
  """Win rate against the baseline in per cent, plain and length-controlled, with standard errors.

  `difficulty` is each prompt's, by id, for the length-controlled rate; None: without. Raises EvalError if it
  lacks a prompt.
  """
  rows = run.judgements[judge][system]
  texts = [{r["id"]: r["text"] for r in run.responses[n]} for n in (system, run.baseline)]
  ids = [i for i in rows if all(i in t for t in texts)]
  preference = np.array([rows[i]["preference"] for i in ids])
  lengths = [np.array([float(len(t[i])) for i in ids]) for t in texts]
  out = {"judged": len(ids), "win_rate": 100 * float(preference.mean()) if len(ids) else math.nan}
  if len(ids) >= 3:
    if difficulty is not None and (lacking := [i for i in ids if i not in difficulty]):
      raise EvalError(
        f"eval.difficulty has no entry for prompt {lacking[0]!r} and {len(lacking) - 1} other prompts"
      )
    gamma = None if difficulty is None else np.array([difficulty[i] for i in ids])
    fit = length_controlled(preference, lengths[1], lengths[0], gamma, resamples=200)
    out |= {
      "win_rate_error": fit.win_rate_error,
      "length_controlled": fit.length_controlled,
      "length_controlled_error": fit.length_controlled_error,
    }
  return out


class Threshold(NamedTuple):
  """One demand of a pilot on its first system."""

  what: str
  value: float | None  # None: not measured, which does not meet the threshold
  wanted: float

  @property
  def is_met(self) -> bool:
    return self.value is not None and self.value >= self.wanted


def thresholds(run: Run, summary: dict) -> list[Threshold]:
  """What `eval.min_quality` and `eval.min_speedup` ask of the first system; a demand of 0 is left out."""
  e = run.config["eval"]
  names = [s.strip() for s in e["systems"].split(",") if s.strip() and s.strip() != run.baseline]
  if not names:
    return []
  entry: dict = summary["systems"].get(names[0], {})
  judge = next(iter(entry.get("quality", {})), "not judged")
  win_rate = entry.get("quality", {}).get(judge, {}).get("win_rate")
  speedup = entry.get("timed", {}).get("realised_speedup")
  demands = (
    Threshold(f"win rate of {names[0]}, % ({judge})", win_rate, e["min_quality"]),
    Threshold(f"realised speedup of {names[0]}", speedup, e["min_speedup"]),
  )
  return [t for t in demands if t.wanted]
