"""What can be chosen about decoding. Shapes and switches are compiled in; sampling numbers are not."""

import dataclasses

from pasta_jax.lang.layout import PositionRule


@dataclasses.dataclass(frozen=True)
class Limits:
  """Bounds of one response. None of the results depends on `branch_widths` or `kv_buckets`: they are shapes only."""

  max_new_tokens: int = 512  # entries written to the pool behind the prompt, over all threads
  max_threads: int = 24  # the main thread included
  max_depth: int = 2  # levels of chunks
  max_topic: int = 12  # tokens of a guarded topic
  tail: int = 0  # guarded promises are opened only while this many tokens are left for each live thread
  branch_widths: tuple[int, ...] = (1, 2, 4, 8)  # branches a step can hold; the last is the number of slots
  kv_buckets: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)  # pool entries; the last is its capacity

  def __post_init__(self):
    for name in ("max_new_tokens", "max_threads", "max_topic"):
      if getattr(self, name) < 1:
        raise ValueError(f"decode.{name} must be at least 1, not {getattr(self, name)}")
    for name in ("branch_widths", "kv_buckets"):
      value = getattr(self, name)
      if not value or list(value) != sorted(set(value)) or value[0] < 1:
        raise ValueError(f"decode.{name} must be positive and increasing, not {value}")


@dataclasses.dataclass(frozen=True)
class StepFeatures:
  """What the compiled step contains."""

  rule: PositionRule = PositionRule()
  guard: bool = True  # only well-formed tags can be written (decode.guard)
  promises: bool = True  # False: the tags are never written; ordinary decoding
  greedy: bool = True
  use_top_k_p: bool = False  # top-k or top-p is on
  use_repetition_penalty: bool = False  # the repetition penalty is on
  no_repeat: int = (
    0  # no topic or run of so many tokens of any thread's earlier rounds is written again; 0: off
  )
  return_logits: bool = False  # keep every step's logits in the trace (for tests: capacity x V floats)


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How the next token is drawn. Temperature 0 takes the likeliest."""

  temperature: float = 0.0
  top_k: int = 0  # 0: off
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  promise_bias: float = 0.0  # added to the logit of a promise's opening: more (or fewer) promises
  seed: int = 0

  def __post_init__(self):
    for name, ok, want in (
      ("temperature", self.temperature >= 0, "0 or more"),
      ("top_k", self.top_k >= 0, "0 or more"),
      ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
      ("min_p", 0 <= self.min_p < 1, "in [0, 1)"),
      ("repetition_penalty", self.repetition_penalty >= 1, "1 or more"),
    ):
      if not ok:
        raise ValueError(f"decode.{name} must be {want}, not {getattr(self, name)}")
