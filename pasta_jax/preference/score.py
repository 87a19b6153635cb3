"""What a sampled answer is worth, what is wrong with it, and which two of a prompt's samples make a pair.

Samples are records of `decode.record.to_record` with `chunks` (`chunk_facts`), a judge's `quality` in [0, 1],
and a `speedup`. Pure functions, no model.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence

from pasta_jax.decode.trace import Trace
from pasta_jax.evaluate.metrics.measures import theoretical_against
from pasta_jax.lang.thread import Thread, read
from pasta_jax.lang.vocabulary import Vocabulary

RUN = 8  # tokens that two chunks must share in a row for one to be a copy
OVERHEAD = 0.5  # of a storm: share of all tokens that are no text
RUNAWAY = (2.0, 64)  # times the baseline's tokens, and so many more
CURT = (0.25, 16)  # times the baseline's tokens, less so many


def _arithmetic(sample: dict, baseline: dict) -> float:
  return (theoretical_against(sample, baseline) + sample["parallelism"]) / 2


def _harmonic(sample: dict, baseline: dict) -> float:
  speed, parallel = theoretical_against(sample, baseline), max(sample["parallelism"], 1e-9)
  return 2 * speed * parallel / (speed + parallel)


def _delivered(sample: dict, baseline: dict) -> float:
  """The theoretical speedup of the text that is there, up to the baseline's length: saying less is not
  speed."""
  return min(sample["theoretical_speedup"], theoretical_against(sample, baseline))


SPEEDUPS: dict[str, Callable[[dict, dict], float]] = {
  "delivered": _delivered,
  "theoretical": theoretical_against,  # the paper's
  "parallelism": lambda sample, baseline: sample["parallelism"],
  "arithmetic": _arithmetic,  # means of the two above
  "harmonic": _harmonic,
}


@dataclasses.dataclass(frozen=True)
class StepCost:
  """Seconds of a decode step on a device: `base + row * branches + entry * pool entries in use`.

  Fitted by `evaluate.benchmark` (`--cost=FILE`); predicts wall clock, where tags, narrow steps and a growing
  pool cost something, from when each token of an answer was written.
  """

  base: float
  row: float
  entry: float

  def seconds(self, rounds: Sequence[int], prompt: int) -> float:
    """Of an answer whose tokens were written in `rounds`, behind a prompt of so many tokens."""
    counts = collections.Counter(rounds)
    used, total = prompt, 0.0
    for r in sorted(counts):
      total += self.base + self.row * counts[r] + self.entry * used
      used += counts[r]
    return total

  def speedup(self, sample: dict, baseline: dict) -> float:
    """Predicted seconds of the sample's text, up to the baseline's length, one token at a time, over its
    own."""
    prompt = sample["prompt_tokens"]
    sequential = self.seconds(range(min(sample["text_tokens"], baseline["text_tokens"])), prompt)
    return sequential / max(self.seconds(sample["rounds"], prompt), 1e-9)


def score(speedup: float, quality: float, weight: float) -> tuple[float, float]:
  """speedup + weight x quality, as a key to sort by; with an infinite weight quality decides and speed breaks
  ties."""
  return (quality, speedup) if math.isinf(weight) else (speedup + weight * quality, 0.0)


def chunk_facts(trace: Trace, vocabulary: Vocabulary) -> dict:
  """What `faults` asks of the chunks: how many are empty, and how many copy another one or the main
  thread."""
  texts = []
  for t in trace.threads:
    reading = read(Thread(tuple(t.tokens.tolist())), vocabulary.table, is_main=t.number == 0)
    texts.append([int(x) for x, keep in zip(t.tokens, reading.is_text) if keep])
  seen: set[tuple[int, ...]] = set()
  copies = 0
  for n, tokens in enumerate(texts):
    runs = {tuple(tokens[i : i + RUN]) for i in range(len(tokens) - RUN + 1)}
    copies += bool(n and runs and 2 * len(runs & seen) > len(runs))
    seen |= runs
  empty = sum(not vocabulary.text(tokens).strip() for tokens in texts[1:])
  return {"empty_chunks": empty, "copied_chunks": copies}


def faults(sample: dict, baseline: dict) -> list[str]:
  """Names of what no best answer may have: broken answers, and the ways to look fast without being useful."""
  found = {
    "empty": not sample["text"].strip(),
    "cut off": sample["finish_reason"] != "stop",
    "malformed": sample["ill_formed"] > 0,
    "loops": sample["loops"],
    "empty chunks": sample["empty_chunks"] > 0,
    "copied chunks": sample["copied_chunks"] > 0,
    "promise storm": sample["refused"] > 0 or sample["text_tokens"] < (1 - OVERHEAD) * sample["total_tokens"],
    "curt": sample["text_tokens"] < CURT[0] * baseline["text_tokens"] - CURT[1],  # speed by saying nothing
    "runaway": sample["text_tokens"] > RUNAWAY[0] * baseline["text_tokens"] + RUNAWAY[1],
  }
  return [name for name, there in found.items() if there]


@dataclasses.dataclass(frozen=True)
class Choice:
  """Indices of the best and the worst of a prompt's samples; or why there is no pair."""

  best: int = -1
  worst: int = -1
  reason: str = ""


def choose(samples: Sequence[dict], weight: float, *, guards: bool = True) -> Choice:
  """The pair of a prompt's samples, which have `speedup`, `quality`, `faults` and `text`.

  `samples` may be fewer than were drawn: without those that were not judged, or that no training row holds.
  With `guards` any answer with faults ranks below all without: the best has none, and the worst is the worst
  of those that have some, if there are any, so that what breaks an answer is unlearned even where it is fast.
  No pair where all samples are the same, where none is without faults, and where best and worst score the
  same.
  """
  if len(samples) < 2:
    return Choice(reason="not judged, or too long")
  if len({(s["text"], s["longest_path"]) for s in samples}) < 2:
    return Choice(reason="all the same")
  keys = [(not (guards and s["faults"]), *score(s["speedup"], s["quality"], weight)) for s in samples]
  best, worst = (choice(range(len(samples)), key=keys.__getitem__) for choice in (max, min))
  if not keys[best][0]:
    return Choice(reason="none without faults")
  if keys[best] == keys[worst]:
    return Choice(reason="no difference")
  return Choice(best, worst)
