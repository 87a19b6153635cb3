"""Other programs that decode the same weights on this machine: transformers and llama.cpp, where they are installed.

The timers, as those of `evaluate.benchmark`, are functions that measure once and return seconds.
"""

import contextlib
import logging
import tempfile
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pasta_jax.config.sections import formats
from pasta_jax.utils.environment import cores, cpu_features, installed_version, processor
from pasta_jax.weights.checkpoint import Checkpoint
from pasta_jax.weights.download import RELEASES, named_weights
from pasta_jax.weights.hf_folder import save_hf_folder

_BATCH = 512  # tokens of a prompt that llama.cpp reads at once


def transformers_timer(
  checkpoint: Checkpoint, dtype: str, context: int, steps: int
) -> Callable[[], float] | None:
  """Seconds per token of `transformers`' eager decoding with its cache, after `context` tokens; None if it is not
  installed, or not in that dtype."""
  if formats(dtype)[1]:
    return None
  try:
    import torch
    import transformers
  except ImportError:
    return None
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "model"
    save_hf_folder(path, checkpoint.config, checkpoint.params, checkpoint.tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
  prompt = torch.ones((1, context), dtype=torch.long)

  @torch.inference_mode()
  def measure() -> float:
    out = model(prompt, use_cache=True)
    cache, token = out.past_key_values, prompt[:, :1]
    started = time.perf_counter()
    for _ in range(steps):
      out = model(token, past_key_values=cache, use_cache=True)
      cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    return (time.perf_counter() - started) / steps

  measure()
  return measure


def llama_cpp_version() -> str:
  """Of llama-cpp-python; "" if it is not installed, or its library cannot be loaded here."""
  try:
    import llama_cpp
  except (ImportError, OSError, RuntimeError):  # the last two: a library of another machine
    return ""
  return llama_cpp.__version__


def require_llama_cpp() -> None:
  """Raises ValueError, one line, if llama-cpp-python cannot be used."""
  if not llama_cpp_version():
    raise ValueError("llama.cpp is not installed: pip install llama-cpp-python")


def gguf_of(source: str) -> Path | None:
  """The GGUF file that a model is loaded from (`weights.checkpoint.load_checkpoint`); None if it is no such file."""
  if source in RELEASES:
    return named_weights(source)
  path = Path(source).expanduser()
  return path if path.suffix == ".gguf" and path.is_file() else None


def hardware() -> str:
  """What times are measured on, and the versions of the programs that are measured."""
  versions = [f"{name} {version}" for name in ("jax", "numba") if (version := installed_version(name))]
  versions += [f"llama-cpp-python {version}"] if (version := llama_cpp_version()) else []
  device = "" if jax.default_backend() == "cpu" else f"{jax.devices()[0].device_kind}, "
  features = f" ({', '.join(found)})" if (found := cpu_features()) else ""
  return f"{device}{cores()} cores of {processor()[0]}{features}; {', '.join(versions)}"


class LlamaCpp:
  """llama.cpp with the weights of a GGUF file, by its own interface, without the server's or the wrapper's work.

  `sequences` sequences share one KV cache of `context` entries, with the prompt's entries stored once, which is
  llama.cpp's fastest way for sequences with a long common prefix. All cores are used; the cache is in float16, and
  other settings are llama.cpp's own.
  """

  def __init__(self, path: Path, *, context: int, sequences: int = 1):
    """Raises ValueError, one line, if llama.cpp is not installed or cannot load the file."""
    require_llama_cpp()
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    self._lib: Any = llama_cpp
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    if not model:
      raise ValueError(f"{path}: llama.cpp cannot load this file")
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_seq_max = context, _BATCH, sequences
    settings.n_threads = settings.n_threads_batch = cores()
    settings.kv_unified = True
    self._context = llama_cpp.llama_init_from_model(model, settings)
    if not self._context:
      raise ValueError(f"{path}: llama.cpp cannot make a context of {context} entries")
    self._memory = llama_cpp.llama_get_memory(self._context)
    self._rows = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    self._batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)
    view = lambda pointer: np.ctypeslib.as_array(pointer, (_BATCH,))
    self._tokens, self._positions, self._outputs = (
      view(getattr(self._batch, name)) for name in ("token", "pos", "logits")
    )
    view(self._batch.n_seq_id)[:] = 1
    self._used = 0  # position of the next token
    weakref.finalize(self, _free, llama_cpp, self._batch, self._context, model)

  def prefill(self, prompt: Sequence[int], *, logits: bool = True) -> None:
    """Reads a prompt as the first sequence; all others are forgotten. `logits`: of its last token."""
    self._lib.llama_memory_clear(self._memory, False)
    for start in range(0, len(prompt), _BATCH):
      part = prompt[start : start + _BATCH]
      wanted = np.zeros(len(part), np.int8)
      wanted[-1] = logits and start + len(part) == len(prompt)
      self._decode(part, np.arange(start, start + len(part)), [0] * len(part), wanted)
    self._lib.llama_synchronize(self._context)
    self._used = len(prompt)

  def fork(self, sequences: int) -> None:
    """Lets the first `sequences` sequences begin with the prompt."""
    for i in range(1, sequences):
      self._lib.llama_memory_seq_cp(self._memory, 0, i, -1, -1)

  def step(self, tokens: Sequence[int]) -> None:
    """Reads one token of each of the first sequences."""
    self._decode(tokens, self._used, range(len(tokens)), 1)
    self._lib.llama_synchronize(self._context)
    self._used += 1

  def likeliest(self, sequences: int) -> list[int]:
    """The likeliest next token of each of the first sequences, after `step`."""
    logits = lambda i: np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._context, i), (self._rows,))
    return [int(logits(i).argmax()) for i in range(sequences)]

  def generate(self, prompt: Sequence[int], most: int, ends: Collection[int], penalty: float) -> list[int]:
    """The greedy answer to a prompt: at most `most` tokens, or the first of `ends` as the last one.

    `penalty` is llama.cpp's for repetition, with all tokens of the answer as its memory.
    """
    out: list[int] = []
    with self._greedy(penalty, most) as sampler:
      self.prefill(prompt)
      while True:
        out.append(self._lib.llama_sampler_sample(sampler, self._context, -1))
        if out[-1] in ends or len(out) == most:
          return out
        self.step(out[-1:])

  @contextlib.contextmanager
  def _greedy(self, penalty: float, memory: int) -> Iterator[Any]:
    """A chain of samplers: the penalty over the last `memory` tokens, then the likeliest token."""
    lib = self._lib
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    try:
      lib.llama_sampler_chain_add(
        chain, lib.llama_sampler_init_penalties(self._rows, memory, penalty, 0.0, 0.0)
      )
      lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_greedy())
      yield chain
    finally:
      lib.llama_sampler_free(chain)

  def _decode(self, tokens: Sequence[int], positions: Any, sequences: Sequence[int], outputs: Any) -> None:
    n = len(tokens)
    self._batch.n_tokens = n
    self._tokens[:n], self._positions[:n], self._outputs[:n] = tokens, positions, outputs
    for i, sequence in enumerate(sequences):
      self._batch.seq_id[i][0] = sequence
    if code := self._lib.llama_decode(self._context, self._batch):
      raise RuntimeError(
        f"llama.cpp cannot decode {n} tokens after {self._used} (code {code}): too few cache entries?"
      )


def _free(lib: Any, batch: Any, context: Any, model: Any) -> None:
  lib.llama_batch_free(batch)
  lib.llama_free(context)
  lib.llama_model_free(model)


def llama_cpp_step_timer(model: LlamaCpp, sequences: int, context: int, steps: int) -> Callable[[], float]:
  """Seconds per step of `sequences` sequences that share a prompt of `context` tokens: one token of each."""

  def measure() -> float:
    model.prefill([1] * context)
    model.fork(sequences)
    tokens = [100 + i for i in range(sequences)]
    started = time.perf_counter()
    for _ in range(steps):
      model.step(tokens)
      tokens = model.likeliest(sequences)
    return (time.perf_counter() - started) / steps

  measure()
  return measure


def llama_cpp_prefill_timer(model: LlamaCpp, length: int) -> Callable[[], float]:
  """Seconds of the prefill of a prompt of `length` tokens, without logits, as ours."""

  def measure() -> float:
    started = time.perf_counter()
    model.prefill([1] * length, logits=False)
    return time.perf_counter() - started

  measure()
  return measure
