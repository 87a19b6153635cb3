"""The settings of decoding. `Limits` and `StepFeatures` are compiled in; the numbers of `SamplingConfig` are
not.

The defaults here are neutral; users get those of `config.decode`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from pasta_jax.config.fields import check_rules
from pasta_jax.config.sections import Decode
from pasta_jax.lang.automaton import AUTOMATA, Automaton
from pasta_jax.lang.forms import Forms
from pasta_jax.lang.positions import PositionRule

PROMPT_BUCKETS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class DecodeError(ValueError):
  """A request that cannot be decoded; the message says why, in one line."""


def padded_length(prompt_length: int) -> int:
  """The length that a prompt is padded to: prompts of one padded length share compiled programs."""
  return next((b for b in PROMPT_BUCKETS if b >= prompt_length), prompt_length)


@dataclasses.dataclass(frozen=True)
class Limits:
  """Bounds of one response. No result depends on the last three, which are for speed."""

  max_new_tokens: int = 512  # pool entries written after the prompt, over all threads
  max_threads: int = 24  # the main thread included
  max_depth: int = 2  # levels of chunks
  max_topic: int = 12  # tokens of a guarded topic
  tail: int = 0  # a guarded promise is opened only while this many tokens are left for each live thread
  branch_widths: tuple[int, ...] = (1, 2, 4, 8)  # branches of a step; the last is the largest number
  kv_buckets: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)  # pool entries; the last is the capacity
  steps_per_look: int = 1  # decode steps between two looks at whether to go on, a loop of known length

  def __post_init__(self):
    check_rules(
      Decode, "decode", {n: getattr(self, n) for n in ("max_new_tokens", "max_threads", "max_topic")}
    )
    for name in ("branch_widths", "kv_buckets"):
      value = getattr(self, name)
      if not value or list(value) != sorted(set(value)) or value[0] < 1:
        raise ValueError(f"decode.{name} must be positive and increasing, not {value}")
    if self.steps_per_look < 1:
      raise ValueError(f"steps_per_look must be 1 or more, not {self.steps_per_look}")

  @property
  def capacities(self) -> tuple[int, ...]:
    """Sizes of the pool: the buckets, and one with room for the lanes of a look after the last entry."""
    last = self.kv_buckets[-1]
    return (*self.kv_buckets, last + -(-self.margin // 128) * 128)

  @property
  def margin(self) -> int:
    """Entries after the used ones that the lanes of one look may write."""
    return self.steps_per_look * self.branch_widths[-1]

  def check(self, prompt: Sequence[int]) -> None:
    """Raises DecodeError if the prompt is empty or does not fit the pool."""
    if not prompt:
      raise DecodeError("the prompt is empty")
    longest = self.kv_buckets[-1] - self.branch_widths[-1]
    if len(prompt) > longest:
      raise DecodeError(
        f"the prompt has {len(prompt)} tokens, the pool has room for {longest}: shorten it, or "
        "raise decode.kv_capacity"
      )


@dataclasses.dataclass(frozen=True)
class StepFeatures:
  """The parts that a compiled step contains."""

  rule: PositionRule = PositionRule()
  visibility: str = "promise"  # who sees whom (lang.forms)
  promise: str = "topic"  # the form of promises (lang.forms), that of the vocabulary
  number: str = "digits"  # and of their lengths
  guard: bool = True  # only well-formed tags can be written (decode.guard)
  promises: bool = True  # False: the tags are never written; ordinary decoding
  greedy: bool = True
  use_top_k_p: bool = False
  use_repetition_penalty: bool = False
  no_repeat: int = (
    0  # length of n-grams of earlier rounds that no thread may repeat, and heads, topics; 0: off
  )
  invariant: bool = False  # the same bits whatever is decoded beside a branch (`decode.invariant`)
  attention: str = "auto"  # a kind of `decode.attention`
  length: str = "likeliest"  # which one a greedy promise gets where each is a token (`sampling.length_of`)
  return_logits: bool = False  # keep every step's logits in the trace (for tests: capacity x V floats)

  @property
  def live(self) -> bool:
    return self.visibility == "live"

  @property
  def head(self) -> bool:
    return self.promise == "head"

  @property
  def automaton(self) -> Automaton:
    return AUTOMATA[self.promise, self.number]


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How the next token is drawn. Temperature 0 takes the most likely one."""

  temperature: float = 0.0
  top_k: int = 0  # 0: off
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  promise_bias: float = 0.0  # added to the logit of a promise's opening tag
  seed: int = 0

  def __post_init__(self):
    check_rules(Decode, "decode", vars(self))


def sampling_of(d: Any) -> SamplingConfig:
  """The numbers of sampling in a `config.decode` that is resolved."""
  return SamplingConfig(
    temperature=d.temperature, top_k=d.top_k, top_p=d.top_p, min_p=d.min_p, seed=d.seed,
    repetition_penalty=d.repetition_penalty, promise_bias=d.promise_bias,
  )  # fmt: skip


def limits_of(d: Any, branch_widths: tuple[int, ...], kv_buckets: tuple[int, ...], backend: str) -> Limits:
  """The bounds in a `config.decode` that is resolved."""
  return Limits(
    max_new_tokens=d.max_new_tokens, max_threads=d.max_threads, max_depth=d.max_depth, max_topic=d.max_topic,
    tail=d.max_topic + 8, branch_widths=branch_widths, kv_buckets=kv_buckets,
    steps_per_look=d.steps_per_look or (1 if backend == "cpu" else 8),  # a look costs nothing on CPU
  )  # fmt: skip


def attention_by(kind: str, kernels: str) -> str:
  """The kind of attention of a step: a value of `decode.attention`, where `auto` follows the kernels of products."""
  return kernels if kind == "auto" and kernels == "numba" else kind


def features_of(d: Any, form: Forms, kernels: str) -> StepFeatures:
  """The parts of a step with promises of this form, by a `config.decode` that is resolved, and its kernels."""
  return StepFeatures(
    rule=form.positions, visibility=form.visibility, promise=form.promise, number=form.number, guard=d.guard,
    no_repeat=d.no_repeat, length=d.length, attention=attention_by(d.attention, kernels), invariant=d.invariant,
  )  # fmt: skip


def narrowest(dtype: Any, backend: str, kernels: str) -> int:
  """Branches of the narrowest step. XLA's CPU backend multiplies one bfloat16 row more slowly than two. On
  accelerators one program of eight rows serves up to eight branches: a tile's height on TPU, and products of fewer rows
  are slow on GPU."""
  if backend == "cpu":
    return 2 if jnp.dtype(dtype) == jnp.bfloat16 and kernels == "xla" else 1
  return 8


def specialise(features: StepFeatures, sampling: SamplingConfig) -> StepFeatures:
  """The features with only those parts of sampling that these numbers need."""
  return dataclasses.replace(
    features,
    greedy=sampling.temperature == 0,
    use_top_k_p=sampling.top_k > 0 or sampling.top_p < 1,
    use_repetition_penalty=sampling.repetition_penalty != 1,
  )
