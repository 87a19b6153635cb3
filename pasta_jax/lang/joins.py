"""Which chunks a sync joins: the one statement of the rule on the host (docs/language.md section 3).

A sync joins what its own thread has promised since its last sync, and whatever those chunks left unjoined.
What a chunk leaves unjoined passes to the promising thread; what the main thread leaves is never joined. The
interpreter states the same rule on the device (`decode.threads.adopt` and `join`).
"""

from collections.abc import Iterable
from typing import Generic, TypeVar

Chunk = TypeVar("Chunk")


class Unjoined(Generic[Chunk]):
  """The chunks that one thread's next sync will join, as the thread is read from its start."""

  def __init__(self) -> None:
    self.chunks: list[Chunk] = []

  def promise(self, chunk: Chunk, left: Iterable[Chunk] = ()) -> None:
    """The thread promises `chunk`, whose own thread ends with the chunks `left` unjoined."""
    self.chunks += [chunk, *left]

  def sync(self) -> list[Chunk]:
    """The chunks that a sync at this point joins, in order of their promises."""
    joined, self.chunks = self.chunks, []
    return joined
