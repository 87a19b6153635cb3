"""The compiled programs of one model: prefill, and segments of a loop over `decode.step`.

A segment is a `lax.while_loop` that stays on the device until the host has something to decide. For one
request it ends when the request has finished, its steps are spent, the pool is full, or the number of
runnable branches asks for another width. For a batch, with a request axis in front of every array of the
state, it ends when enough requests have finished or its steps are spent; the loop is around a vmap of `step`,
because a vmap of the loop would select the whole state, pools included, at every step. A step of a finished
request changes nothing.

Whether to go on is looked at after every `Limits.steps_per_look` steps, which are an inner loop of known length: on
a GPU the host waits for the predicate of a loop at every look.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from pasta_jax.decode import sight
from pasta_jax.decode.attention import make_prefill_attend
from pasta_jax.decode.placement import constrain_batch, constrain_one
from pasta_jax.decode.sampling import Sampling, TokenTables
from pasta_jax.decode.settings import DecodeError, Limits, StepFeatures, padded_length
from pasta_jax.decode.state import UNFINISHED, State, grow, initial, reseed
from pasta_jax.decode.step import step
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.model.sharding import on_mesh
from pasta_jax.model.transformer import Transformer

UNBOUNDED = 1 << 30  # steps of a segment that only ends for another reason
STEERING = ("used", "runnable", "finish", "steps")  # what the host reads of a state after a segment


def capacity_of(state: State) -> int:
  """Entries of the pool."""
  return state.entries.rows.shape[-1]


@dataclasses.dataclass
class Interpreter:
  """The programs of `model`, compiled on first use for each static shape and kept as long as this object.

  `model` has the form of `weights.build.for_decoding`. `limits` and `features` are compiled in; the features
  of a request are `specialise(features, its sampling)`. The weights are read from `params` at every call. A
  state that is passed to `segment`, or a batch passed to `batch_segment` or `insert`, is donated: its buffers
  are reused for the result. On a `mesh` the weights lie by the rules of `model.sharding`, states by those of
  `decode.placement`.
  """

  model: Transformer
  vocabulary: Vocabulary
  limits: Limits = Limits()
  features: StepFeatures = StepFeatures()
  mesh: Mesh | None = None

  def __post_init__(self):
    rows = self.model.config.vocab_size
    if rows < self.vocabulary.size and self.features.promises:
      raise DecodeError(
        f"the model has {rows} vocabulary rows and no tags: load a PASTA adapter, or decode without promises"
      )
    if self.features.promises and self.features.rule.needs_lengths:
      raise DecodeError(
        f"positions of the strategy {self.features.rule.strategy!r} need true lengths, which nobody has while "
        "decoding: compare by validation loss (--config.train.validation=FILE), or decode with "
        "--config.decode.parallel=False"
      )
    spoken = (self.vocabulary.promise, self.vocabulary.number)
    if self.features.promises and (self.features.promise, self.features.number) != spoken:
      raise DecodeError(f"the promises of this vocabulary are of the form {'/'.join(spoken)}")
    self.tables = TokenTables.build(self.vocabulary, rows)
    self.graph, self.params = nnx.split(self.model)
    shape = ("width", "features", "look")
    insert = lambda batch, one, row: jax.tree.map(lambda b, x: b.at[row].set(x), batch, one)
    take = lambda batch, rows: jax.tree.map(lambda x: x[rows], batch)
    self._programs = {
      "prefill": jax.jit(self._prefill_pure, static_argnames="capacity"),
      "segment": jax.jit(self._segment_pure, static_argnames=shape, donate_argnums=1),
      "batch_segment": jax.jit(self._batch_segment_pure, static_argnames=shape, donate_argnums=1),
      "grow": jax.jit(self._grow_pure, static_argnames="capacity"),
      "insert": jax.jit(lambda *a: constrain_batch(insert(*a)), donate_argnums=0),
      "take": jax.jit(lambda *a: constrain_batch(take(*a))),
      "reseed": jax.jit(lambda *a: constrain_one(reseed(*a))),
    }
    run = {name: on_mesh(self.mesh, program) for name, program in self._programs.items()}
    self._prefill, self._segment, self._batch_segment = run["prefill"], run["segment"], run["batch_segment"]
    self._grow, self._insert, self._take, self.reseed = run["grow"], run["insert"], run["take"], run["reseed"]

  @property
  def replicas(self) -> int:
    """The number of devices, or groups of them, that the requests of a batch are split over."""
    return 1 if self.mesh is None else self.mesh.shape["data"]

  def _prefill_pure(self, params: Any, prompt: jax.Array, length, seed, *, capacity: int) -> State:
    model = nnx.merge(self.graph, params)
    positions = jnp.arange(prompt.shape[0])[None]
    attend = make_prefill_attend(self.features.attention, positions, model.config, model.dtype)
    _, cached = model(prompt[None], positions, attend)
    keys, values = ([x[0].astype(model.dtype) for x in layers] for layers in zip(*cached))
    sees = sight.main_thread(self.features.live, capacity, length - 1, self.limits.max_threads)
    return constrain_one(initial(
      keys, values, prompt, length, seed, main_sight=sees, max_threads=self.limits.max_threads, capacity=capacity,
      logits=model.config.vocab_size if self.features.return_logits else 0,
      recent=max(self.features.no_repeat - 1, 0),
    ))  # fmt: skip

  def _grow_pure(self, state: State, *, capacity: int) -> State:
    more = capacity - capacity_of(state)
    return constrain_one(grow(state, capacity, sight.grown(self.features.live, state.sight, more)))

  def _step(self, params: Any, width: int, features: StepFeatures) -> Callable[[State, Sampling], State]:
    model = nnx.merge(self.graph, params)
    return lambda state, sampling: step(
      model, state, self.tables, sampling, width=width, limits=self.limits, features=features
    )

  def _segment_pure(
    self, params: Any, state: State, sampling: Sampling, steps, *, width: int, features, look: int
  ):
    advance = self._step(params, width, features)
    narrower = max((w for w in self.limits.branch_widths if w < width), default=0)
    widest = width == self.limits.branch_widths[-1]

    def goes_on(carry):
      state, left = carry
      fits = (state.runnable > narrower) & (widest | (state.runnable <= width))
      room = state.used + look * width <= capacity_of(state)
      return (state.finish == UNFINISHED) & (left >= look) & room & fits

    several = _repeat(lambda state: constrain_one(advance(state, sampling)), look)
    body = lambda carry: (several(carry[0]), carry[1] - look)
    state, _ = jax.lax.while_loop(goes_on, body, (state, steps))
    return state, {name: getattr(state, name) for name in STEERING}

  def _batch_segment_pure(
    self, params: Any, states: State, sampling: Sampling, enough, steps, *, width: int, features, look: int
  ):
    advance = jax.vmap(self._step(params, width, features))
    goes_on = lambda carry: ((carry[0].finish != UNFINISHED).sum() < enough) & (carry[1] >= look)
    several = _repeat(lambda states: constrain_batch(advance(states, sampling)), look)
    body = lambda carry: (several(carry[0]), carry[1] - look)
    states, _ = jax.lax.while_loop(goes_on, body, (states, steps))
    return states, states.finish

  def _look(self, steps: int) -> int:
    """Steps between two looks in a segment of `steps`: fewer, a power of two, where the caller wants to look sooner."""
    most = self.limits.steps_per_look
    return most if not 0 < steps < most else 1 << (steps.bit_length() - 1)

  def prefill(self, prompt: Sequence[int], seed: int = 0, capacity: int | None = None) -> State:
    """The state after the prefill of a prompt, in a pool of `capacity` entries or of the smallest bucket.
    Raises DecodeError if the prompt is empty or too long."""
    self.limits.check(prompt)
    size = min(padded_length(len(prompt)), self.limits.kv_buckets[-1])
    padded = np.zeros(size, np.int32)
    padded[: len(prompt)] = prompt
    capacity = capacity or next(c for c in self.limits.capacities if c >= size + self.limits.margin)
    numbers = np.int32(len(prompt)), np.uint32(seed & 0xFFFFFFFF)
    first = size if self.features.invariant else capacity  # its program then depends on the prompt alone
    state = self._prefill(self.params, padded, *numbers, capacity=first)
    return state if first == capacity else self._grow(state, capacity=capacity)

  def segment(self, state: State, sampling: Sampling, steps: int, *, width: int, features: StepFeatures):
    """(the state after at most `steps` steps of `width` branches, its STEERING scalars on the device). It makes no step
    unless `used + steps_per_look * width` <= the pool's capacity."""
    shape = dict(width=width, features=features, look=self._look(steps))
    return self._segment(self.params, state, sampling, np.int32(steps), **shape)

  def batch_segment(self, states: State, sampling: Sampling, enough: int, steps: int, *, width: int,
                    features: StepFeatures) -> tuple[State, jax.Array]:  # fmt: skip
    """(states, finish [R] int32) after at most `steps` steps, or until `enough` of R requests have ended.

    Every array of `states` and `sampling` has a leading axis R. The pools must hold the longest responses.
    """
    counts = (np.int32(enough), np.int32(steps))
    shape = dict(width=width, features=features, look=self._look(steps))
    return self._batch_segment(self.params, states, sampling, *counts, **shape)

  def grow(self, state: State) -> State:
    """The state with a pool of the next size."""
    capacity = next(c for c in self.limits.capacities if c > capacity_of(state))
    return self._grow(state, capacity=capacity)

  def insert(self, batch: Any, one: Any, row: int) -> Any:
    """The batch with `one`, the same pytree without the request axis, in place of row `row`."""
    return self._insert(batch, one, np.int32(row))

  def take(self, batch: Any, rows: Sequence[int]) -> Any:
    """The batch of these rows; a row may be taken more than once."""
    return self._take(batch, np.asarray(rows, np.int32))

  def trace(self, program: str, *args, **shape) -> Any:
    """`jax.stages.Traced` of a program, by its name, for shapes in place of arrays (`decode.ahead`)."""
    return on_mesh(self.mesh, self._programs[program].trace)(*args, **shape)

  def compiled(self) -> int:
    """The number of programs compiled so far."""
    return sum(f._cache_size() for f in self._programs.values())


def _repeat(function: Callable[[Any], Any], times: int) -> Callable[[Any], Any]:
  """`function` applied `times` times, in a loop of known length."""
  return function if times == 1 else lambda x: jax.lax.fori_loop(0, times, lambda _, y: function(y), x)
