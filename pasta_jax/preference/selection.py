"""From samples to pairs: judged against the baseline's answers, scored, chosen, counted, laid out for
training."""

import collections
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pasta_jax.data.pairs import PreferencePair
from pasta_jax.decode.trace import from_json
from pasta_jax.evaluate.judges.judge import Answer, Judge, Pair
from pasta_jax.evaluate.judges.judging import judge_pairs
from pasta_jax.evaluate.metrics.measures import geometric_mean
from pasta_jax.lang.layout import Layout, PositionRule, layout
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.preference.score import SPEEDUPS, StepCost, choose, faults
from pasta_jax.utils.jsonl import write_jsonl

Samples = Mapping[str, Sequence[dict]]  # of each prompt, by its id


def judged(judge: Judge, samples: Samples, baseline: Mapping[str, dict], folder: Path) -> dict[str, float]:
  """Quality of each sample, by its id: the judge's preference for it over the baseline's answer. Kept in
  `folder`."""
  asked = [
    Pair(s["id"], _answer(s), _answer(baseline[of]), "samples") for of, rows in samples.items() for s in rows
  ]
  return {i: row["preference"] for i, row in judge_pairs(judge, asked, folder / "samples.jsonl").items()}


def _answer(row: dict) -> Answer:
  return Answer([{"role": "user", "content": row["prompt"]}], row["text"], row["finish_reason"] == "stop")


def scored(
  samples: Samples,
  baseline: Mapping[str, dict],
  quality: Mapping[str, float],
  how: str,
  cost: StepCost | None,
  *,
  prompts: Mapping[str, Sequence[int]],
  length: int,
) -> dict[str, list[dict]]:
  """The samples with `speedup`, `quality` and `faults`.

  Left out are those that no judge could judge, and those that are longer than `length` tokens behind their
  prompt's tokens in `prompts`: no training row holds them.
  """
  speedup = cost.speedup if cost else SPEEDUPS[how]
  return {
    of: [
      {
        **s,
        "speedup": speedup(s, baseline[of]),
        "quality": quality[s["id"]],
        "faults": faults(s, baseline[of]),
      }
      for s in rows
      if s["id"] in quality and len(prompts[of]) + s["total_tokens"] <= length
    ]
    for of, rows in samples.items()
  }


def choose_pairs(
  samples: Samples, weight: float, *, guards: bool
) -> tuple[list[tuple[dict, dict]], dict[str, int]]:
  """((best, worst) of each prompt that gives a pair, how many prompts give none for which reason)."""
  pairs: list[tuple[dict, dict]] = []
  reasons: collections.Counter[str] = collections.Counter()
  for rows in samples.values():
    choice = choose(rows, weight, guards=guards)
    if choice.reason:
      reasons[choice.reason] += 1
    else:
      pairs.append((rows[choice.best], rows[choice.worst]))
  return pairs, dict(reasons)


def lay_out(
  pairs: Sequence[tuple[dict, dict]],
  vocabulary: Vocabulary,
  rule: PositionRule,
  prompts: Mapping[str, Sequence[int]],
) -> list[PreferencePair]:
  """Pairs for training. `prompts` are the tokens of each prompt as the policy is to read them; a sample's own
  prompt may lack the wanted speed."""
  lay = lambda s: laid_out(s, vocabulary, rule, prompts[s["of"]])
  return [PreferencePair(lay(best), lay(worst)) for best, worst in pairs]


def laid_out(
  sample: dict, vocabulary: Vocabulary, rule: PositionRule, prompt: Sequence[int] | None = None
) -> Layout:
  """A sample's answer behind its own prompt, or behind another one."""
  trace = from_json(sample["trace"], vocabulary, rule)
  return layout(trace.thread, rule, vocabulary.table, trace.prompt.tolist() if prompt is None else prompt)


def figures(
  samples: Samples, pairs: Sequence[tuple[dict, dict]], reasons: Mapping[str, int], drawn: int
) -> dict:
  """What a round's report says of its samples and pairs; `drawn` samples were there before some were left
  out."""
  rows = [s for of in samples.values() for s in of]
  found = collections.Counter(f for s in rows for f in s["faults"])
  n = max(len(rows), 1)

  def side(chosen: Sequence[dict]) -> dict[str, float]:
    if not chosen:
      return {}
    return {
      "speedup": geometric_mean(s["speedup"] for s in chosen),
      "theoretical_speedup": geometric_mean(s["theoretical_speedup"] for s in chosen),
      "quality": float(np.mean([s["quality"] for s in chosen])),
      "promises": float(np.mean([s["promises"] for s in chosen])),
      "text_tokens": float(np.mean([s["text_tokens"] for s in chosen])),
      "tag_overhead": 1
      - sum(s["text_tokens"] for s in chosen) / max(sum(s["total_tokens"] for s in chosen), 1),
    }

  return {
    "prompts": len(samples),
    "samples drawn": drawn,
    "not judged, or too long": drawn - len(rows),
    "samples": side(rows),
    "best": side([b for b, _ in pairs]),
    "worst": side([w for _, w in pairs]),
    "pairs": len(pairs),
    "without a pair": dict(reasons),
    "faults of samples, share": {name: count / n for name, count in sorted(found.items())},
    "share with faults": sum(bool(s["faults"]) for s in rows) / n,
  }


def write_pairs(path: Path, pairs: Sequence[tuple[dict, dict]], weight: float) -> None:
  """The pairs with where they come from; texts are left in the samples' file."""
  fields = ("id", "speedup", "quality", "longest_path", "text_tokens", "promises", "faults", "text")
  rows = [
    {
      "id": b["of"],
      "prompt": b["prompt"],
      "weight": "inf" if math.isinf(weight) else weight,
      "best": {f: b[f] for f in fields},
      "worst": {f: w[f] for f in fields},
    }
    for b, w in pairs
  ]
  write_jsonl(path, rows)
