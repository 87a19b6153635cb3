"""What a model without tags reads of a serialised response: its text in reading order, which is the serialised order
without tags. Baseline-SFT can so be asked, over the rows of a batch as they are, what it would write next."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pasta_jax.data.packing import FIRST_ROUND, fallen
from pasta_jax.lang.automaton import EOS, TokenTable
from pasta_jax.lang.layout import NO_TARGET, Layout
from pasta_jax.lang.thread import Thread, read


class Reading(NamedTuple):
  """One example of T tokens; everything is int32.

  With these positions and rounds, under the visibility `live`, a token of text sees the text before it in reading
  order and nothing else: tags have the highest round, which nobody sees.
  """

  positions: np.ndarray  # [T]
  rounds: np.ndarray  # [T]
  source: np.ndarray  # [T] whose next token in reading order the target is; NO_TARGET: the target is no text


def reading(laid: Layout, table: TokenTable) -> Reading:
  """The reading of a laid-out response. The end of the turn counts as text."""
  n = len(laid)
  is_text = laid.index < 0  # the prompt
  following = np.full(n, NO_TARGET, np.int32)  # where the target stands
  for thread in range(int(laid.threads.max(initial=0)) + 1):
    own = np.flatnonzero((laid.threads == thread) & (laid.index >= 0))
    tokens = laid.tokens[own]
    found = read(Thread(tuple(tokens.tolist())), table, is_main=thread == 0)
    is_text[own] = found.is_text | ((table.classes[tokens] == EOS) & (thread == 0))
    before = np.flatnonzero(laid.index == -1)[-1:] if thread == 0 else own[:0]
    whole = np.concatenate([before, own])
    following[whole[:-1]] = whole[1:]
  at = np.arange(n, dtype=np.int32)
  last = np.maximum.accumulate(np.where(is_text, at, -1))  # the last token of text up to here
  learned = (laid.targets != NO_TARGET) & (following > 0) & is_text[following]
  source = np.where(learned, last[following - 1], NO_TARGET)
  positions = np.maximum(np.cumsum(is_text) - 1, 0)
  return Reading(*(x.astype(np.int32) for x in (positions, np.where(is_text, at, n), source)))


def pack_readings(rows: Sequence[Sequence[Reading]], length: int) -> dict[str, np.ndarray]:
  """The readings of packed examples, in the places that `packing.pack_row` gives them: `reading_positions`,
  `reading_rounds`, `reading_source`, each [B, length]."""
  out = Reading(*(np.full((len(rows), length), fill, np.int32) for fill in (0, 0, NO_TARGET)))
  for row, examples in enumerate(rows):
    at, highest = 0, FIRST_ROUND
    for e in examples:
      where = slice(at, at + len(e.rounds))
      out.positions[row, where] = e.positions
      out.rounds[row, where] = fallen(e.rounds, highest)
      out.source[row, where] = np.where(e.source == NO_TARGET, NO_TARGET, e.source + at)
      highest = int(out.rounds[row, where].min(initial=highest))
      at += len(e.rounds)
  return {f"reading_{name}": x for name, x in out._asdict().items()}
