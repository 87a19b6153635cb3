"""From a prompt's text to a response: weights, adapter, vocabulary and interpreters behind one object."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp

from pasta_jax.decode.interpreter import DecodeError, Interpreter
from pasta_jax.decode.settings import Limits, SamplingConfig, StepFeatures
from pasta_jax.decode.trace import Trace
from pasta_jax.lang.layout import PositionRule
from pasta_jax.model.transformer import DTYPES, set_matmul_precision
from pasta_jax.weights import build
from pasta_jax.weights.adapter import read_adapter, weights_of
from pasta_jax.weights.checkpoint import load_checkpoint

EMBEDDED = {
  name: f"smollm2_135m_{name}.safetensors"
  for name in ("pasta", "pasta_fast", "pasta_quality", "baseline", "apar")
}
EMBEDDED |= {name: f"{name}.safetensors" for name in ("gemma3_270m_pasta", "gemma3_270m_baseline")}


@dataclasses.dataclass(frozen=True)
class Response:
  """One decoded prompt."""

  trace: Trace
  seconds: float  # wall clock, prefill included, compilation excluded if the shapes were warm

  @property
  def text(self) -> str:
    return self.trace.text


def adapter_path(name: str) -> Path | None:
  """The file of an adapter: "" for none, a name in `EMBEDDED` for one in this package, else a path."""
  if not name:
    return None
  if name in EMBEDDED:
    return Path(str(resources.files("pasta_jax") / "adapters" / EMBEDDED[name]))
  return Path(name).expanduser()


def source_of(config, adapter: str | Path) -> str | Path:
  """Where the weights under an adapter are: beside it, after full training; else where `config.model.source`
  says.

  Raises AdapterError, one line, if the adapter cannot be read.
  """
  path = adapter_path(str(adapter))
  return (weights_of(path) if path else None) or config.model.source


def adapter_digest(name: str) -> str | None:
  """sha256 of an adapter's file; None where there is none."""
  path = adapter_path(name)
  return hashlib.sha256(path.read_bytes()).hexdigest() if path and path.is_file() else None


def with_speed(message: Mapping[str, str], speed: int) -> dict[str, str]:
  """A user's message with the wanted speed as training and decoding write it; as it is for a negative one."""
  if speed < 0:
    return dict(message)
  return {**message, "content": f"{message['content']}\n\n(speed {speed})"}


