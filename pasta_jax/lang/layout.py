"""Who sees whom, where each token stands, and what is learned: one function for training and decoding alike.

The serialised form puts each chunk right after its promise. Visibility is PASTA.md section 3, positions are
section 4, targets are section 6.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from pasta_jax.config.sections import STRATEGIES
from pasta_jax.lang.automaton import MAX_DECLARED, TokenTable
from pasta_jax.lang.thread import Thread, serialise

NO_TARGET = -1


@dataclasses.dataclass(frozen=True)
class PositionRule:
  """How far the promising thread jumps over a chunk's positions.

  strategy   number written in a promise   gap reserved                       at a sync
  pred_10x   length, rounded up to tens    the number, rounded up to tens     –
  pred_1x    length                        the number                         –
  fixed      none                          `fixed`                            –
  oracle     none (teacher forcing only)   the true length                    –
  max        length, rounded up to tens    none                               behind the furthest joined position
  sum        length, rounded up to tens    none                               behind as many positions as tokens joined

  A promise without a number reserves `fixed` positions. Lengths above the largest number that a promise can
  say, `automaton.MAX_DECLARED`, are written as the largest that fits: the chunk outgrows its gap.
  """

  strategy: str = "pred_10x"
  fixed: int = 60

  def __post_init__(self):
    if self.strategy not in STRATEGIES:
      raise ValueError(f"position strategy {self.strategy!r} is none of {', '.join(STRATEGIES)}")

  @property
  def numbered(self) -> bool:
    """Whether promises carry `tokens="…"`."""
    return self.strategy not in ("fixed", "oracle")

  def written(self, length: int) -> int | None:
    """The number to write in the promise of a chunk that spans `length` positions."""
    if not self.numbered:
      return None
    if self.strategy == "pred_1x":
      return min(length, MAX_DECLARED)
    return min(-(-length // 10), MAX_DECLARED // 10) * 10

  def gap(self, declared, true_length=None):
    """Positions reserved for a chunk; `declared` is the promise's number, negative where it has none.

    Works on integers and on arrays of them. `true_length` is read by `oracle` alone.
    """
    if self.strategy == "oracle":
      if true_length is None:
        raise ValueError("position strategy 'oracle' needs true lengths: it is for teacher forcing only")
      return true_length
    if self.strategy in ("max", "sum"):
      return declared * 0
    if self.strategy == "fixed":
      return declared * 0 + self.fixed
    given = declared >= 0
    number = (declared + 9) // 10 * 10 if self.strategy == "pred_10x" else declared
    return number * given + self.fixed * (1 - given)

  def at_sync(self, position, furthest, joined):
    """Position of a sync: `position` if nothing were joined, `furthest` one behind the last joined token's,
    `joined` tokens joined. Works on integers and on arrays; without chunks pass furthest=0, joined=0."""
    if self.strategy == "max":
      return position + (furthest - position) * (furthest > position)
    return position + joined if self.strategy == "sum" else position


@dataclasses.dataclass(frozen=True)
class Layout:
  """A serialised response, prompt first; T tokens. Everything is int32.

  A query at q sees a key at k iff k <= q, both belong to the same row segment, and for no h
  `hidden[k, h, 0] <= q < hidden[k, h, 1]`. Column h holds the interval of the chunk at nesting level h + 1
  that contains k; an interval [0, 0) is empty.
  """

  tokens: np.ndarray  # [T]
  positions: np.ndarray  # [T]
  masked_intervals: np.ndarray  # [T, levels, 2]
  targets: np.ndarray  # [T], NO_TARGET where nothing is learned
  threads: np.ndarray  # [T] 0 for the main thread, chunks numbered in order of their promises
  index: np.ndarray  # [T] index in the thread's own tokens; prompt tokens are negative

  def __len__(self) -> int:
    return len(self.tokens)


def is_visible(q, k, intervals_k):
  """Section 3's rule for query indices `q` and key indices `k` of one example; broadcasts.

  `intervals_k` is [..., levels, 2] for the keys, its leading axes broadcasting with q and k. Serves NumPy and
  JAX.
  """
  return outside(
    q, k, [(intervals_k[..., level, 0], intervals_k[..., level, 1]) for level in range(intervals_k.shape[-2])]
  )


def outside(q, k, intervals):
  """The same with the keys' intervals as pairs (start, stop)."""
  seen = k <= q
  for start, stop in intervals:
    seen = seen & ~((start <= q) & (q < stop))
  return seen


class _Walk:
  """Assigns positions and hidden intervals in one pass over the serialised order."""

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

  def thread(self, thread: Thread, start: int, level: int, before: int | None) -> tuple[int, list["_Open"]]:
    """Lays out one thread from position `start`; `before` is the index whose target is its first token.

    Returns the position behind its last token, and its chunks that no sync of its own joined.
    """
    name, self.n_threads = self.n_threads, self.n_threads + 1
    forks = {f.at: f for f in thread.forks}
    position = start
    waiting: list[_Open] = []
    for i, token in enumerate(thread.tokens):
      if token == self.sync:
        position = self.rule.at_sync(
          position, max((w.furthest for w in waiting), default=0), sum(w.own for w in waiting)
        )
        self._join(waiting, self.at)
        waiting = []
      at, self.at = self.at, self.at + 1
      self.positions[at], self.threads[at], self.index[at] = position, name, i
      if before is not None:
        self.targets[before] = token
      before, position = at, position + 1
      if i in forks:
        fork = forks[i]
        opened = self.at
        behind, orphans = self.thread(fork.child, position, level + 1, None)
        waiting.append(_Open(opened, self.at, level, behind, len(fork.child.tokens)))
        waiting += orphans
        declared = -1 if fork.declared is None else fork.declared
        position += int(self.rule.gap(declared, behind - position))
    return position, waiting

  def _join(self, chunks: list["_Open"], at: int):
    for c in chunks:
      self.masked_intervals[c.start : c.stop, c.level] = (c.stop, at)


@dataclasses.dataclass(frozen=True)
class _Open:
  """A chunk that waits to be joined."""

  start: int  # serialised index of its <async>
  stop: int  # one behind its last token, chunks below it included
  level: int
  furthest: int  # one behind the last position of its own tokens
  own: int  # tokens of its own thread


def layout(thread: Thread, rule: PositionRule, table: TokenTable, prompt: Sequence[int] = ()) -> Layout:
  """Lays out a prompt and the response that `thread` is the main thread of."""
  prompt = list(prompt)
  walk_ = _Walk(rule, table.tags.sync, len(prompt), thread.total_tokens, thread.depth)
  _, waiting = walk_.thread(thread, len(prompt), 0, len(prompt) - 1 if prompt else None)
  walk_._join(waiting, walk_.end)
  own = [t.tokens[i] for t, i in serialise(thread)]
  tokens = np.asarray([*prompt, *own], np.int32)
  return Layout(tokens, walk_.positions, walk_.masked_intervals, walk_.targets, walk_.threads, walk_.index)


def span(chunk: Thread, rule: PositionRule) -> int:
  """Positions that a chunk takes: its own tokens with both tags, and the gaps that it reserves itself."""
  gaps = 0
  for fork in chunk.forks:
    declared = -1 if fork.declared is None else fork.declared
    gaps += int(rule.gap(declared, span(fork.child, rule)))
  return len(chunk.tokens) + gaps
