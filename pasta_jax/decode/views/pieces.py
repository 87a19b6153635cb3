"""What the threads of a response contain, for all views: texts, promises and syncs in order, joins, colours."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Literal

from pasta_jax.decode.trace import ThreadTrace, Trace
from pasta_jax.lang.joins import Unjoined
from pasta_jax.lang.vocabulary import Vocabulary

N_HUES = 10  # colours, used in turn

# Control characters except newline and tab, and non-characters: XML forbids most of them.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def drawable(text: str) -> str:
  """The text without the characters that XML forbids; a terminal needs more (`utils.text.printable`)."""
  return _UNSAFE.sub("", text)


def hue(number: int) -> int:
  """The colour of a chunk, in [0, N_HUES), the same in every view. `number` is its thread's number, from
  1."""
  return (number - 1) % N_HUES


@dataclasses.dataclass(frozen=True)
class Piece:
  """A part of a thread, as a reader of this thread alone sees it."""

  kind: Literal["text", "promise", "sync"]
  text: str  # of a promise: its topic; "" in the form `head`, where the text before it says it
  child: int | None = None  # thread that keeps the promise; None: cut off, refused, or not read back
  declared: int | None = None  # number of a promise
  closed: bool = True  # False for a promise that is still being written


def pieces(trace: Trace, number: int, vocabulary: Vocabulary) -> list[Piece]:
  """Thread `number` in order: text, promises, syncs. Ill-formed tags are left out."""
  tokens = [int(t) for t in trace.threads[number].tokens]
  reading = trace.readings[number]
  children = {c.fork_index: c for c in trace.threads if c.parent == number}
  out: list[Piece] = []
  text: list[int] = []
  topic: list[int] | None = None  # of the promise that is being written

  def flush():
    if text:
      out.append(Piece("text", vocabulary.text(text)))
      text.clear()

  for i, token in enumerate(tokens):
    if reading.is_text[i]:
      text.append(token)
    elif reading.is_topic[i] and topic is not None:
      topic.append(token)
    elif token == vocabulary.tags.open and topic is None:
      topic = []
    elif i in reading.declared:
      flush()
      child = children.get(i)
      out.append(
        Piece(
          "promise",
          vocabulary.text(topic or []).strip(),
          child.number if child else None,
          reading.declared[i],
        )
      )
      topic = None
    elif token == vocabulary.tags.sync:
      flush()
      out.append(Piece("sync", ""))
      topic = None
    elif token == vocabulary.tags.end or token in vocabulary.tags.eos:
      topic = None
  flush()
  if topic is not None:
    out.append(Piece("promise", vocabulary.text(topic).strip(), closed=False))
  return out


def joins(trace: Trace, vocabulary: Vocabulary) -> dict[int, tuple[int, int]]:
  """For each chunk that a sync joins: (number of the thread that wrote the sync, the sync's own index).

  Chunks that are left to the end of the response are absent. In a trace that still grows the sync may yet
  wait for them.
  """
  joined: dict[int, tuple[int, int]] = {}

  def visit(thread: ThreadTrace) -> list[int]:
    children = {c.fork_index: c for c in trace.threads if c.parent == thread.number}
    unjoined: Unjoined[int] = Unjoined()
    for i, token in enumerate(thread.tokens):
      if token == vocabulary.tags.sync:
        joined.update((chunk, (thread.number, i)) for chunk in unjoined.sync())
      if i in children:
        unjoined.promise(children[i].number, visit(children[i]))
    return unjoined.chunks

  if trace.threads:
    visit(trace.threads[0])
  return joined


def by_tree(trace: Trace) -> Iterator[ThreadTrace]:
  """The threads, each chunk after the thread that promised it."""

  def below(parent: int) -> Iterator[ThreadTrace]:
    for child in trace.threads:
      if child.parent == parent:
        yield child
        yield from below(child.number)

  yield from below(-1)
