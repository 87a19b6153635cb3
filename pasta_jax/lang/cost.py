"""What a response costs on a machine with a branch for every thread: its longest sequential path.

A token's clock is the decode step that writes it, the first response token's being 1. A chunk's `<async>` is
written in the step after its promise's last token, beside the promising thread's next token. A sync waits
until the chunks that it joins have been read back to their `</async>`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from pasta_jax.lang.automaton import TokenTable
from pasta_jax.lang.joins import Unjoined
from pasta_jax.lang.thread import Reading, Thread, read_all


def clocks(thread: Thread, sync: int, start: int = 1) -> tuple[list[np.ndarray], list[int]]:
  """Clock of every own token, for each thread in `walk` order.

  Also returns, for the chunks that the thread leaves unjoined, the clock of their last token.
  """
  forks = {f.at: f for f in thread.forks}
  own = np.zeros(len(thread.tokens), np.int32)
  below: list[np.ndarray] = []
  unjoined: Unjoined[int] = Unjoined()
  clock = start
  for i, token in enumerate(thread.tokens):
    if token == sync and i + 1 < len(thread.tokens):  # one that was cut off was written, but not read back
      # A chunk's last token, written at step w, is in the pool after step w + 1; the sync is read back then.
      clock = max(clock, *(w + 1 for w in unjoined.sync()), 0)
    own[i] = clock
    clock += 1
    if i in forks:
      child, left = clocks(forks[i].child, sync, clock)
      below += child
      unjoined.promise(int(child[0][-1]) if len(child[0]) else clock, left)
  return [own, *below], unjoined.chunks


@dataclasses.dataclass(frozen=True)
class Cost:
  """Figures of one response."""

  text_tokens: int  # tokens that the reader sees, with the one that ends the response
  total_tokens: int  # tags, topics and numbers too
  longest_path: int  # decode steps with unlimited branches
  n_promises: int
  peak_parallelism: int  # threads that write in the same step, at most

  @property
  def theoretical_parallelism(self) -> float:
    """Steps of writing the same text one token at a time, over the longest sequential path."""
    return self.text_tokens / max(self.longest_path, 1)


def cost(main: Thread, table: TokenTable, readings: Sequence[Reading] | None = None) -> Cost:
  """Figures of a response; `readings` are its threads' (`thread.read_all`), where they are known."""
  readings = read_all(main, table) if readings is None else readings
  flat = np.concatenate(clocks(main, table.tags.sync)[0])
  finished = bool(main.tokens) and main.tokens[-1] in table.tags.eos
  return Cost(
    text_tokens=sum(int(r.is_text.sum()) for r in readings) + int(finished),
    total_tokens=main.total_tokens,
    longest_path=int(flat.max(initial=0)),
    n_promises=len(readings) - 1,
    peak_parallelism=int(np.bincount(flat).max()) if len(flat) else 0,
  )
