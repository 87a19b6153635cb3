"""Finished work (`utils.records`) that several processes make together, each a part.

    responses/pasta.jsonl             what is finished; the first process adds its rows here
    responses/pasta.jsonl.part-001    the rows of the second process since, until they are merged

A kill loses no finished row: whoever opens the records next, with as many processes as it likes, merges what is there.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pasta_jax.utils import distributed
from pasta_jax.utils.jsonl import DataError, append_row
from pasta_jax.utils.records import OTHER_FOLDER, Records, merge_parts, part_of, read_records

T = TypeVar("T")
PATIENCE = 120  # seconds until a shared file system must show what another host has written


class SharedRecords(Records):
  """Records that all processes open, and make, at the same time. In a single process they are `Records`."""

  def __init__(self, path: Path, settings: dict[str, Any], advice: str = OTHER_FOLDER):
    def opened() -> int:
      super(SharedRecords, self).__init__(path, settings, advice)
      return _size(path)

    self.path = path
    self._read_after(opened)

  def make(
    self,
    todo: Sequence[T],
    work: Callable[[Sequence[T], Callable[[dict], None]], None],
    together: Callable[[T], Hashable] = lambda x: x,
  ) -> None:
    """Has `work(some, add)` make the rows of `todo`: each process those of its share, by itself and at its own speed.
    Afterwards every process has all rows. What has the same value of `together` is made by one process.
    """
    index, count = distributed.place()
    groups = {group: n for n, group in enumerate(dict.fromkeys(map(together, todo)))}
    share = [x for x in todo if groups[together(x)] % count == index]
    part = part_of(self.path, index)

    def add(row: dict) -> None:
      if index:
        self.rows[row["id"]] = row
        append_row(part, row)
      else:
        self.add(row)
      distributed.check()

    if share:
      work(share, add)
    if count == 1:
      return
    sizes = distributed.gathered(_size(part))

    def merged() -> int:
      for other in range(1, count):
        _await(part_of(self.path, other), sizes[other])
      merge_parts(self.path, count)
      self.rows |= {row["id"]: row for row in read_records(self.path)}
      return _size(self.path)

    self._read_after(merged)

  def _read_after(self, work: Callable[[], int]) -> None:
    """`work()` in the first process, which returns the size of its file; the others then read that."""
    size = distributed.from_first(work)
    if not distributed.is_first():
      _await(self.path, size)
      self.rows = {row["id"]: row for row in read_records(self.path)}
    distributed.gathered(None)  # the first one may delete or replace the file when all have read it


def _size(path: Path) -> int:
  return path.stat().st_size if path.exists() else 0


def _await(path: Path, size: int) -> None:
  """Waits until a file has `size` bytes: between hosts that takes a while. Raises DataError if it never has."""
  until = time.monotonic() + PATIENCE
  while _size(path) < size:
    if time.monotonic() > until:
      raise DataError(
        f"{path} is not here, though another process has written it: all processes need the same --workdir, in a "
        "folder that all hosts see"
      )
    time.sleep(0.1)
