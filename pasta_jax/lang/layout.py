"""The serialised response: the position of each token, who sees it, and what is learned from it.

Each chunk comes right after its promise. Visibility, positions and targets are those of docs/language.md
sections 3, 4 and 6; training and every test of decoding take them from here.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from pasta_jax.lang.automaton import TokenTable
from pasta_jax.lang.cost import clocks
from pasta_jax.lang.joins import Unjoined
from pasta_jax.lang.positions import PositionRule
from pasta_jax.lang.thread import Thread, serialise, walk

NO_TARGET = -1


@dataclasses.dataclass(frozen=True)
class Layout:
  """A serialised response, prompt first; T tokens. Everything is int32.

  A query at q sees a key at k iff k <= q, both belong to the same example, and for no h
  `masked_intervals[k, h, 0] <= q < masked_intervals[k, h, 1]` (`visibility.is_visible`). Column h is the
  interval of the chunk at nesting level h + 1 that contains k; an interval [0, 0) is empty.
  """

  tokens: np.ndarray  # [T]
  positions: np.ndarray  # [T]
  masked_intervals: np.ndarray  # [T, levels, 2]
  targets: np.ndarray  # [T], NO_TARGET where nothing is learned
  threads: np.ndarray  # [T] 0 for the main thread, chunks numbered in order of their promises
  index: np.ndarray  # [T] index in the thread's own tokens; prompt tokens are negative
  # [T] round in which the token is read; a chosen token that is never read has the last one
  rounds: np.ndarray

  def __len__(self) -> int:
    return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class _Chunk:
  """A chunk that waits to be joined."""

  start: int  # serialised index of its <async>
  stop: int  # one after its last token, nested chunks included
  level: int
  furthest: int  # one after the last position of its own tokens
  own: int  # tokens of its own thread


class _Walk:
  """Assigns positions, targets and masked intervals in one pass over the serialised order."""

  def __init__(self, rule: PositionRule, sync: int, prompt: int, total: int, levels: int):
    self.rule, self.sync = rule, sync
    self.at = prompt  # next serialised index
    self.end = prompt + total
    self.positions = np.zeros(self.end, np.int32)
    self.positions[:prompt] = np.arange(prompt)
    self.masked_intervals = np.zeros((self.end, max(levels, 1), 2), np.int32)
    self.threads = np.zeros(self.end, np.int32)
    self.targets = np.full(self.end, NO_TARGET, np.int32)
    self.index = np.arange(-prompt, total, dtype=np.int32)
    self.n_threads = 0

  def thread(self, thread: Thread, start: int, level: int, before: int | None) -> tuple[int, list[_Chunk]]:
    """Lays out one thread from position `start`; `before` is the index whose target is its first token.

    Returns the position after its last token, and the chunks that it leaves unjoined.
    """
    number, self.n_threads = self.n_threads, self.n_threads + 1
    forks = {f.at: f for f in thread.forks}
    position = start
    unjoined: Unjoined[_Chunk] = Unjoined()
    for i, token in enumerate(thread.tokens):
      if token == self.sync:
        chunks = unjoined.sync()
        furthest = max((c.furthest for c in chunks), default=0)
        position = self.rule.at_sync(position, furthest, sum(c.own for c in chunks))
        self.join(chunks, self.at)
      at, self.at = self.at, self.at + 1
      self.positions[at], self.threads[at], self.index[at] = position, number, i
      if before is not None:
        self.targets[before] = token
      before, position = at, position + 1
      if i in forks:
        fork, opened = forks[i], self.at
        after, left = self.thread(fork.child, position, level + 1, None)
        unjoined.promise(_Chunk(opened, self.at, level, after, len(fork.child.tokens)), left)
        position += int(self.rule.gap(-1 if fork.declared is None else fork.declared, after - position))
    return position, unjoined.chunks

  def join(self, chunks: list[_Chunk], at: int) -> None:
    """Masks each chunk's keys from the queries between its end and the join at index `at`."""
    for c in chunks:
      self.masked_intervals[c.start : c.stop, c.level] = (c.stop, at)


def layout(thread: Thread, rule: PositionRule, table: TokenTable, prompt: Sequence[int] = ()) -> Layout:
  """Lays out a prompt and the response that `thread` is the main thread of."""
  prompt = list(prompt)
  laid = _Walk(rule, table.tags.sync, len(prompt), thread.total_tokens, thread.depth)
  _, left = laid.thread(thread, len(prompt), 0, len(prompt) - 1 if prompt else None)
  laid.join(left, laid.end)
  own = [t.tokens[i] for t, i in serialise(thread)]
  return Layout(
    tokens=np.asarray([*prompt, *own], np.int32),
    positions=laid.positions,
    masked_intervals=laid.masked_intervals,
    targets=laid.targets,
    threads=laid.threads,
    index=laid.index,
    rounds=_rounds(thread, table, laid),
  )


def _rounds(main: Thread, table: TokenTable, laid: _Walk) -> np.ndarray:
  """[T] rounds: those of the interpreter's pool. The last prompt token is read in round 1, those before it count
  down from there. A chunk that was cut off has chosen a last token that nobody reads: it gets the last round."""
  by_thread = [clock + 1 for clock in clocks(main, table.tags.sync)[0]]
  last = max((int(r.max(initial=1)) for r in by_thread), default=1)
  for number, (thread, rounds) in enumerate(zip(walk(main), by_thread)):
    if number and (not thread.tokens or thread.tokens[-1] not in (table.tags.end, *table.tags.eos)):
      rounds[-1:] = last
  out, own = laid.index + 2, laid.index >= 0  # of a prompt: its last token has index -1
  starts = np.cumsum([0, *map(len, by_thread)])
  out[own] = np.concatenate(by_thread)[starts[laid.threads[own]] + laid.index[own]]
  return out
