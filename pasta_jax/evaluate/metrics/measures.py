"""Figures of sets of responses, from their rows (`decode.record`). No model here."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np


def geometric_mean(values: Iterable[float]) -> float:
  """NaN for no values."""
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


def speedup_over_baseline(row: dict, baseline: dict) -> float:
  """The paper's theoretical speedup: the baseline's text tokens over the longest path of a response."""
  return max(baseline["text_tokens"], 1) / max(row["longest_path"], 1)


def _parallelism(row: dict) -> float:
  """Theoretical parallelism, of one token at least: an empty response has no geometric mean."""
  return max(row["theoretical_parallelism"], 1 / max(row["longest_path"], 1))


def tag_overhead(rows: Sequence[dict]) -> float:
  """Share of the written tokens that are not text: tags, topics and numbers, or outlines."""
  return 1 - sum(r["text_tokens"] for r in rows) / max(sum(r["total_tokens"] for r in rows), 1)


def summarise(rows: Sequence[dict], baseline: Sequence[dict] | None = None) -> dict[str, float]:
  """Figures over the prompts of one system; with the baseline's rows, also those that compare the two.

  Shares and errors are fractions, speedups geometric means. A figure of no rows is left out, such as the
  error of declared lengths where nothing was promised.

  `theoretical_parallelism` is a response's own text tokens over its longest path; `speedup_over_baseline`
  takes the text tokens of the baseline's response instead (the paper's theoretical speedup).
  `tokens_per_round` counts all written tokens. `unseparated_share` is a share of promises, over rows that
  count it. From rows with `seconds`: `realised_speedup` is the baseline's
  seconds over the system's, prompt by prompt (the paper's protocol); `same_text_speedup` takes the baseline's
  seconds per token times the system's `text_tokens`, which compares two responses of different length fairly;
  `efficiency` is that over the theoretical parallelism.
  """
  n = max(len(rows), 1)
  with_promises = [r for r in rows if r["promises"]]
  counted = [r for r in with_promises if r.get("unseparated") is not None]
  lengths = [pair for r in rows for pair in r["lengths"]]
  share = lambda f: sum(map(bool, map(f, rows))) / n
  out = {
    "prompts": len(rows),
    "promise_share": len(with_promises) / n,
    "promises_a_response": sum(r["promises"] for r in with_promises) / max(len(with_promises), 1),
    "theoretical_parallelism": geometric_mean(map(_parallelism, rows)),
    "theoretical_parallelism_with_promises": geometric_mean(map(_parallelism, with_promises)),
    "tokens_per_round": geometric_mean(r["tokens_per_round"] for r in rows),
    "malformed_share": share(lambda r: r["ill_formed"]),
    "refused_share": share(lambda r: r["refused"]),
    "unseparated_share": (
      sum(r["unseparated"] for r in counted) / sum(r["promises"] for r in counted) if counted else math.nan
    ),
    "topic_twice_share": share(lambda r: r["topic_twice"]),
    "loop_share": share(lambda r: r["loops"]),
    "cut_share": share(lambda r: r["finish_reason"] != "stop"),
    "text_tokens": sum(r["text_tokens"] for r in rows) / n,
    "median_text_tokens": float(np.median([r["text_tokens"] for r in rows])) if rows else math.nan,
    "tag_overhead": tag_overhead(rows),
    "length_error": float(np.median([abs(d - t) / t for d, t in lengths])) if lengths else math.nan,
    "outgrown_share": sum(t > d for d, t in lengths) / max(len(lengths), 1),
  }
  timed = [r for r in rows if r.get("seconds")]
  if timed:
    out["tokens_a_second"] = sum(r["text_tokens"] for r in timed) / sum(r["seconds"] for r in timed)
  by_id = {r["id"]: r for r in baseline or ()}
  pairs = [(r, by_id[r["id"]]) for r in rows if r["id"] in by_id]
  out["speedup_over_baseline"] = geometric_mean(speedup_over_baseline(r, b) for r, b in pairs)
  timed_pairs = [(r, b) for r, b in pairs if r.get("seconds") and b.get("seconds")]
  if timed_pairs:
    out |= _realised(timed_pairs)
  if promising := [(r, b) for r, b in timed_pairs if r["promises"]]:
    out |= {f"with_promises_{name}": value for name, value in _realised(promising).items()}
  return {name: value for name, value in out.items() if not math.isnan(value)}


def _realised(pairs: Sequence[tuple[dict, dict]]) -> dict[str, float]:
  """Wall-clock figures of (a system's row, the baseline's row for the same prompt)."""
  speedups = [b["seconds"] / r["seconds"] for r, b in pairs]
  same_text = [
    b["seconds"] / max(b["text_tokens"], 1) * max(r["text_tokens"], 1) / r["seconds"] for r, b in pairs
  ]
  low, high = bootstrap_interval(speedups)
  return {
    "realised_speedup": geometric_mean(speedups),
    "realised_speedup_low": low,
    "realised_speedup_high": high,
    "same_text_speedup": geometric_mean(same_text),
    "efficiency": geometric_mean(s / _parallelism(r) for s, (r, _) in zip(same_text, pairs)),
    "slower_share": sum(s < 1 for s in speedups) / len(speedups),
  }


def cut_by_text(rows: Mapping[str, Sequence[dict]]) -> tuple[int, dict[str, float]]:
  """(a limit in tokens of text, the share of each system's answers that it would cut off).

  Decoding limits all tokens, and tags count: systems with tags are cut off at less text. Here the limit is the text
  of the shortest answer that was cut off, the largest limit for which every answer tells whether it passes it: one
  that was cut off early, in tags without end, lowers it for all. (0, {}) if no answer was cut off.
  """
  was_cut = lambda r: r["finish_reason"] != "stop"
  cut = [r["text_tokens"] for of in rows.values() for r in of if was_cut(r)]
  if not cut:
    return 0, {}
  limit = min(cut)
  passes = lambda r: r["text_tokens"] > limit or was_cut(r)
  return limit, {n: sum(map(passes, of)) / max(len(of), 1) for n, of in rows.items()}


LENGTHS = (100, 200, 350)  # bounds between classes of answers, in text tokens


def length_class(row: dict) -> str:
  """The class of an answer by its length."""
  low = max((b for b in LENGTHS if row["text_tokens"] >= b), default=0)
  high = min((b for b in LENGTHS if b > row["text_tokens"]), default=0)
  return f"{low} to {high - 1} tokens" if high else f"{low} tokens or more"


PARTS = (1, 3, 5, 7)  # bounds between classes of answers, in promises or points


def parts_class(row: dict) -> str:
  """The class of an answer by the number of its parts: "0", "1–2", …, "7 or more"."""
  low = max((b for b in PARTS if row["promises"] >= b), default=0)
  high = min((b for b in PARTS if b > row["promises"]), default=0)
  if not high:
    return f"{low} or more"
  return f"{low}–{high - 1}" if high - 1 > low else f"{low}"


def natural(name: str) -> tuple[int, str]:
  """Sort key: the first number in a name, if any, then the name."""
  numbers = re.findall(r"\d+", name)
  return (int(numbers[0]) if numbers else 0, name)


def grouped(
  rows: Sequence[dict], baseline: Sequence[dict], group: Callable[[dict], str]
) -> dict[str, dict[str, float]]:
  """`summarise` for each group of a system's records, groups in natural order."""
  groups: dict[str, list[dict]] = {}
  for row in rows:
    groups.setdefault(group(row), []).append(row)
  by_id = {r["id"]: r for r in baseline}
  same = lambda members: [by_id[r["id"]] for r in members if r["id"] in by_id]
  return {name: summarise(groups[name], same(groups[name])) for name in sorted(groups, key=natural)}
