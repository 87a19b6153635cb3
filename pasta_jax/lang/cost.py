"""What a program costs on a machine with a slot for every branch: its longest sequential path.

A token's clock is the decode step that writes it, the first response token's being 1. A chunk's `<async>` is
written in the step after its promise's last token, beside the promising thread's next token; a sync's own
row waits until the chunks that it joins have been read back to their `</async>`.
"""

import dataclasses

import numpy as np

from pasta_jax.lang.automaton import TokenTable
from pasta_jax.lang.thread import Thread, read, walk


def clocks(thread: Thread, sync: int, start: int = 1) -> tuple[list[np.ndarray], list[int]]:
  """Clock of every own token, for each thread in `walk` order.

  Also returns, for the thread's chunks that no sync joined, the clock of their last token.
  """
  forks = {f.at: f for f in thread.forks}
  own = np.zeros(len(thread.tokens), np.int32)
  below: list[np.ndarray] = []
  waiting: list[int] = []
  clock = start
  for i, token in enumerate(thread.tokens):
    if (
      token == sync and waiting and i + 1 < len(thread.tokens)
    ):  # cut off behind it, it was written, not read back
      # A chunk's last token, written at step w, is in the cache after step w + 1; the sync is read back then.
      clock, waiting = max(clock, *(w + 1 for w in waiting)), []
    own[i] = clock
    clock += 1
    if i in forks:
      child, orphans = clocks(forks[i].child, sync, clock)
      below += child
      waiting += [int(child[0][-1]) if len(child[0]) else clock, *orphans]
  return [own, *below], waiting


@dataclasses.dataclass(frozen=True)
class Cost:
  """Figures of one response."""

  text_tokens: int  # tokens the reader sees, with the one that ends the response
  total_tokens: int  # tags, topics and numbers too
  longest_path: int  # decode steps with unlimited branches
  n_promises: int
  peak_parallelism: int  # threads that write in the same step, at most

  @property
  def theoretical_parallelism(self) -> float:
    """The response's own text tokens over its longest sequential path."""
    return self.text_tokens / max(self.longest_path, 1)

  @property
  def tokens_per_round(self) -> float:
    """Mean number of tokens written per step of the longest path, tags included."""
    return self.total_tokens / max(self.longest_path, 1)


def cost(thread: Thread, table: TokenTable) -> Cost:
  """Figures of the response whose main thread is given."""
  all_clocks, _ = clocks(thread, table.tags.sync)
  threads = list(walk(thread))
  text = sum(int(read(t, table, is_main=t is thread).is_text.sum()) for t in threads)
  finished = bool(thread.tokens) and thread.tokens[-1] in table.tags.eos
  flat = np.concatenate(all_clocks) if all_clocks else np.zeros(0, np.int32)
  return Cost(
    text_tokens=text + int(finished),
    total_tokens=thread.total_tokens,
    longest_path=int(flat.max(initial=0)),
    n_promises=len(threads) - 1,
    peak_parallelism=int(np.bincount(flat).max(initial=0)) if len(flat) else 0,
  )
