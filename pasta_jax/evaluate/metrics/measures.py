"""Figures of sets of responses, from their records (`decode.record`). No model here."""

import math
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np


def geometric_mean(values: Iterable[float]) -> float:
  """NaN where there is none."""
  logs = [math.log(max(v, 1e-9)) for v in values]
  return math.exp(sum(logs) / len(logs)) if logs else math.nan


def bootstrap_interval(values: Sequence[float], samples: int = 2000, seed: int = 0) -> tuple[float, float]:
  """95 % interval of the geometric mean over prompts."""
  if not values:
    return math.nan, math.nan
  logs = np.log(np.maximum(np.asarray(values), 1e-9))
  means = np.random.default_rng(seed).choice(logs, (samples, len(logs))).mean(axis=1)
  low, high = np.exp(np.percentile(means, [2.5, 97.5]))
  return float(low), float(high)


def theoretical_against(row: dict, baseline: dict) -> float:
  """Tokens of the baseline's text over the longest path of a system's answer: the paper's theoretical
  speedup."""
  return max(baseline["text_tokens"], 1) / max(row["longest_path"], 1)


def summarise(rows: Sequence[dict], baseline: Sequence[dict] | None = None) -> dict[str, float]:
  """Figures over prompts of one system's records; with the baseline's records, what compares the two as well.

  A figure of nothing (lengths where nothing was promised) is left out. Shares and errors are fractions.

  `theoretical_speedup` is tokens of the text over the longest sequential path; `theoretical_against_baseline`
  takes the tokens of the baseline's text instead (the paper's score). Of records with `seconds`:
  `wall_clock_speedup` is seconds of the baseline over seconds of the system, prompt by prompt (the paper's
  protocol); `same_text_speedup` replaces the baseline's seconds by its seconds a token times the system's
  `text_tokens`, so that it compares like with like when the two answers differ in length. `efficiency` is the
  share of the theoretical speedup that the clock sees.
  """
  n = max(len(rows), 1)
  with_promises = [r for r in rows if r["promises"]]
  lengths = [pair for r in rows for pair in r["lengths"]]
  theory = lambda r: max(
    r["theoretical_speedup"], 1 / max(r["longest_path"], 1)
  )  # at least one token, for the mean
  share = lambda f: sum(map(bool, map(f, rows))) / n
  out = {
    "prompts": len(rows),
    "promise_share": len(with_promises) / n,
    "promises_a_response": sum(r["promises"] for r in with_promises) / max(len(with_promises), 1),
    "theoretical_speedup": geometric_mean(map(theory, rows)),
    "theoretical_speedup_with_promises": geometric_mean(map(theory, with_promises)),
    "parallelism": geometric_mean(r["parallelism"] for r in rows),
    "malformed_share": share(lambda r: r["ill_formed"]),
    "refused_share": share(lambda r: r["refused"]),
    "topic_twice_share": share(lambda r: r["topic_twice"]),
    "loop_share": share(lambda r: r["loops"]),
    "cut_share": share(lambda r: r["finish_reason"] != "stop"),
    "text_tokens": sum(r["text_tokens"] for r in rows) / n,
    "tag_overhead": 1 - sum(r["text_tokens"] for r in rows) / max(sum(r["total_tokens"] for r in rows), 1),
    "length_error": float(np.median([abs(d - t) / t for d, t in lengths])) if lengths else math.nan,
    "outgrown_share": sum(t > d for d, t in lengths) / max(len(lengths), 1),
  }
  timed = [r for r in rows if r.get("seconds")]
  if timed:
    out["tokens_a_second"] = sum(r["text_tokens"] for r in timed) / sum(r["seconds"] for r in timed)
  by_id = {r["id"]: r for r in baseline or ()}
  both = [(r, by_id[r["id"]]) for r in rows if r["id"] in by_id]
  out["theoretical_against_baseline"] = geometric_mean(theoretical_against(r, b) for r, b in both)
  pairs = [(r, b) for r, b in both if r.get("seconds") and b.get("seconds")]
  if pairs:
    out |= _speedups(pairs)
  if promising := [(r, b) for r, b in pairs if r["promises"]]:
    out |= {f"with_promises_{name}": value for name, value in _speedups(promising).items()}
  return {name: value for name, value in out.items() if not math.isnan(value)}


def _speedups(pairs: Sequence[tuple[dict, dict]]) -> dict[str, float]:
  """Figures by the clock of (a system's record, the baseline's of the same prompt)."""
  wall = [b["seconds"] / r["seconds"] for r, b in pairs]
  same = [b["seconds"] / max(b["text_tokens"], 1) * max(r["text_tokens"], 1) / r["seconds"] for r, b in pairs]
  low, high = bootstrap_interval(wall)
  return {
    "wall_clock_speedup": geometric_mean(wall),
    "wall_clock_low": low,
    "wall_clock_high": high,
    "same_text_speedup": geometric_mean(same),
    "efficiency": geometric_mean(
      s / max(r["theoretical_speedup"], 1 / max(r["longest_path"], 1)) for s, (r, _) in zip(same, pairs)
    ),
    "slower_share": sum(w < 1 for w in wall) / len(wall),
  }


LENGTHS = (100, 200, 350)  # bounds between classes of answers, in tokens of the text


def length_class(row: dict) -> str:
  """The class of an answer by its length."""
  low = max((b for b in LENGTHS if row["text_tokens"] >= b), default=0)
  high = min((b for b in LENGTHS if b > row["text_tokens"]), default=0)
  return f"{low} to {high - 1} tokens" if high else f"{low} tokens or more"


def natural(name: str) -> tuple[int, str]:
  """Sorts names by the first number in them, if any, then by the alphabet."""
  numbers = re.findall(r"\d+", name)
  return (int(numbers[0]) if numbers else 0, name)


def grouped(
  rows: Sequence[dict], baseline: Sequence[dict], group: Callable[[dict], str]
) -> dict[str, dict[str, float]]:
  """`summarise` for each group of a system's records, groups in natural order."""
  groups: dict[str, list[dict]] = {}
  for row in rows:
    groups.setdefault(group(row), []).append(row)
  return {name: summarise(groups[name], baseline) for name in sorted(groups, key=natural)}
