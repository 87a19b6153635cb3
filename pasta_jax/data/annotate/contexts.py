"""What each thread of a plan sees when it begins to write: the question that a check of independence asks.

The rule is the language's (`lang.layout`), told in text: a chunk's thread sees what its promising thread saw
at the promise, and a thread sees its chunks behind the sync that joins them.
"""

import dataclasses
from collections.abc import Sequence

from pasta_jax.data.examples import program_of
from pasta_jax.lang.program import Program, Promise, Sync, Text, reading_order


@dataclasses.dataclass(frozen=True)
class Context:
  """A piece of text, and what its writer can see."""

  seen: str  # the response so far; parts that others write stand in it as ⟦topic⟧
  text: str
  topic: str | None  # of a chunk; None for what a thread writes itself
  waiting: tuple[str, ...]  # topics of parts that are written at the same time
  at: int  # number of chunks that the program promises before this one, or before this text
  offset: int  # of the text in the response


def contexts(row: dict) -> list[Context]:
  """Of each chunk, and of each text that a thread writes while chunks of its own are unseen, in reading
  order."""
  found: list[Context] = []
  _walk(program_of(row), "", (), 0, found, [0])
  return found


def _walk(
  nodes: Program, seen: str, around: Sequence[str], offset: int, found: list[Context], count: list[int]
) -> int:
  """Follows a thread that begins with `seen`; `around`: what its promising threads wait for. Returns the
  offset behind it."""
  waiting: list[tuple[str, str, str]] = []  # mark in `seen`, topic, text
  for node in nodes:
    topics = (*around, *(topic for _, topic, _ in waiting))
    if isinstance(node, Text):
      if waiting and node.text.strip():
        found.append(Context(_clean(seen), node.text, None, topics, count[0], offset))
      seen += node.text
      offset += len(node.text)
    elif isinstance(node, Sync):
      for mark, _, text in waiting:
        seen = seen.replace(mark, text)
      waiting = []
    elif isinstance(node, Promise):
      text, mark = reading_order(node.body), f"\0{count[0]}\0⟦{node.topic}⟧"
      found.append(Context(_clean(seen), text, node.topic, topics, count[0], offset))
      count[0] += 1
      offset = _walk(node.body, seen, topics, offset, found, count)
      seen += mark
      waiting.append((mark, node.topic, text))
  return offset


def _clean(seen: str) -> str:
  """Without what tells marks of one topic apart."""
  parts = seen.split("\0")
  return "".join(part for i, part in enumerate(parts) if i % 2 == 0)
