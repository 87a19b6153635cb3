"""The record of one response: its text and its figures, one JSON object a line in every file of responses.

A record's keys changed once: rows without `schema` have the keys of schema 1. `RENAMED` lists every key that
changed, in records and in the summaries made of them, and `current` reads both. No old key was given to
another quantity, so a row that has one is an old row.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

from pasta_jax.decode.trace import Trace
from pasta_jax.lang.head import normalised
from pasta_jax.lang.program import unseparated
from pasta_jax.lang.vocabulary import Vocabulary

SCHEMA = 2

_SPEEDUPS = {
  "wall_clock_speedup": "realised_speedup",
  "wall_clock_low": "realised_speedup_low",
  "wall_clock_high": "realised_speedup_high",
}
RENAMED = {
  # responses, samples, and summaries of them
  "theoretical_speedup": "theoretical_parallelism",
  "theoretical_speedup_with_promises": "theoretical_parallelism_with_promises",
  "theoretical_against_baseline": "speedup_over_baseline",
  "parallelism": "tokens_per_round",
  **_SPEEDUPS,
  **{f"with_promises_{old}": f"with_promises_{new}" for old, new in _SPEEDUPS.items()},
  # judgements, pairs and rounds of preference optimisation
  "faults": "defects",
  "faults of samples, share": "defects of samples, share",
  "share with faults": "share with defects",
  "curt": "too short",
  "runaway": "too long",
  "promise storm": "too many promises",
  "none without faults": "all have defects",
  "lost": "ref_logp_drop",
}

LOOP_LENGTH, LOOP_REPEATS = 20, 3


def current(row: Mapping) -> dict:
  """`row`, of any schema, with the keys of today; keys that did not change are kept, in their order.

  Dicts inside it are read in the same way, lists are not. Not for dicts whose keys a user chooses.
  """
  return {
    RENAMED.get(key, key): current(value) if isinstance(value, dict) else value for key, value in row.items()
  }


@dataclasses.dataclass(frozen=True)
class ResponseRecord:
  """Text and figures of one response."""

  text: str  # in reading order
  finish_reason: str  # "stop": the model ended it; else the limit that cut it off
  text_tokens: int  # of the text, tokenised as plain text, and the token that ends the response
  total_tokens: int  # written tokens: tags, topics and numbers too
  steps: int  # decode steps that were run
  longest_path: int  # decode steps with unlimited branches
  peak_parallelism: int  # threads that write in the same step, at most
  promises: int  # chunks
  depth: int  # of nested chunks: 0 without chunks
  ill_formed: int  # tags
  refused: int  # promises beyond the limits on count and depth
  topic_twice: bool  # whether two promises have the same topic, or the same head (`lang.head.normalised`)
  loops: bool  # whether the text repeats itself (`loops`)
  lengths: tuple[tuple[int, int], ...]  # (tokens that the promise declares, tokens) of each finished chunk
  visibility: str = "promise"  # in which it was decoded (lang.forms); a row names it if it is another
  unseparated: int | None = None  # promises whose chunk meets other text without a blank; None in older rows
  dtype: str = (
    ""  # `Model.dtype`, and the kernels; "" in older rows, and where settings beside the rows say it
  )
  kernels: str = ""

  @property
  def theoretical_parallelism(self) -> float:
    """The response's own text tokens over its longest sequential path."""
    return self.text_tokens / max(self.longest_path, 1)

  @property
  def tokens_per_round(self) -> float:
    """Written tokens over the longest sequential path."""
    return self.total_tokens / max(self.longest_path, 1)

  def to_json(self) -> dict:
    """The record as a JSON object, with its schema."""
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    unsaid = {"visibility": "promise", "dtype": "", "kernels": ""}
    fields = {name: value for name, value in fields.items() if (name, value) not in unsaid.items()}
    return {
      "schema": SCHEMA,
      **fields,
      "lengths": [list(pair) for pair in self.lengths],
      "theoretical_parallelism": self.theoretical_parallelism,
      "tokens_per_round": self.tokens_per_round,
    }

  @classmethod
  def from_json(cls, row: Mapping) -> "ResponseRecord":
    """The record in a row of any schema. Keys that are not a record's are ignored.

    Raises ValueError that names what the row lacks.
    """
    known = dataclasses.fields(cls)
    if missing := [f.name for f in known if f.name not in row and f.default is dataclasses.MISSING]:
      raise ValueError(f"a record of a response needs {', '.join(missing)}")
    fields = {f.name: row[f.name] for f in known if f.name in row}
    return cls(**fields | {"lengths": tuple((declared, n) for declared, n in row["lengths"])})


def to_record(trace: Trace, vocabulary: Vocabulary, *, dtype: str = "", kernels: str = "") -> ResponseRecord:
  """The record of a decoded response."""
  tokens = text_tokens(trace.text, [trace], vocabulary)
  chunks = trace.threads[1:]
  with_head = vocabulary.promise == "head"
  named = [normalised(c.topic) if with_head else c.topic.lower() for c in chunks]
  topics = collections.Counter(name for name in named if name or not with_head)
  return ResponseRecord(
    text=trace.text,
    finish_reason=trace.finish_reason,
    text_tokens=count_text_tokens(tokens, trace.finish_reason),
    total_tokens=trace.cost.total_tokens,
    steps=trace.steps,
    longest_path=trace.cost.longest_path,
    peak_parallelism=trace.cost.peak_parallelism,
    promises=len(chunks),
    depth=trace.main.depth,
    ill_formed=trace.ill_formed,
    refused=trace.refused,
    topic_twice=any(n > 1 for n in topics.values()),
    loops=loops(tokens),
    lengths=tuple((c.declared, c.length) for c in chunks if c.declared is not None and c.finished),
    visibility=trace.visibility,
    unseparated=unseparated(trace.program),
    dtype=dtype,
    kernels=kernels,
  )


def text_tokens(text: str, traces: Sequence[Trace], vocabulary: Vocabulary) -> list[int]:
  """The tokens of a text that `traces` wrote, as plain text.

  Bytes that are no UTF-8 are U+FFFD in the text, which would be tokenised anew, as several tokens for each; the
  tokens of such a text are those that were written.
  """
  if "\ufffd" not in text:
    return vocabulary.tokenizer.encode(text)
  written = ((t.tokens, r.is_text) for trace in traces for t, r in zip(trace.threads, trace.readings))
  return [int(token) for tokens, is_text in written for token in tokens[is_text]]


def count_text_tokens(tokens: Sequence[int], finish_reason: str) -> int:
  """Steps of ordinary decoding for a text of these tokens, with the end token if it was written."""
  return len(tokens) + (finish_reason == "stop")


def loops(tokens: Sequence[int], length: int = LOOP_LENGTH, repeats: int = LOOP_REPEATS) -> bool:
  """Whether an n-gram of `length` tokens occurs `repeats` times (overlapping occurrences count)."""
  seen: dict[tuple[int, ...], int] = {}
  for i in range(len(tokens) - length + 1):
    ngram = tuple(tokens[i : i + length])
    seen[ngram] = seen.get(ngram, 0) + 1
    if seen[ngram] >= repeats:
      return True
  return False
