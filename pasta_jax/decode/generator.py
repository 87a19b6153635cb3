"""From the text of a prompt to a response: `Model` holds weights, adapter, vocabulary and interpreters."""

import copy
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pasta_jax.config import Config, identity, with_changes
from pasta_jax.config.sections import AUTO, Decode, formats
from pasta_jax.decode.attention import check_kind
from pasta_jax.decode.interpreter import Interpreter
from pasta_jax.decode.invariant import check_mesh
from pasta_jax.decode.precision import choose
from pasta_jax.decode.record import to_record
from pasta_jax.decode.scheduler import EVERY, Scheduler, decode
from pasta_jax.decode.settings import (
  DecodeError,
  SamplingConfig,
  features_of,
  limits_of,
  narrowest,
  sampling_of,
)
from pasta_jax.decode.trace import Trace
from pasta_jax.decode.views.timeline import write_timeline
from pasta_jax.lang import forms
from pasta_jax.lang.forms import Forms
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.model.products import resolve_kernels
from pasta_jax.model.sharding import local_mesh
from pasta_jax.model.transformer import set_matmul_precision
from pasta_jax.utils.environment import (
  cache_folder,
  offer_loops_to_command_buffers,
  use_compilation_cache,
)
from pasta_jax.weights import build
from pasta_jax.weights.adapter import has_tags, own_settings, read_adapter, read_metadata, weights_of
from pasta_jax.weights.checkpoint import DEFAULT_MODEL, load_checkpoint, metadata_of

EMBEDDED = {
  name: f"smollm2_135m_{name}.safetensors"
  for name in ("pasta", "baseline", "pasta_paper", "pasta_fast", "pasta_quality", "baseline_paper", "apar")
}
EMBEDDED |= {name: f"{name}.safetensors" for name in ("gemma3_270m_pasta", "gemma3_270m_baseline")}

DEFAULT_ADAPTERS = {"smollm2-135m-instruct": "pasta", "gemma3-270m": "gemma3_270m_pasta"}  # by source

Prompt = str | Sequence[Mapping[str, str]]  # a user's text, or messages with `role` and `content`


@dataclasses.dataclass(frozen=True)
class Response:
  """One decoded prompt."""

  trace: Trace
  seconds: float  # wall clock, prefill included; compilation too, unless the programs were compiled before
  vocabulary: Vocabulary = dataclasses.field(repr=False)
  dtype: str  # of its `Model`, as the next
  kernels: str

  @property
  def text(self) -> str:
    """The response in reading order."""
    return self.trace.text

  @property
  def record(self) -> dict:
    """Text and figures, ready for JSON (`decode.record.ResponseRecord`)."""
    return to_record(self.trace, self.vocabulary, dtype=self.dtype, kernels=self.kernels).to_json()

  def timeline(self, path: str | Path) -> None:
    """Draws the response: a page for a path that ends in .html, a picture for .svg. Raises ValueError
    otherwise."""
    write_timeline(path, self.trace, self.vocabulary)


def adapter_path(name: str) -> Path | None:
  """The file of an adapter: None for "", a name in `EMBEDDED` for one of this package, otherwise a path."""
  if not name:
    return None
  if name in EMBEDDED:
    return Path(str(resources.files("pasta_jax") / "adapters" / EMBEDDED[name]))
  return Path(name).expanduser()


def source_of(config, adapter: str | Path) -> str | Path:
  """The source of the weights that an adapter belongs to: `config.model.source`, or, after full training, the
  weights beside the adapter. Raises AdapterError, one line, if the adapter cannot be read.
  """
  path = adapter_path(str(adapter))
  return (weights_of(path) if path else None) or config.model.source


def adapter_digest(name: str) -> str | None:
  """sha256 of an adapter's file; None if there is none."""
  path = adapter_path(name)
  return hashlib.sha256(path.read_bytes()).hexdigest() if path and path.is_file() else None


def metadata_with(config, adapter: str) -> dict[str, str]:
  """The metadata of an adapter and of the weights that it belongs to. Raises as `source_of` and `metadata_of`."""
  path = adapter_path(adapter)
  return metadata_of(source_of(config, adapter)) | (read_metadata(path) if path else {})


