"""Many requests at once: the interpreter's step with a request axis in front, finished requests replaced from
a queue.

The loop is written by hand around a vmap of `step`, not by vmapping the loop: that would select the whole
state, pools included, at every step. A finished request's step writes nothing that counts. What a request
gets does not depend on the others beside it (bit for bit up to the rounding of wider matrix products).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pasta_jax.decode.interpreter import DecodeError, Interpreter, padded_length, specialise
from pasta_jax.decode.sampling import Sampling, as_arrays
from pasta_jax.decode.settings import SamplingConfig
from pasta_jax.decode.state import STOP, UNFINISHED, State, reseed
from pasta_jax.decode.step import step
from pasta_jax.decode.trace import Trace, read_trace


def pool_groups(needs: Sequence[int], places: int) -> list[tuple[int, list[int]]]:
  """(pool entries, indices of the requests that run together in pools of that size), smallest pools first.

  Attention costs a request the whole pool, so requests run with those that need one of the same size. Fewer
  than `places` would leave places empty for as long as the longest of them takes, and each size compiles its
  own programs: they join those of the next size, unless that is more than twice what they need.
  """
  sizes: dict[int, list[int]] = {}
  for i, need in enumerate(needs):
    sizes.setdefault(need, []).append(i)
  groups: list[tuple[int, list[int]]] = []
  least = 0  # that a member of the last group needs
  for size in sorted(sizes):
    if groups and len(groups[-1][1]) < places and size <= 2 * least:
      groups[-1] = (size, groups[-1][1] + sizes[size])
    else:
      groups.append((size, sizes[size]))
      least = size
  return groups


class Scheduler:
  """Decodes lists of prompts, `batch_size` at a time, each with up to `branch_width` branches a step."""

  def __init__(self, interpreter: Interpreter, *, batch_size: int, branch_width: int):
    if batch_size < 1 or branch_width < 1:
      raise DecodeError(f"batch_size and branch_width must be 1 or more, not {batch_size} and {branch_width}")
    self.interpreter, self.batch_size, self.branch_width = interpreter, batch_size, branch_width
    self._insert = jax.jit(
      lambda all_, one, r: jax.tree.map(lambda a, o: a.at[r].set(o), all_, one), donate_argnums=0
    )
    self._choose = jax.jit(lambda states, which: jax.tree.map(lambda x: x[which], states))
    self._segment = jax.jit(self._segment_pure, static_argnames=("features",), donate_argnums=(1,))
    self._reseed = jax.jit(reseed)

  def _segment_pure(self, params: Any, states: State, sampling: Sampling, enough: jax.Array, *, features):
    """Runs until `enough` of the requests have ended."""
    model = nnx.merge(self.interpreter.graph, params)
    one = partial(step, width=self.branch_width, limits=self.interpreter.limits, features=features)
    many = jax.vmap(lambda state: one(model, state, self.interpreter.tables, sampling))
    states = jax.lax.while_loop(lambda s: (s.finish != UNFINISHED).sum() < enough, many, states)
    return states, states.finish

  def _sizes(self) -> list[int]:
    """How many requests run at once: all places, and halves of them while a queue runs dry."""
    sizes = [self.batch_size]
    while sizes[-1] > 2:
      sizes.append(-(-sizes[-1] // 2))
    return sizes

  def _capacity(self, prompt_length: int) -> int:
    """Pool entries that a prompt and its response may take, rounded up: prompts of one capacity run together.

    Raises DecodeError if the pool cannot hold them.
    """
    it = self.interpreter
    need = max(prompt_length + it.limits.max_new_tokens + self.branch_width, padded_length(prompt_length))
    if need > it.limits.kv_buckets[-1] + self.branch_width:
      raise DecodeError(
        f"a prompt and its response may take {need} pool entries, decode.kv_capacity is {it.limits.kv_buckets[-1]}"
      )
    step = max(
      128, 1 << (need - 1).bit_length() - 2
    )  # a quarter of the next power of two: five sizes an octave
    return -(-need // step) * step

  def run(
    self,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    seeds: Sequence[int] | None = None,
    done: Callable[[int, Trace], None] | None = None,
    one_pool_size: bool = False,
  ) -> list[Trace]:
    """The prompts' traces, in their order; `done(i, trace)` is called as each one ends.

    Request i draws from seed `seeds[i]`, else from `sampling.seed`; the same prompt several times in a row,
    as when several samples are drawn, is read once. With `one_pool_size` all get the largest pool that one of
    them needs. Raises DecodeError if prompt and limits together exceed the largest pool.
    """
    longest = max(map(len, prompts), default=0)
    needs = [self._capacity(longest if one_pool_size else len(prompt)) for prompt in prompts]
    traces: dict[int, Trace] = {}
    for capacity, members in pool_groups(needs, self.batch_size):
      start = self._starter(prompts, [sampling.seed] * len(prompts) if seeds is None else seeds, capacity)
      self._run_group(members, start, sampling, traces, done)
    return [traces[i] for i in range(len(prompts))]

  def _starter(
    self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], capacity: int
  ) -> Callable[[int], State]:
    """The state behind the prefill of prompt i. The last prefill is kept, for those behind it with the same
    prompt."""
    kept: dict[tuple[int, ...], State] = {}

    def start(i: int) -> State:
      prompt = tuple(prompts[i])
      if prompt not in kept:
        kept.clear()
        kept[prompt] = self.interpreter.start(prompt, seeds[i], capacity=capacity)
        return kept[prompt]
      return self._reseed(kept[prompt], np.uint32(seeds[i] & 0xFFFFFFFF))

    return start

  def _run_group(
    self,
    queue: list[int],
    start: Callable[[int], State],
    sampling: SamplingConfig,
    traces: dict[int, Trace],
    done: Callable[[int, Trace], None] | None,
  ) -> None:
    """Runs the requests of `queue`, whose pools have one size, and puts their traces into `traces`."""
    it = self.interpreter
    features, numbers = specialise(it.features, sampling), as_arrays(sampling)
    size = min(s for s in self._sizes() if s >= min(len(queue), self.batch_size))
    slots = [queue[r] if r < len(queue) else -1 for r in range(size)]
    queue = queue[size:]
    started = [start(i) for i in slots if i >= 0]
    states = jax.tree.map(lambda *x: jnp.stack(x), *started, *[started[0]] * (size - len(started)))
    idle = jnp.asarray([i < 0 for i in slots])
    states = states._replace(finish=jnp.where(idle, STOP, states.finish))
    while any(i >= 0 for i in slots):
      ended = sum(i < 0 for i in slots)
      smaller = max((s for s in self._sizes() if s < len(slots)), default=0)
      # While others wait, a place that becomes free is taken at once; behind that, half of them free is
      # enough.
      enough = ended + 1 if queue else len(slots) - smaller
      states, finish = self._segment(it.params, states, numbers, np.int32(enough), features=features)
      for r, f in enumerate(np.asarray(finish)):
        if f == UNFINISHED or slots[r] < 0:
          continue
        trace = read_trace(
          jax.tree.map(lambda x, r=r: x[r], states._replace(pool=None)), it.vocabulary, features.rule
        )
        traces[slots[r]] = trace
        if done:
          done(slots[r], trace)
        slots[r] = queue.pop(0) if queue else -1
        if slots[r] >= 0:
          states = self._insert(states, start(slots[r]), np.int32(r))
      if not queue and smaller and sum(i >= 0 for i in slots) <= smaller:
        kept = sorted(range(len(slots)), key=lambda r: slots[r] < 0)[:smaller]  # those that go on come first
        states, slots = self._choose(states, np.asarray(kept)), [slots[r] for r in kept]

  def compiled(self) -> int:
    """How many programs have been compiled so far."""
    return sum(f._cache_size() for f in (self._insert, self._choose, self._segment, self._reseed))  # type: ignore[attr-defined]

  def precompile(self, prompt_length: int, sampling: SamplingConfig) -> None:
    """Compiles what prompts of this length need."""
    capacity = self._capacity(prompt_length)
    state = self.interpreter.start([1] * prompt_length, capacity=capacity)._replace(finish=jnp.int32(STOP))
    states = jax.tree.map(lambda x: jnp.stack([x] * self.batch_size), state)
    for size in self._sizes():
      states = self._choose(states, np.arange(size))
      states = self._insert(states, state, np.int32(0))
      states, _ = self._segment(
        self.interpreter.params,
        states,
        as_arrays(sampling),
        np.int32(0),
        features=specialise(self.interpreter.features, sampling),
      )
