"""The input pipeline: worker processes lay out text, and grain packs batches ahead of the devices.

Batch `step` is a function of the seed and the step alone (`data.packing`), and every process packs the rows
of its own devices. The iterator's state, which every checkpoint contains, is therefore the same on any mesh
and any number of processes, and a resumed run continues with the batch it would have had.
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
  """f of each item, in order, computed by `workers` processes (`f` is pickled once for each); 0: by this
  one."""
  if not workers:
    yield from map(f, items)
    return
  pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _prepare, (f,))
  try:
    yield from pool.map(_work, items, chunksize=16)
  finally:
    pool.shutdown(cancel_futures=True)


_prepared: list[Callable] = []  # in a worker process: its `f`


def _prepare(f: Callable) -> None:
  _prepared[:] = [f]


def _work(item):
  return _prepared[0](item)


def fingerprint(examples: Sequence[Layout]) -> str:
  """A hash of the tokens, positions, targets and intervals of all examples, in order."""
  found = hashlib.sha256()
  for e in examples:
    found.update(f"{e.masked_intervals.shape}".encode())
    for array in (e.tokens, e.positions, e.targets, e.masked_intervals):
      found.update(array.tobytes())
  return found.hexdigest()[:16]


class DataIterator:
  """The batches of a run's steps, in order, each of `grad_accum_steps` batches stacked [A, B, …].

  `batches(i)` is batch i, or the rows of it that this process needs; two threads prefetch up to four steps.
  `identity` identifies the data (`fingerprint`).
  """

  def __init__(self, batches: Callable[[int], Batch], *, steps: int, grad_accum_steps: int, identity: str):
    def of_step(step: int) -> Batch:
      return jax.tree.map(
        lambda *x: np.stack(x), *(batches(step * grad_accum_steps + i) for i in range(grad_accum_steps))
      )

    import grain  # here: it takes a second, and only training needs it

    reading = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    self._iterator = iter(grain.MapDataset.range(steps).map(of_step).to_iter_dataset(reading))
    self._identity = identity

  def __call__(self) -> Batch:
    """The batches of the next step."""
    return next(self._iterator)

  def state(self) -> dict[str, Any]:
    """For a checkpoint: the position of the iterator, and the identity of its data."""
    return {"iterator": self._iterator.get_state(), "examples": self._identity}

  def restore(self, state: dict[str, Any]) -> None:
    """Continues from `state`. The first process prints a warning if it belongs to other data."""
    self._iterator.set_state(state["iterator"])
    if state["examples"] != self._identity and jax.process_index() == 0:
      print(
        "resuming with other training data than before: the next batches follow the order of the new data"
      )

  def close(self) -> None:
    self._iterator.close()
