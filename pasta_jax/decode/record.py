"""One response as a record for JSON lines: its text and its figures."""

import collections
from collections.abc import Sequence

from pasta_jax.decode.trace import Trace
from pasta_jax.lang.vocabulary import Vocabulary

LOOP_LENGTH, LOOP_TIMES = 20, 3


def loops(tokens: Sequence[int], length: int = LOOP_LENGTH, times: int = LOOP_TIMES) -> bool:
  """Whether some run of `length` tokens comes `times` times (overlaps count once a start)."""
  seen: dict[tuple[int, ...], int] = {}
  for i in range(len(tokens) - length + 1):
    run = tuple(tokens[i : i + length])
    seen[run] = seen.get(run, 0) + 1
    if seen[run] >= times:
      return True
  return False


def to_record(trace: Trace, vocabulary: Vocabulary) -> dict:
  """The record of one response, ready for JSON.

  `text_tokens` counts what the reader sees, tokenised as plain text, with the token that ends the response:
  the steps that ordinary decoding of the same text takes. `theoretical_speedup` is that over the longest
  sequential path.
  """
  reading = vocabulary.tokenizer.encode(trace.text)
  ended = trace.finish_reason == "stop"
  chunks = trace.threads[1:]
  topics = collections.Counter(c.topic.lower() for c in chunks)
  text_tokens = len(reading) + int(ended)
  return {
    "text": trace.text,
    "finish_reason": trace.finish_reason,
    "text_tokens": text_tokens,
    "total_tokens": trace.cost.total_tokens,
    "steps": trace.steps,
    "longest_path": trace.cost.longest_path,
    "theoretical_speedup": text_tokens / max(trace.cost.longest_path, 1),
    "parallelism": trace.cost.tokens_per_round,
    "peak_parallelism": trace.cost.peak_parallelism,
    "promises": len(chunks),
    "depth": trace.thread.depth,
    "ill_formed": trace.ill_formed,
    "refused": trace.refused,
    "topic_twice": any(n > 1 for n in topics.values()),
    "loops": loops(reading),
    "lengths": [[c.declared, c.length] for c in chunks if c.declared is not None and c.finished],
  }
