"""The interpreter: prefill, then segments of a compiled loop on the device, steered and drained by the host.

A segment is a `lax.while_loop` over `step` for one width and one pool bucket. It runs until the request is
finished, its steps are spent, the pool's bucket is full, or the number of live branches asks for another
width; then the host reads a few scalars and starts the next segment.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pasta_jax.decode.sampling import Sampling, as_arrays
from pasta_jax.decode.settings import Limits, SamplingConfig, StepFeatures
from pasta_jax.decode.state import UNFINISHED, State, grow, initial, summary
from pasta_jax.decode.step import Tables, step
from pasta_jax.decode.trace import Trace, read_trace
from pasta_jax.lang import automaton
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.model.attention import causal_mask, dense_attention, sliding_window_mask
from pasta_jax.model.transformer import Transformer

PROMPT_BUCKETS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def padded_length(prompt_length: int) -> int:
  """What a prompt is padded to: prompts of one padded length share compiled programs."""
  return next((b for b in PROMPT_BUCKETS if b >= prompt_length), prompt_length)


class DecodeError(ValueError):
  """A request that cannot be decoded; the message says why."""


def penalised_tokens(vocabulary: Vocabulary) -> np.ndarray:
  """[V] bool, True where a token is penalised for repetition: ordinary tokens with a word of four letters or
  more.

  Digits, punctuation, blanks, short function words and the tags are spared: text needs them again and again,
  and tags must not depend on what was said before.
  """
  table = vocabulary.table
  penalised = np.zeros(vocabulary.size, bool)
  for token in range(vocabulary.tokenizer.vocab_size):
    if table.classes[token] == automaton.ORDINARY:
      text = vocabulary.tokenizer.token_bytes(token).decode("utf-8", "replace").strip()
      penalised[token] = text.isalpha() and len(text) >= 4
  return penalised


def specialise(features: StepFeatures, sampling: SamplingConfig) -> StepFeatures:
  """The switches with only those parts of sampling compiled in that the numbers ask for."""
  return dataclasses.replace(
    features,
    greedy=sampling.temperature == 0,
    use_top_k_p=sampling.top_k > 0 or sampling.top_p < 1,
    use_repetition_penalty=sampling.repetition_penalty != 1,
  )


@dataclasses.dataclass
class Interpreter:
  """Decodes requests with one model. Compiled segments are kept for as long as it lives.

  `model` is in the form of `build.for_decoding`. `limits` and `features` are compiled in.
  """

  model: Transformer
  vocabulary: Vocabulary
  limits: Limits = Limits()
  features: StepFeatures = StepFeatures()

  def __post_init__(self):
    rows = self.model.config.vocab_size
    if rows < self.vocabulary.size and self.features.promises:
      raise DecodeError(
        f"the model has {rows} vocabulary rows and no tags: load a PASTA adapter, or decode without promises"
      )
    table = self.vocabulary.table
    self.tables = Tables(
      *(
        jnp.asarray(x[:rows])
        for x in (table.classes, table.value, table.scale, penalised_tokens(self.vocabulary))
      ),
      async_tag=jnp.int32(table.tags.async_),
      open_tag=jnp.int32(table.tags.open),
    )
    self.graph, self.params = nnx.split(self.model)
    self._prefill = jax.jit(self._prefill_pure, static_argnames=("capacity",))
    self._segment = jax.jit(self._segment_pure, static_argnames=("width", "features"), donate_argnums=(1,))
    self._grow = jax.jit(grow, static_argnames=("capacity",))

  # Pure functions, compiled once for each static shape.

  def _prefill_pure(
    self, params: Any, prompt: jax.Array, length: jax.Array, seed: jax.Array, *, capacity: int
  ) -> State:
    model = nnx.merge(self.graph, params)
    size = prompt.shape[0]
    positions = jnp.arange(size)[None]
    attend = dense_attention(
      causal_mask(size),
      model.dtype,
      softcap=model.config.attention_softcap,
      window_mask=sliding_window_mask(positions, positions, model.config.window),
    )
    _, cached = model(prompt[None], positions, attend)
    dtype = model.dtype
    return initial(
      [k[0].astype(dtype) for k, _ in cached],
      [v[0].astype(dtype) for _, v in cached],
      prompt,
      length,
      seed,
      max_threads=self.limits.max_threads,
      capacity=capacity,
      logits=model.config.vocab_size if self.features.return_logits else 0,
      recent=max(self.features.no_repeat - 1, 0),
    )

  def _segment_pure(
    self,
    params: Any,
    state: State,
    sampling: Sampling,
    steps: jax.Array,
    *,
    width: int,
    features: StepFeatures,
  ) -> tuple[State, dict[str, jax.Array]]:
    model = nnx.merge(self.graph, params)
    capacity = state.log.token.shape[0]
    narrower = max((w for w in self.limits.branch_widths if w < width), default=0)
    widest = width == self.limits.branch_widths[-1]

    def goes_on(carry):
      state, left = carry
      fits = (state.runnable > narrower) & (widest | (state.runnable <= width))
      return (state.finish == UNFINISHED) & (left > 0) & (state.used + width <= capacity) & fits

    def body(carry):
      state, left = carry
      return step(
        model, state, self.tables, sampling, width=width, limits=self.limits, features=features
      ), left - 1

    state, _ = jax.lax.while_loop(goes_on, body, (state, steps))
    return state, summary(state)

  # The host's side.

  def start(self, prompt: Sequence[int], seed: int = 0, capacity: int | None = None) -> State:
    """The state behind the prefill of a prompt, in the smallest bucket that holds it or in one of `capacity`.

    Raises DecodeError if the prompt is empty or too long.
    """
    if not prompt:
      raise DecodeError("the prompt is empty")
    longest = self.limits.kv_buckets[-1] - self.limits.branch_widths[-1]
    if len(prompt) > longest:
      raise DecodeError(
        f"the prompt has {len(prompt)} tokens, the pool has room for {longest}: shorten it, or "
        "raise decode.kv_capacity"
      )
    size = min(padded_length(len(prompt)), self.limits.kv_buckets[-1])
    padded = np.zeros(size, np.int32)
    padded[: len(prompt)] = prompt
    capacity = capacity or next(c for c in self._capacities() if c >= size + self.limits.branch_widths[-1])
    return self._prefill(
      self.params, padded, np.int32(len(prompt)), np.uint32(seed & 0xFFFFFFFF), capacity=capacity
    )

  def _capacities(self) -> list[int]:
    """Array lengths of the pool: the buckets, and one with room for the lanes of a step behind the last."""
    last = self.limits.kv_buckets[-1]
    return [*self.limits.kv_buckets, last + -(-self.limits.branch_widths[-1] // 128) * 128]

  def compiled(self) -> int:
    """How many programs have been compiled so far."""
    return sum(f._cache_size() for f in (self._prefill, self._segment, self._grow))

  def precompile(
    self,
    prompt_length: int,
    sampling: SamplingConfig = SamplingConfig(),
    *,
    note: Callable[[int, int], None] = lambda done, total: None,
  ) -> None:
    """Compiles everything that a prompt of this length may need, so that no timing holds a compilation.

    `note(done, total)` is told of progress.
    """
    features, numbers = specialise(self.features, sampling), as_arrays(sampling)
    state = self.start([1] * min(prompt_length, self.limits.kv_buckets[-1] - self.limits.branch_widths[-1]))
    most = prompt_length + self.limits.max_new_tokens + self.limits.branch_widths[-1]
    sizes = [c for c in self._capacities() if c >= state.log.token.shape[0]]
    sizes = [c for i, c in enumerate(sizes) if i == 0 or sizes[i - 1] < most]
    shapes = [(size, width) for size in sizes for width in self.limits.branch_widths]
    for done, (size, width) in enumerate(shapes):
      note(done, len(shapes))
      if size > state.log.token.shape[0]:
        state = self._grow(state, capacity=size)
      state, _ = self._segment(self.params, state, numbers, np.int32(0), width=width, features=features)
    note(len(shapes), len(shapes))

  def run(
    self,
    prompt: Sequence[int],
    sampling: SamplingConfig = SamplingConfig(),
    *,
    watch: Callable[[Trace], None] | None = None,
    every: int = 16,
  ) -> Trace:
    """Decodes one response.

    `watch` is called with the trace so far at least every `every` steps, and at the end.
    """
    state = self.start(prompt, sampling.seed)
    features, numbers = specialise(self.features, sampling), as_arrays(sampling)
    runnable, used, finish = 1, len(prompt) - 1, UNFINISHED
    while finish == UNFINISHED:
      width = next((w for w in self.limits.branch_widths if w >= runnable), self.limits.branch_widths[-1])
      size = state.log.token.shape[0]
      if used + width > size:
        state = self._grow(state, capacity=next(c for c in self._capacities() if c > size))
      state, scalars = self._segment(
        self.params, state, numbers, np.int32(every if watch else 1 << 30), width=width, features=features
      )
      scalars = jax.device_get(scalars)
      runnable, used, finish = (int(scalars[k]) for k in ("runnable", "used", "finish"))
      if watch:
        watch(read_trace(state, self.vocabulary, self.features.rule))
    return read_trace(state, self.vocabulary, self.features.rule)
