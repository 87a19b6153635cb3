"""The input pipeline: text is laid out by worker processes, and batches are packed ahead of the devices, by
grain.

Batch `step` is a function of the seed and the step alone (`data.packing`), and every process packs the rows
that its own devices hold: so the iterator's state, which stands in every checkpoint, is the same on any mesh
and any number of processes, and a run goes on with the batch that it would have had.
"""

import hashlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np

from pasta_jax.lang.layout import Layout

Batch = dict[str, np.ndarray]
T = TypeVar("T")
R = TypeVar("R")


def parallel_map(f: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[R]:
  """f of each item, in order; by so many processes (`f` is pickled once for each), or by this one where it is
  0."""
  if not workers:
    yield from map(f, items)
    return
  pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _prepare, (f,))
  try:
    yield from pool.map(_work, items, chunksize=16)
  finally:
    pool.shutdown(cancel_futures=True)


_prepared: list[Callable] = []  # of a worker


def _prepare(f: Callable) -> None:
  _prepared[:] = [f]


def _work(item):
  return _prepared[0](item)


def fingerprint(examples: Sequence[Layout]) -> str:
  """Changes with any token, position, target or interval of the examples, and with their order."""
  found = hashlib.sha256()
  for e in examples:
    found.update(f"{e.masked_intervals.shape}".encode())
    for array in (e.tokens, e.positions, e.targets, e.masked_intervals):
      found.update(array.tobytes())
  return found.hexdigest()[:16]


class DataIterator:
  """The batches of a run's steps, one after another, each of `grad_accum_steps` batches stacked [A, B, …].

  `batches(i)` is the i-th one, or what this process needs of it; two threads make a few ahead. `identity`
  tells the data from others (`fingerprint`).
  """

  def __init__(self, batches: Callable[[int], Batch], *, steps: int, grad_accum_steps: int, identity: str):
    def of_step(step: int) -> Batch:
      return jax.tree.map(
        lambda *x: np.stack(x), *(batches(step * grad_accum_steps + i) for i in range(grad_accum_steps))
      )

    import grain  # takes a second, and only training needs it

    reading = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    self._iterator = iter(grain.MapDataset.range(steps).map(of_step).to_iter_dataset(reading))
    self._identity = identity

  def __call__(self) -> Batch:
    """The next step's."""
    return next(self._iterator)

  def state(self) -> dict[str, Any]:
    """What a checkpoint keeps: where the iterator stands, and of which data."""
    return {"iterator": self._iterator.get_state(), "examples": self._identity}

  def restore(self, state: dict[str, Any]) -> None:
    """Goes on where `state` was taken. Says so, in the first process, if that was of other data."""
    self._iterator.set_state(state["iterator"])
    if state["examples"] != self._identity and jax.process_index() == 0:
      print("resuming with other training data than before: the next batches come from the new data's order")

  def close(self) -> None:
    self._iterator.close()
