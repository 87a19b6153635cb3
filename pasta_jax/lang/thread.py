"""The token form of a program: a tree of threads, each a sequence of its own tokens with forks."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from pasta_jax.lang import automaton
from pasta_jax.lang.automaton import TokenTable


@dataclasses.dataclass(frozen=True)
class Fork:
  """A kept promise: the child begins right after the parent's own token number `at`."""

  at: int
  declared: int | None  # the number written in the promise; None where it has none
  child: "Thread"


@dataclasses.dataclass(frozen=True)
class Thread:
  """One thread's own tokens, in order.

  A chunk's tokens begin with `<async>` and end with `</async>`; the main thread's end with the end-of-turn
  token. A thread that was cut off lacks its last one. Forks are ordered by `at`.
  """

  tokens: tuple[int, ...]
  forks: tuple[Fork, ...] = ()

  @property
  def total_tokens(self) -> int:
    """Tokens of this thread and of all below it."""
    return len(self.tokens) + sum(f.child.total_tokens for f in self.forks)

  @property
  def depth(self) -> int:
    """Levels of chunks below this thread: 0 without forks."""
    return max((1 + f.child.depth for f in self.forks), default=0)


def walk(thread: Thread) -> Iterator[Thread]:
  """The thread and all below it, parents first, in order of promises."""
  yield thread
  for fork in thread.forks:
    yield from walk(fork.child)


def serialise(thread: Thread) -> Iterator[tuple[Thread, int]]:
  """(thread, index of its own token) for every token, in serialised order: chunks right after promises."""
  at = 0
  for fork in thread.forks:
    for i in range(at, fork.at + 1):
      yield thread, i
    at = fork.at + 1
    yield from serialise(fork.child)
  for i in range(at, len(thread.tokens)):
    yield thread, i


@dataclasses.dataclass(frozen=True)
class Reading:
  """What the automaton makes of one thread's own tokens (n)."""

  is_text: np.ndarray  # [n] bool: the reader sees this token
  is_topic: np.ndarray  # [n] bool
  declared: dict[int, int | None]  # own index of a promise's last token -> its number
  # The same index -> the tokens of its topic; in the form `head`, of its thread's text since the last promise, sync
  # or <async>, where its head is (`lang.head`).
  topics: dict[int, tuple[int, ...]]
  ill_formed: int  # tags that are ill-formed in their place
  state: int  # of the automaton after the last token

  @property
  def malformed(self) -> int:
    return self.ill_formed + int(automaton.inside(self.state))  # a promise that was cut off counts


def read(thread: Thread, table: TokenTable, *, is_main: bool, numbered: bool = True) -> Reading:
  """Runs the automaton over one thread's own tokens. `numbered`: whether promises carry a number."""
  n = len(thread.tokens)
  is_text, is_topic = np.zeros(n, bool), np.zeros(n, bool)
  declared: dict[int, int | None] = {}
  topics: dict[int, tuple[int, ...]] = {}
  topic: list[int] = []
  table_of, with_head = table.automaton, table.automaton.promise == "head"
  state, number, ill = automaton.TEXT, -1, 0
  for i, token in enumerate(thread.tokens):
    c = int(table.classes[token])
    if i == 0 and not is_main and c == automaton.ASYNC:
      continue  # the interpreter writes a chunk's first tag
    action = int(table_of.action[state, c])
    ill += bool(table_of.ill_formed[state, c]) or c == (automaton.END if is_main else automaton.EOS)
    plain = c in (automaton.ORDINARY, automaton.DIGITS)
    is_text[i] = plain and not automaton.inside(state)
    is_topic[i] = plain and state == automaton.TOPIC
    if with_head and state == automaton.TEXT:
      topic = []
    if is_text[i] if with_head else is_topic[i]:
      topic.append(token)
    if state == automaton.NUMBER and c == automaton.DIGITS:
      number = automaton.append_digits(number, int(table.value[token]), int(table.scale[token]))
    if c == automaton.LENGTH:
      number = int(table.value[token])
    if action == automaton.FORK:
      declared[i], topics[i] = None if number < 0 else min(number, automaton.MAX_DECLARED), tuple(topic)
      ill += int(numbered and (number < 0 or number > automaton.MAX_DECLARED))
    if c == automaton.OPEN and not automaton.inside(state):
      number, topic = -1, topic if with_head else []
    state = int(table_of.next_state[state, c])
  return Reading(is_text, is_topic, declared, topics, ill, state)


def read_all(
  top: Thread, table: TokenTable, *, is_main: bool = True, numbered: bool = True
) -> tuple[Reading, ...]:
  """`read` of a whole response, or of a chunk and all below it, in the order of `walk`."""
  return tuple(read(t, table, is_main=is_main and t is top, numbered=numbered) for t in walk(top))
