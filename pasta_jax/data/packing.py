"""Packing: several examples in a row of fixed length, separated by segment ids.

Batch `step` is a function of (seed, step) alone, so a resumed run needs to know the step only.
"""

import dataclasses
import threading
from collections.abc import Callable, Sequence

import numpy as np

from pasta_jax.lang.layout import NO_TARGET, Layout

FIRST_ROUND = 2**29  # the highest round of a row: far above 0, that of padding, whatever the examples


@dataclasses.dataclass
class PackedBatch:
  """Rows for the trainer; every leaf int32. B rows of T tokens, L nesting levels.

  `segment_ids` is 0 for padding and counts examples from 1 within a row; `masked_intervals` are indices into
  the row. A query at q sees a key at k iff `visibility.is_visible` says so and their segments are equal; under
  `live`, iff `visibility.is_visible_live` says so of `rounds`, which fall from each example of a row to the next, so
  that nothing sees an earlier example, and are lowest in padding.
  """

  tokens: np.ndarray  # [B, T]
  positions: np.ndarray  # [B, T]
  masked_intervals: np.ndarray  # [B, T, L, 2]
  targets: np.ndarray  # [B, T], NO_TARGET where nothing is learned
  segment_ids: np.ndarray  # [B, T]
  rounds: np.ndarray  # [B, T]

  def as_dict(self) -> dict[str, np.ndarray]:
    return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def pack_row(examples: Sequence[Layout], length: int, levels: int) -> PackedBatch:
  """One row (B = 1): the examples one after another, padded to `length`. Raises ValueError for too few
  levels."""
  row = PackedBatch(
    tokens=np.zeros((1, length), np.int32),
    positions=np.zeros((1, length), np.int32),
    masked_intervals=np.zeros((1, length, levels, 2), np.int32),
    targets=np.full((1, length), NO_TARGET, np.int32),
    segment_ids=np.zeros((1, length), np.int32),
    rounds=np.zeros((1, length), np.int32),
  )
  at, highest = 0, FIRST_ROUND
  for number, e in enumerate(examples, 1):
    where = slice(at, at + len(e))
    row.tokens[0, where], row.positions[0, where], row.targets[0, where] = e.tokens, e.positions, e.targets
    own = e.masked_intervals.shape[1]
    if own > levels and e.masked_intervals[:, levels:].any():
      raise ValueError(f"an example nests chunks {own} deep, the batch has {levels} levels")
    filled = e.masked_intervals[:, :levels]
    row.masked_intervals[0, where, : filled.shape[1]] = filled + at * (filled[..., 1:] > 0)
    row.segment_ids[0, where] = number
    row.rounds[0, where] = fallen(e.rounds, highest)
    highest = int(row.rounds[0, where].min(initial=highest))
    at += len(e)
  return row


def fallen(rounds: np.ndarray, highest: int) -> np.ndarray:
  """An example's rounds, moved so that they end at `highest`, the lowest of the example before it."""
  return rounds + (highest - int(rounds.max(initial=0)))


def concatenate(rows: Sequence[PackedBatch]) -> PackedBatch:
  """Rows stacked along B."""
  return PackedBatch(
    *(np.concatenate([getattr(r, f.name) for r in rows]) for f in dataclasses.fields(PackedBatch))
  )


def fill_rows(lengths: Sequence[int], length: int) -> list[list[int]]:
  """Indices of the examples of each row: first fit, in the given order.

  Raises ValueError if an example is longer than a row.
  """
  if max(lengths, default=0) > length:
    raise ValueError(f"an example of {max(lengths)} tokens does not fit a row of {length}")
  rows: list[list[int]] = []
  space: list[int] = []
  for i, n in enumerate(lengths):
    row = next((r for r, s in enumerate(space) if s >= n), None)
    if row is None:
      rows.append([])
      space.append(length)
      row = len(rows) - 1
    rows[row].append(i)
    space[row] -= n
  return rows


class Epochs:
  """What the batches of each epoch consist of, computed once an epoch from (seed, epoch) alone."""

  def __init__(self, seed: int, shuffle: Callable[[np.random.Generator], list[list[int]]]):
    self._seed, self._shuffle = seed, shuffle
    self._known: list[list[list[int]]] = []
    self._lock = threading.Lock()  # batches are made by several threads

  def __getitem__(self, epoch: int) -> list[list[int]]:
    with self._lock:
      while len(self._known) <= epoch:
        self._known.append(self._shuffle(np.random.default_rng((self._seed, len(self._known)))))
    return self._known[epoch]


def locate(step: int, steps_in_epoch: Callable[[int], int]) -> tuple[int, int]:
  """(epoch, step within it) of a step that is counted over all epochs."""
  epoch = 0
  while step >= steps_in_epoch(epoch):
    step -= steps_in_epoch(epoch)
    epoch += 1
  return epoch, step


class PackedBatches:
  """An endless sequence of batches; batch `step` is a function of (seed, step) alone."""

  def __init__(self, examples: Sequence[Layout], *, batch_size: int, length: int, levels: int, seed: int):
    if not examples:
      raise ValueError("no training example is left: is max_length too small?")
    self.examples, self.batch_size, self.length, self.levels = examples, batch_size, length, levels
    self._rows = Epochs(seed, self._shuffle)

  def _shuffle(self, rng: np.random.Generator) -> list[list[int]]:
    """The examples of each row of an epoch."""
    order = rng.permutation(len(self.examples))
    lengths = [len(self.examples[i]) for i in order]
    rows = [[int(order[i]) for i in row] for row in fill_rows(lengths, self.length)]
    return [rows[i] for i in rng.permutation(len(rows))]

  def steps_in_epoch(self, epoch: int) -> int:
    """The number of batches; the last one, if incomplete, is filled with the first rows of the epoch."""
    return -(-len(self._rows[epoch]) // self.batch_size)

  def rows(self, step: int, share: Sequence[int] | None = None) -> list[list[int]]:
    """The examples of each row of batch `step`, counted over all epochs; only of its rows `share`, if given."""
    epoch, step = locate(step, self.steps_in_epoch)
    rows = self._rows[epoch]
    share = range(self.batch_size) if share is None else share
    return [rows[(step * self.batch_size + r) % len(rows)] for r in share]

  def __call__(self, step: int, share: Sequence[int] | None = None) -> PackedBatch:
    """Batch `step`, or its rows `share`."""
    packed = (
      pack_row([self.examples[i] for i in row], self.length, self.levels) for row in self.rows(step, share)
    )
    return concatenate(list(packed))


def single_batches(
  examples: Sequence[Layout], *, batch_size: int, length: int, levels: int
) -> list[PackedBatch]:
  """Every example once, packed; the last batch is padded with empty rows. For validation."""
  rows = [[examples[i] for i in row] for row in fill_rows([len(e) for e in examples], length)]
  rows += [[]] * (-len(rows) % batch_size)
  packed = [pack_row(row, length, levels) for row in rows]
  return [concatenate(packed[i : i + batch_size]) for i in range(0, len(packed), batch_size)]
