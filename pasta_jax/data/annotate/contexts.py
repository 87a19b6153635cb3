"""What each thread of a plan sees when it starts to write, as text: the input of the independence check.

The rule is that of the language (`lang.layout`): the thread of a chunk sees what its promising thread saw at
the promise, and a thread sees its chunks after the sync that joins them.
"""

import dataclasses
from collections.abc import Sequence

from pasta_jax.data.examples import program_of
from pasta_jax.lang.joins import Unjoined
from pasta_jax.lang.program import Program, Promise, Sync, Text, reading_order


@dataclasses.dataclass(frozen=True)
class Context:
  """A piece of text, and what its writer sees."""

  seen: str  # the response so far, with ⟦topic⟧ for the parts that others write
  text: str
  topic: str | None  # of a chunk; None: text of the thread that promised the chunks
  waiting: tuple[str, ...]  # topics of the parts written at the same time
  at: int  # number of chunks promised before this chunk or text
  offset: int  # of the text in the response


def contexts(row: dict) -> list[Context]:
  """The context of each chunk, and of each text that a thread writes while some of its chunks are unseen, in
  reading order, under the visibility `promise`: all chunks are chunks here, whatever they need."""
  found: list[Context] = []
  _walk(program_of(row, "live"), "", (), 0, found, [0])
  return found


def _walk(
  nodes: Program, seen: str, around: Sequence[str], offset: int, found: list[Context], count: list[int]
) -> int:
  """Follows a thread that starts with `seen`; `around`: the unseen topics of its promising threads. Returns
  the offset after it."""
  unjoined: Unjoined[tuple[str, str, str]] = Unjoined()  # mark in `seen`, topic, text
  for node in nodes:
    topics = (*around, *(topic for _, topic, _ in unjoined.chunks))
    if isinstance(node, Text):
      if unjoined.chunks and node.text.strip():
        found.append(Context(_clean(seen), node.text, None, topics, count[0], offset))
      seen += node.text
      offset += len(node.text)
    elif isinstance(node, Sync):
      for mark, _, text in unjoined.sync():  # the whole text of a chunk, whatever its thread left unjoined
        seen = seen.replace(mark, text)
    elif isinstance(node, Promise):
      text, mark = reading_order(node.body), f"\0{count[0]}\0⟦{node.topic}⟧"
      found.append(Context(_clean(seen), text, node.topic, topics, count[0], offset))
      count[0] += 1
      offset = _walk(node.body, seen, topics, offset, found, count)
      seen += mark
      unjoined.promise((mark, node.topic or "", text))
  return offset


def _clean(seen: str) -> str:
  """The text without the numbers that distinguish marks of the same topic."""
  parts = seen.split("\0")
  return "".join(part for i, part in enumerate(parts) if i % 2 == 0)
