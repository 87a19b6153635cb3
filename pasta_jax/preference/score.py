"""What a sampled answer is worth, which defects it has, and which two of a prompt's samples make a pair.

Samples are rows of `rollout.sample_row`; `selection.score_samples` adds a judge's `quality` (`quality.py`), the
`speedup` and the `defects`. Pure functions, no model.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence

from pasta_jax.decode.trace import Trace
from pasta_jax.evaluate.metrics.measures import speedup_over_baseline
from pasta_jax.lang.thread import Thread, read
from pasta_jax.lang.vocabulary import Vocabulary

COPY_NGRAM = 8  # a chunk is a copy if most of its n-grams of this many tokens are in earlier threads
MAX_TAG_SHARE = 0.5  # of all tokens that an answer writes
# Limits on an answer's text tokens: (multiple of the baseline's, tokens added to it).
TOO_LONG = (2.0, 64)
TOO_SHORT = (0.25, -16)


def _arithmetic_mean(sample: dict, baseline: dict) -> float:
  return (speedup_over_baseline(sample, baseline) + sample["tokens_per_round"]) / 2


def _harmonic_mean(sample: dict, baseline: dict) -> float:
  speed, parallel = speedup_over_baseline(sample, baseline), max(sample["tokens_per_round"], 1e-9)
  return 2 * speed * parallel / (speed + parallel)


def _delivered(sample: dict, baseline: dict) -> float:
  """Own text tokens, at most the baseline's, over the longest path: a shorter answer is not a faster one."""
  return min(sample["theoretical_parallelism"], speedup_over_baseline(sample, baseline))


# Of a sample and the baseline's answer, by `preference.score`.
SPEEDUPS: dict[str, Callable[[dict, dict], float]] = {
  "delivered": _delivered,
  "theoretical": speedup_over_baseline,  # the paper's theoretical speedup
  "parallelism": lambda sample, baseline: sample["tokens_per_round"],
  "arithmetic": _arithmetic_mean,  # of the two above
  "harmonic": _harmonic_mean,
}


@dataclasses.dataclass(frozen=True)
class StepCost:
  """Seconds of a decode step on a device: `base + row * branches + entry * pool entries in use`.

  `evaluate.benchmark` fits it (`--cost=FILE`). It predicts wall clock from the round of each token, with the
  cost of tags, of steps with few branches, and of a growing pool.
  """

  base: float
  row: float
  entry: float

  def seconds(self, rounds: Sequence[int], prompt: int) -> float:
    """Of an answer whose tokens were written in `rounds`, after a prompt of `prompt` tokens."""
    counts = collections.Counter(rounds)
    used, total = prompt, 0.0
    for r in sorted(counts):
      total += self.base + self.row * counts[r] + self.entry * used
      used += counts[r]
    return total

  def speedup(self, sample: dict, baseline: dict) -> float:
    """Predicted seconds of its text (up to the baseline's length) one token at a time, over its own."""
    prompt = sample["prompt_tokens"]
    sequential = self.seconds(range(min(sample["text_tokens"], baseline["text_tokens"])), prompt)
    return sequential / max(self.seconds(sample["rounds"], prompt), 1e-9)


def score(speedup: float, quality: float, weight: float) -> tuple[float, float]:
  """Sort key: speedup + weight * quality; if the quality weight is infinite, speed only breaks ties."""
  return (quality, speedup) if math.isinf(weight) else (speedup + weight * quality, 0.0)


def chunk_facts(trace: Trace, vocabulary: Vocabulary) -> dict:
  """Numbers of chunks that are empty, and that copy an earlier thread: for `defects`."""
  texts = []
  for t in trace.threads:
    reading = read(Thread(tuple(t.tokens.tolist())), vocabulary.table, is_main=t.number == 0)
    texts.append([int(x) for x, keep in zip(t.tokens, reading.is_text) if keep])
  seen: set[tuple[int, ...]] = set()
  copies = 0
  for n, tokens in enumerate(texts):
    ngrams = {tuple(tokens[i : i + COPY_NGRAM]) for i in range(len(tokens) - COPY_NGRAM + 1)}
    copies += bool(n and ngrams and 2 * len(ngrams & seen) > len(ngrams))
    seen |= ngrams
  empty = sum(not vocabulary.text(tokens).strip() for tokens in texts[1:])
  return {"empty_chunks": empty, "copied_chunks": copies}


def defects(sample: dict, baseline: dict) -> list[str]:
  """Names of defects that no best answer may have: broken text, or speed without use for the reader."""
  limit = lambda factor, offset: factor * baseline["text_tokens"] + offset
  tests = {
    "empty": not sample["text"].strip(),
    "cut off": sample["finish_reason"] != "stop",
    "malformed": sample["ill_formed"] > 0,
    "loops": sample["loops"],
    "empty chunks": sample["empty_chunks"] > 0,
    "copied chunks": sample["copied_chunks"] > 0,
    "too many promises": sample["refused"] > 0
    or sample["text_tokens"] < (1 - MAX_TAG_SHARE) * sample["total_tokens"],
    "too short": sample["text_tokens"] < limit(*TOO_SHORT),
    "too long": sample["text_tokens"] > limit(*TOO_LONG),
  }
  return [name for name, applies in tests.items() if applies]


@dataclasses.dataclass(frozen=True)
class Choice:
  """Indices of the best and the worst of a prompt's samples, or the reason why there is no pair."""

  best: int = -1
  worst: int = -1
  reason: str = ""


def choose(samples: Sequence[dict], weight: float, *, guards: bool = True) -> Choice:
  """The best and the worst of a prompt's samples (rows of `selection.score_samples`).

  With `guards`, answers with defects rank below all others: the best has none, and the worst is one with
  defects if there is any, so that training works against defects even where they are fast. There is no pair
  if all samples are the same, all have defects, or best and worst score the same: a tie of quality that only speed
  breaks is no pair where quality alone counts.
  """
  if len(samples) < 2:
    return Choice(reason="not judged, or too long")
  if len({(s["text"], s["longest_path"]) for s in samples}) < 2:
    return Choice(reason="all the same")
  keys = [(not (guards and s["defects"]), *score(s["speedup"], s["quality"], weight)) for s in samples]
  best, worst = (choice(range(len(samples)), key=keys.__getitem__) for choice in (max, min))
  if not keys[best][0]:
    return Choice(reason="all have defects")
  if keys[best][:2] == keys[worst][:2]:
    return Choice(reason="no difference")
  return Choice(best, worst)