class Model:
  """A loaded model that answers prompts, in parallel or sequentially, with the same weights.

  Made from a config's `model`, `positions` and `decode` parts (configs/smollm2_135m.py documents the fields).
  Raises WeightsError or AdapterError when something cannot be loaded; DecodeError for a prompt that cannot
  be decoded.
  """

  def __init__(self, config, *, adapter: str | None = None, dtype: str = ""):
    d = config.decode.copy_and_resolve_references()
    d.dtype = dtype or d.dtype
    if d.dtype not in DTYPES:
      raise DecodeError(f"decode.dtype must be {' or '.join(DTYPES)}, not {d.dtype!r}")
    set_matmul_precision(d.dtype)
    self.adapter = config.model.adapter if adapter is None else adapter
    path = adapter_path(self.adapter)
    checkpoint = load_checkpoint(source_of(config, self.adapter))
    metadata = checkpoint.pasta
    self.name = checkpoint.name
    self.vocabulary = checkpoint.vocabulary
    self.rule = PositionRule(config.positions.strategy, config.positions.fixed)
    merge = None if path is None else read_adapter(path, checkpoint.config)
    self.has_tags = bool(metadata) or merge is not None and merge.tags is not None
    metadata = {**metadata, **(merge.metadata if merge else {})}
    self.speed = d.speed if adapter is None else -1  # wanted of the config's own adapter
    if "positions" in metadata and self.has_tags:
      self.rule = PositionRule(**json.loads(metadata["positions"]))
    self.speeds: tuple[int, ...] = tuple(json.loads(metadata.get("speeds", "[]")))  # that it was trained for
    self.model = build.for_decoding(checkpoint.config, checkpoint.params, merge, jnp.dtype(d.dtype))
    # XLA's CPU backend multiplies one bfloat16 row slower than two, so there a step holds two at least.
    self._narrowest = 2 if d.dtype == "bfloat16" and jax.default_backend() == "cpu" else 1
    slots = max(d.max_branches, self._narrowest)
    widths = tuple(w for w in (1, 2, 4, 8, 16, 32, 64) if self._narrowest <= w < slots) + (slots,)
    buckets = tuple(b for b in (256, 512, 1024, 2048, 4096, 8192, 16384) if b < d.kv_capacity) + (
      d.kv_capacity,
    )
    self.limits = Limits(
      max_new_tokens=d.max_new_tokens,
      max_threads=d.max_threads,
      max_depth=d.max_depth,
      max_topic=d.max_topic,
      tail=d.max_topic + 8,
      branch_widths=widths,
      kv_buckets=buckets,
    )
    self.sampling = SamplingConfig(
      temperature=d.temperature,
      top_k=d.top_k,
      top_p=d.top_p,
      min_p=d.min_p,
      seed=d.seed,
      repetition_penalty=d.repetition_penalty,
      promise_bias=d.promise_bias,
    )
    self._guard, self._no_repeat = d.guard, d.no_repeat
    self._interpreters: dict[tuple[bool, int], Interpreter] = {}

  def interpreter(self, parallel: bool, max_new_tokens: int | None = None) -> Interpreter:
    """The interpreter that writes promises, or the one that never does: ordinary decoding.

    `max_new_tokens` in place of the config's.
    """
    if parallel and not self.has_tags:
      raise DecodeError(
        "this model has no PASTA tags: give --config.model.adapter, or decode with "
        "--config.decode.parallel=False"
      )
    key = (parallel, max_new_tokens or self.limits.max_new_tokens)
    if key not in self._interpreters:
      limits = dataclasses.replace(self.limits, max_new_tokens=key[1])
      if not parallel:
        limits = dataclasses.replace(limits, branch_widths=(self._narrowest,), max_threads=1)
      features = StepFeatures(rule=self.rule, guard=self._guard, promises=parallel, no_repeat=self._no_repeat)
      self._interpreters[key] = Interpreter(self.model, self.vocabulary, limits, features)
    return self._interpreters[key]

  def encode(self, prompt: str | Sequence[Mapping[str, str]], speed: int = -1) -> list[int]:
    """Tokens of a user's prompt, or of a conversation (`role`, `content`) that ends with one, in the model's
    chat form; with the wanted `speed` in it, if one is given."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if not messages[-1]["content"].strip():
      raise DecodeError("the prompt is empty")
    if speed >= 0 and speed not in self.speeds:
      known = f"it knows {', '.join(map(str, self.speeds))}" if self.speeds else "it was not trained for it"
      raise DecodeError(f"speed={speed} means nothing to the adapter {self.adapter!r}: {known}")
    messages[-1] = with_speed(messages[-1], speed)
    try:
      return self.vocabulary.tokenizer.chat_prompt(messages)
    except ValueError as error:
      raise DecodeError(f"the prompt cannot be encoded: {error}") from None

  def generate(
    self,
    prompt: str | Sequence[Mapping[str, str]],
    *,
    parallel: bool = True,
    speed: int = -1,
    sampling: SamplingConfig | None = None,
    watch: Callable[[Trace], None] | None = None,
    every: int = 16,
  ) -> Response:
    """Decodes one prompt; `watch` sees the trace grow, every `every` decode steps at least."""
    tokens = self.encode(prompt, speed)
    interpreter = self.interpreter(parallel)
    started = time.perf_counter()
    trace = interpreter.run(tokens, sampling or self.sampling, watch=watch, every=every)
    return Response(trace, time.perf_counter() - started)
