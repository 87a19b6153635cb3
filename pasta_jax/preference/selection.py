"""From judged samples to pairs: scoring, choosing, counting, and laying out for training."""

import collections
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pasta_jax.data.pairs import PreferencePair
from pasta_jax.decode.trace import from_json, lay_out
from pasta_jax.evaluate.metrics.measures import geometric_mean, tag_overhead
from pasta_jax.lang.forms import Forms
from pasta_jax.lang.layout import Layout
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.preference.quality import Samples
from pasta_jax.preference.rollout import is_plain
from pasta_jax.preference.score import SPEEDUPS, StepCost, choose, defects, score
from pasta_jax.utils.jsonl import write_jsonl


def score_samples(
  samples: Samples,
  baseline: Mapping[str, dict],
  quality: Mapping[str, float],
  measure: str,
  cost: StepCost | None,
  *,
  prompts: Mapping[str, Sequence[int]],
  length: int,
) -> dict[str, list[dict]]:
  """The samples with `speedup` (by `cost` if given, else `SPEEDUPS[measure]`), `quality` and `defects`.

  Samples without a judgement are left out, and those that do not fit a training row: more than `length`
  tokens with their prompt's tokens in `prompts`.
  """
  speedup = cost.speedup if cost else SPEEDUPS[measure]
  return {
    of: [
      {
        **s,
        "speedup": speedup(s, baseline[of]),
        "quality": quality[s["id"]],
        "defects": defects(s, baseline[of]),
      }
      for s in rows
      if s["id"] in quality and len(prompts[of]) + s["total_tokens"] <= length
    ]
    for of, rows in samples.items()
  }


def choose_pairs(
  samples: Samples, weight: float, *, guards: bool
) -> tuple[list[tuple[dict, dict]], dict[str, int]]:
  """((best, worst) of each prompt with a pair, number of prompts without a pair by reason)."""
  pairs: list[tuple[dict, dict]] = []
  reasons: collections.Counter[str] = collections.Counter()
  for rows in samples.values():
    choice = choose(rows, weight, guards=guards)
    if choice.reason:
      reasons[choice.reason] += 1
    else:
      pairs.append((rows[choice.best], rows[choice.worst]))
  return pairs, dict(reasons)


def choose_best(samples: Samples, weight: float, n: int, *, guards: bool = True) -> list[dict]:
  """Up to `n` different answers to each prompt, those that score best; with `guards`, of the ones without defects."""
  best: list[dict] = []
  worth = lambda s: score(s["speedup"], s["quality"], weight)
  for rows in samples.values():
    different: dict[str, dict] = {}
    for s in sorted((s for s in rows if not (guards and s["defects"])), key=worth, reverse=True):
      different.setdefault(s["text"], s)
    best += list(different.values())[:n]
  return best


def lay_out_sample(
  sample: dict, vocabulary: Vocabulary, form: Forms, prompt: Sequence[int] | None = None
) -> Layout:
  """The layout of a sample's answer after its own prompt, or after `prompt`."""
  return lay_out(from_json(sample["trace"], vocabulary, form.positions), vocabulary, form.positions, prompt)


def lay_out_pairs(
  pairs: Sequence[tuple[dict, dict]],
  vocabulary: Vocabulary,
  form: Forms,
  prompts: Mapping[str, Sequence[int]],
) -> list[PreferencePair]:
  """Pairs for training.

  `prompts` are each prompt's tokens as the policy will read them: a sample's own prompt may lack the wanted
  speed.
  """
  lay = lambda s: lay_out_sample(s, vocabulary, form, prompts[s["of"]])
  return [PreferencePair(lay(best), lay(worst)) for best, worst in pairs]


def figures(
  samples: Samples, pairs: Sequence[tuple[dict, dict]], reasons: Mapping[str, int], drawn: int
) -> dict:
  """Figures of a round's samples and pairs for its report. `drawn`: samples before any were left out."""
  rows = [s for of in samples.values() for s in of]
  counts = collections.Counter(d for s in rows for d in s["defects"])
  n = max(len(rows), 1)
  any_plain = any(is_plain(s["id"]) for s in rows)

  def side(chosen: Sequence[dict]) -> dict[str, float]:
    if not chosen:
      return {}
    return {
      "speedup": geometric_mean(s["speedup"] for s in chosen),
      "theoretical_parallelism": geometric_mean(s["theoretical_parallelism"] for s in chosen),
      "quality": float(np.mean([s["quality"] for s in chosen])),
      "promises": float(np.mean([s["promises"] for s in chosen])),
      "text_tokens": float(np.mean([s["text_tokens"] for s in chosen])),
      "tag_overhead": tag_overhead(chosen),
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
    **(
      {"best without promises": float(np.mean([is_plain(b["id"]) for b, _ in pairs]))}
      if any_plain and pairs
      else {}
    ),
    "defects of samples, share": {name: count / n for name, count in sorted(counts.items())},
    "share with defects": sum(bool(s["defects"]) for s in rows) / n,
  }


def write_pairs(path: Path, pairs: Sequence[tuple[dict, dict]], weight: float) -> None:
  """Writes the pairs and what decided their choice; the samples' file has everything else."""
  fields = ("id", "speedup", "quality", "longest_path", "text_tokens", "promises", "defects", "text")
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
