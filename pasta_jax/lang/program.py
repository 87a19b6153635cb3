"""The tree of a PASTA-LANG program: text, promises with their chunks, and syncs."""

import dataclasses
from collections.abc import Iterable, Iterator


@dataclasses.dataclass(frozen=True)
class Text:
  """Plain text of a thread."""

  text: str


@dataclasses.dataclass(frozen=True)
class Sync:
  """`<sync/>`: waits for the chunks that this thread promised so far, then sees them."""


@dataclasses.dataclass(frozen=True)
class Promise:
  """`<promise topic=… tokens=…/>` and the chunk that keeps it.

  `topic` is None in the form `head`, where the text before the promise says what it is about (`lang.head`).
  `tokens` is the declared length of the chunk with both its tags; None where no number is written (`fixed`,
  `oracle`) or it is still to be computed. `PositionRule.gap` gives the positions that it reserves.
  """

  topic: str | None
  tokens: int | None
  body: tuple["Node", ...]


Node = Text | Sync | Promise
Program = tuple[Node, ...]


def normalise(nodes: Iterable[Node]) -> Program:
  """Merges neighbouring texts and drops empty ones, in chunks too: one form for each program."""
  out: list[Node] = []
  for node in nodes:
    if isinstance(node, Promise):
      node = dataclasses.replace(node, body=normalise(node.body))
    if isinstance(node, Text):
      if not node.text:
        continue
      if out and isinstance(out[-1], Text):
        out[-1] = Text(out[-1].text + node.text)
        continue
    out.append(node)
  return tuple(out)


def reading_order(program: Iterable[Node]) -> str:
  """The text that the reader sees: each chunk in the place of its promise, no tags."""
  seen = (node for node in program if not isinstance(node, Sync))
  return "".join(node.text if isinstance(node, Text) else reading_order(node.body) for node in seen)


def promises(program: Iterable[Node]) -> Iterator[Promise]:
  """Every promise of the program, nested ones included, in reading order."""
  for node in program:
    if isinstance(node, Promise):
      yield node
      yield from promises(node.body)


def unseparated(program: Iterable[Node]) -> int:
  """Promises whose chunk meets what the reader sees before or behind it without a blank or line break."""
  spans: list[tuple[int, int]] = []  # of every chunk in the reading order

  def text_of(nodes: Iterable[Node], start: int) -> str:
    text = ""
    for node in nodes:
      if isinstance(node, Text):
        text += node.text
      elif isinstance(node, Promise):
        chunk = text_of(node.body, start + len(text))
        spans.append((start + len(text), start + len(text) + len(chunk)))
        text += chunk
    return text

  whole = text_of(program, 0)
  meets = lambda at: 0 < at < len(whole) and not (whole[at - 1].isspace() or whole[at].isspace())
  return sum(start < end and (meets(start) or meets(end)) for start, end in spans)
