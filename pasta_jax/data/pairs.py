"""Preference pairs in batches of fixed shape: both answers of a pair are in the same batch, as the loss
requires."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from pasta_jax.data.packing import Epochs, concatenate, locate, pack_row
from pasta_jax.lang.layout import Layout


@dataclasses.dataclass(frozen=True)
class PreferencePair:
  """Two laid-out answers to one prompt, the better one first, with the reference model's log p of each
  (nats)."""

  chosen: Layout
  rejected: Layout
  reference: tuple[float, float] = (0.0, 0.0)


class PairBatches:
  """An endless sequence of batches of whole pairs; batch `step` is a function of (seed, step) alone.

  A batch is `rows` packed rows of `length` tokens with as many pairs as fit, at least one, at most `2 *
  rows`. Its leaves are those of `packing.PackedBatch`, and `answers` [B, T] int32: which answer a token
  belongs to (2p is pair p's chosen one, 2p + 1 its rejected one, `4 * rows` none); `reference` [P, 2] float32
  and `weight` [P] float32, 0 for entries without a pair (P = 2 * rows).
  """

  def __init__(self, pairs: Sequence[PreferencePair], *, rows: int, length: int, levels: int, seed: int):
    if not pairs:
      raise ValueError("no preference pair is left to train on")
    for i, p in enumerate(pairs):
      if _places([0] * rows, p, length) is None:
        lengths = f"{len(p.chosen)} and {len(p.rejected)} tokens"
        raise ValueError(f"pair {i} ({lengths}) does not fit {rows} rows of {length}")
    self.pairs, self.rows, self.length, self.levels = pairs, rows, length, levels
    self._epochs = Epochs(seed, self._shuffle)

  def epoch(self, epoch: int) -> list[list[int]]:
    """The pairs of each batch of an epoch."""
    return self._epochs[epoch]

  def _shuffle(self, rng: np.random.Generator) -> list[list[int]]:
    batches: list[list[int]] = []
    used: list[int] = []
    for i in map(int, rng.permutation(len(self.pairs))):
      after = _places(used, self.pairs[i], self.length)
      if not batches or after is None or len(batches[-1]) == 2 * self.rows:
        batches.append([])
        after = _places([0] * self.rows, self.pairs[i], self.length)
      batches[-1].append(i)
      used = after[0] if after else used
    return batches

  def steps_in_epoch(self, epoch: int) -> int:
    return len(self.epoch(epoch))

  def __call__(self, step: int) -> dict[str, np.ndarray]:
    """Batch `step`, counted over all epochs."""
    epoch, step = locate(step, self.steps_in_epoch)
    return self.batch([self.pairs[i] for i in self.epoch(epoch)[step]])

  def batch(self, pairs: Sequence[PreferencePair]) -> dict[str, np.ndarray]:
    """The batch of these pairs. Raises ValueError if they do not fit."""
    used = [0] * self.rows
    content: list[list[tuple[int, Layout]]] = [[] for _ in used]  # (answer, example) by row
    for p, pair in enumerate(pairs):
      placed = _places(used, pair, self.length)
      if placed is None:
        raise ValueError(f"{len(pairs)} pairs do not fit {self.rows} rows of {self.length}")
      used, where = placed
      for side, (row, example) in enumerate(zip(where, (pair.chosen, pair.rejected))):
        content[row].append((2 * p + side, example))
    packed = concatenate([pack_row([e for _, e in row], self.length, self.levels) for row in content])
    answers = np.full((self.rows, self.length), 4 * self.rows, np.int32)
    for r, filled in enumerate(content):
      for segment, (answer, _) in enumerate(filled, 1):
        answers[r, packed.segment_ids[r] == segment] = answer
    reference = np.zeros((2 * self.rows, 2), np.float32)
    weight = np.zeros(2 * self.rows, np.float32)
    for p, pair in enumerate(pairs):
      reference[p], weight[p] = pair.reference, 1.0
    return packed.as_dict() | {"answers": answers, "reference": reference, "weight": weight}


def _places(used: list[int], pair: PreferencePair, length: int) -> tuple[list[int], list[int]] | None:
  """(tokens used of each row after adding the pair, the rows of its two answers), first fit; None if it does
  not fit."""
  used, where = list(used), []
  for example in (pair.chosen, pair.rejected):
    row = next((r for r, n in enumerate(used) if n + len(example) <= length), None)
    if row is None:
      return None
    used[row] += len(example)
    where.append(row)
  return used, where