def decode_settings(config, adapter: str, *, parallel: bool) -> dict:
  """The settings of decoding that a response of an adapter depends on, with promises (`parallel`) or without: the
  fields of `config.decode`, with the adapter's own where none is given. Raises as `source_of` and `metadata_of`."""
  decode = config.decode.resolved(own_settings(metadata_with(config, adapter)))
  return {f"decode.{k}": v for k, v in identity(decode, promises=parallel).items()}


def with_speed(message: Mapping[str, str], speed: int) -> dict[str, str]:
  """A user's message with the requested speed, in the form used in training; unchanged for a negative
  speed."""
  if speed < 0:
    return dict(message)
  return {**message, "content": f"{message['content']}\n\n(speed {speed})"}


class Model:
  """A loaded model that answers prompts, in parallel or sequentially, with the same weights.

      model = pasta_jax.load(); print(model.generate("Compare trains and planes.").text)

  Made by `load`, or from the sections `model`, `positions` and `decode` of a `Config`. Raises WeightsError or
  AdapterError when something cannot be loaded; DecodeError for a prompt that cannot be decoded.
  """

  def __init__(self, config, *, adapter: str | None = None, dtype: str = ""):
    d = dataclasses.replace(config.decode, dtype=dtype or config.decode.dtype)
    if d.dtype == AUTO:
      d = dataclasses.replace(d, dtype=choose(config, "decode"))
    self.dtype = d.dtype  # never "auto"
    dtype, weights = formats(d.dtype)
    set_matmul_precision(dtype)
    self.adapter = config.model.adapter if adapter is None else adapter
    path = adapter_path(self.adapter)
    checkpoint = load_checkpoint(source_of(config, self.adapter))
    self.name = checkpoint.name
    self.has_tags = bool(checkpoint.pasta) or path is not None and has_tags(path)
    metadata = {**checkpoint.pasta, **(read_metadata(path) if path else {})}
    self.speed = d.speed if adapter is None else -1  # requested of the config's own adapter
    # The form that the adapter was trained in.
    self.forms = forms.from_metadata(metadata if self.has_tags else {}, forms.from_config(config).positions)
    checkpoint = checkpoint.speaking(self.forms)
    merge = None if path is None else read_adapter(path, checkpoint.config)
    self.vocabulary = checkpoint.vocabulary
    if d.visibility:
      self.forms = dataclasses.replace(self.forms, visibility=d.visibility)
    self._metadata = metadata
    # The speeds that the adapter was trained for.
    self.speeds: tuple[int, ...] = tuple(json.loads(metadata.get("speeds", "[]")))
    self.mesh = local_mesh(vars(config.mesh))
    check_kind(d.attention, self.mesh)
    self.kernels = resolve_kernels(
      d.kernels, d.dtype, self.mesh
    )  # of products, and of attention if that is auto
    if d.invariant and self.mesh is not None:
      check_mesh(self.mesh.shape)  # before the weights are read
    self.model = build.for_decoding(
      checkpoint.config, checkpoint.params, merge, jnp.dtype(dtype), product=self.kernels, weights=weights,
      mesh=self.mesh,
    )  # fmt: skip
    self._decode_as(d)

  def with_settings(self, decode: Decode) -> "Model":
    """This model with other settings of decoding: it shares the weights, whose `dtype` and `kernels` stay."""
    check_kind(decode.attention, self.mesh)
    other = copy.copy(self)
    if decode.visibility:
      other.forms = dataclasses.replace(self.forms, visibility=decode.visibility)
    other._decode_as(decode)
    if (other.limits, other._features, other.forms) == (self.limits, self._features, self.forms):
      other._interpreters = self._interpreters  # numbers of sampling are arguments of the same programs
    return other

  def _decode_as(self, d: Any) -> None:
    """Takes the settings of decoding over, with the adapter's own where none is given."""
    d = d.resolved(own_settings(self._metadata))
    self._narrowest = narrowest(self.model.dtype, jax.default_backend(), self.kernels)
    widest = max(d.max_branches, self._narrowest)
    widths = tuple(w for w in (1, 2, 4, 8, 16, 32, 64) if self._narrowest <= w < widest) + (widest,)
    buckets = tuple(b for b in (256, 512, 1024, 2048, 4096, 8192, 16384) if b < d.kv_capacity) + (
      d.kv_capacity,
    )
    self.limits = limits_of(d, widths, buckets, jax.default_backend())
    self.sampling = sampling_of(d)
    self._features = features_of(d, self.forms, self.kernels)
    self._batch_size, self._branch_width = d.batch_size, min(d.max_branches, 4)
    self._interpreters: dict[tuple[bool, int], Interpreter] = {}

  def interpreter(self, parallel: bool, max_new_tokens: int | None = None) -> Interpreter:
    """The interpreter that writes promises, or, without `parallel`, the one of ordinary decoding.

    `max_new_tokens` replaces the config's.
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
      # Without promises every form is ordinary decoding: one program, and records that name no form.
      form = self.forms if parallel else Forms()
      features = dataclasses.replace(
        self._features, rule=form.positions, promises=parallel, visibility=form.visibility
      )
      self._interpreters[key] = Interpreter(self.model, self.vocabulary, limits, features, self.mesh)
    return self._interpreters[key]

  def scheduler(
    self, *, parallel: bool = True, batch_size: int | None = None, branch_width: int | None = None
  ) -> Scheduler:
    """A scheduler for many requests; sizes that are not given are the settings' (`decode.batch_size`)."""
    return Scheduler(
      self.interpreter(parallel),
      batch_size=self._batch_size if batch_size is None else batch_size,
      branch_width=(branch_width or self._branch_width) if parallel else 1,
    )

  def encode(self, prompt: Prompt, speed: int = -1) -> list[int]:
    """The tokens of a user's prompt, or of a conversation (`role`, `content`) that ends with one, in the
    model's chat form. A `speed` that is not negative is requested in the prompt."""
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
    prompt: Prompt,
    *,
    parallel: bool = True,
    speed: int = -1,
    sampling: SamplingConfig | None = None,
    on_step: Callable[[Trace], None] | None = None,
    every: int = EVERY,
  ) -> Response:
    """Answers one prompt.

    `on_step` is called with the trace so far at least every `every` decode steps, and at the end. `sampling`
    replaces the settings' numbers. Without `parallel` the same weights write one token at a time.
    """
    tokens = self.encode(prompt, speed)
    interpreter = self.interpreter(parallel)
    started = time.perf_counter()
    trace = decode(interpreter, tokens, sampling or self.sampling, on_step=on_step, every=every)
    return self._response(trace, started)

  def _response(self, trace: Trace, started: float) -> Response:
    return Response(trace, time.perf_counter() - started, self.vocabulary, self.dtype, self.kernels)

  def generate_batch(
    self,
    prompts: Sequence[Prompt],
    *,
    parallel: bool = True,
    speed: int = -1,
    sampling: SamplingConfig | None = None,
    batch_size: int | None = None,
    on_finish: Callable[[int, Response], None] | None = None,
  ) -> list[Response]:
    """Answers prompts, several at once, in their order. `on_finish(i, response)` is called as each one ends.

    `Response.seconds` counts from the start of all. The responses are those of `generate` (in float32, token
    by token).
    """
    tokens = [self.encode(prompt, speed) for prompt in prompts]
    scheduler = self.scheduler(parallel=parallel, batch_size=batch_size)
    responses: dict[int, Response] = {}
    started = time.perf_counter()

    def finished(i: int, trace: Trace) -> None:
      responses[i] = self._response(trace, started)
      if on_finish:
        on_finish(i, responses[i])

    scheduler.run(tokens, sampling or self.sampling, on_finish=finished)
    return [responses[i] for i in range(len(prompts))]


def load(source: str | Path = DEFAULT_MODEL, adapter: str | None = None, **settings) -> Model:
  """The model of `pasta_jax.load`, which documents the arguments."""
  adapter = DEFAULT_ADAPTERS.get(str(source), "") if adapter is None else str(adapter)
  if settings.get("command_buffers"):
    offer_loops_to_command_buffers()
  changes = {f"decode.{name}": value for name, value in settings.items()}
  config = with_changes(Config(), {"model.source": str(source), "model.adapter": adapter, **changes})
  if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
    use_compilation_cache(cache_folder() / "compiled")
  return Model(config)
