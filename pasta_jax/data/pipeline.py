"""The input pipeline, by grain: text is laid out by worker processes, and batches are packed ahead of the devices.

Batch `step` is a function of the seed and the step alone (`data.packing`), and every process packs the rows that its
own devices hold: so the iterator's state, which stands in every checkpoint, is the same on any mesh and any number of
processes, and a run goes on with the batch that it would have had.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import grain
import jax
import numpy as np
from absl import flags

from pasta_jax.lang.layout import Layout

Batch = dict[str, np.ndarray]
T = TypeVar("T")
R = TypeVar("R")


def in_workers(f: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[R]:
  """f of each item, in order; by so many processes (`f` is pickled), or by this one where `workers` is 0."""
  if not workers:
    yield from map(f, items)
    return
  if not flags.FLAGS.is_parsed():  # outside of main.py; grain's workers read flags of theirs
    flags.FLAGS.mark_as_parsed()
  each = grain.MapDataset.source(items).map(f).to_iter_dataset(grain.ReadOptions(num_threads=0))
  results = iter(each.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)))
  try:
    yield from results
  finally:
    results.close()


def digest(examples: Sequence[Layout]) -> str:
  """Changes with any token, position or target of the examples, and with their order."""
  found = hashlib.sha256()
  for e in examples:
    for array in (e.tokens, e.positions, e.targets):
      found.update(array.tobytes())
  return found.hexdigest()[:16]


class Feed:
  """The batches of a run's steps, one after another, each of `accumulate` batches stacked [A, B, …].

  `batches(i)` is the i-th one, or what this process needs of it. A few are made ahead by threads.
  """

  def __init__(self, batches: Callable[[int], Batch], *, steps: int, accumulate: int = 1, identity: str = "",
               ahead: int = 4):
    def of_step(step: int) -> Batch:
      return jax.tree.map(lambda *x: np.stack(x), *(batches(step * accumulate + i) for i in range(accumulate)))

    reading = grain.ReadOptions(num_threads=min(ahead, 2), prefetch_buffer_size=ahead)
    self._iterator = iter(grain.MapDataset.range(steps).map(of_step).to_iter_dataset(reading))
    self._identity = identity

  def __call__(self) -> Batch:
    """The next step's."""
    return next(self._iterator)

  def state(self) -> dict[str, Any]:
    """What a checkpoint keeps: where the iterator stands, and of which data."""
    return {"iterator": self._iterator.get_state(), "examples": self._identity}

  def restore(self, state: dict[str, Any]) -> None:
    """Goes on where `state` was taken. Says so if that was of other data."""
    self._iterator.set_state(state["iterator"])
    if state["examples"] != self._identity:
      print("resuming with other training data than before: the order of examples begins anew in their place")

  def close(self) -> None:
    self._iterator.close()
