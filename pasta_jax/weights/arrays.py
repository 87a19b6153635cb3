"""What all weight readers share: the error, the list of parameters, and one checked way to read them.

A reader (`gguf_file`, `hf_folder`) gives the file's name of each parameter and the tensors in the file.
`collect` compares these with the architecture before any number is converted, so that a damaged or foreign
file is refused in one line instead of failing inside the model. Arrays are lazy: each is read on access,
directly into the dtype and the memory where it is needed, so that a model is in memory only once.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from pasta_jax.model.config import ModelConfig


class WeightsError(ValueError):
  """Weights or a tokenizer cannot be used. The message is one line that names the file and the reason."""


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Name → shape of every parameter of a model. Kernels are [in, out]; letters as in `ModelConfig`."""
  d, f = config.d_model, config.d_ff
  q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
  shapes: dict[str, tuple[int, ...]] = {"embed.embedding": (config.vocab_size, d)}
  for i in range(config.n_layers):
    shapes |= {
      f"layers.{i}.attn_norm.scale": (d,),
      f"layers.{i}.attn.q.kernel": (d, q),
      f"layers.{i}.attn.k.kernel": (d, kv),
      f"layers.{i}.attn.v.kernel": (d, kv),
      f"layers.{i}.attn.o.kernel": (q, d),
      f"layers.{i}.mlp_norm.scale": (d,),
      f"layers.{i}.mlp.gate.kernel": (d, f),
      f"layers.{i}.mlp.up.kernel": (d, f),
      f"layers.{i}.mlp.down.kernel": (f, d),
    }
    if config.qkv_bias:
      shapes |= {f"layers.{i}.attn.{x}.bias": (n,) for x, n in (("q", q), ("k", kv), ("v", kv))}
    if config.post_norms:
      shapes |= {f"layers.{i}.{x}_post_norm.scale": (d,) for x in ("attn", "mlp")}
    if config.qk_norm:
      shapes |= {f"layers.{i}.attn.{x}_norm.scale": (config.head_dim,) for x in "qk"}
  shapes["final_norm.scale"] = (d,)
  if not config.tie_embeddings:
    shapes["head.kernel"] = (d, config.vocab_size)
  return shapes


def rename(name: str, table: Mapping[str, str], layer_prefix: str) -> str:
  """A file format's name of one of our parameters.

  `table` maps the part after "layers.{i}." (or the whole name, outside the layers) to the file's name;
  `layer_prefix` is the file's prefix of a layer's number, such as "blk.".
  """
  if name.startswith("layers."):
    _, index, rest = name.split(".", 2)
    return f"{layer_prefix}{index}.{table[rest]}"
  return table[name]


BLOCK = 1 << 22  # numbers converted at a time


class StoredParams(Mapping[str, np.ndarray]):
  """Parameters in a file, named and shaped as in `param_shapes`. Each is read on access, as float32."""

  def __init__(
    self,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str, slice], np.ndarray],
    label: str,
    progress: bool,
  ):
    """`read`: (our name, rows) → these rows of the tensor as stored (kernels [out, in]), in any float
    dtype."""
    self._shapes, self._read = shapes, read
    self.label, self.progress = label, progress  # for `reading`

  def __iter__(self) -> Iterator[str]:
    return iter(self._shapes)

  def __len__(self) -> int:
    return len(self._shapes)

  def __getitem__(self, name: str) -> np.ndarray:
    out = np.empty(self._shapes[name], np.float32)
    self.read_into(name, out)
    return out

  def read_into(self, name: str, out: np.ndarray) -> None:
    """Fills `out`, which has the parameter's shape and any float dtype, a block of rows at a time."""
    stored = out.T if name.endswith(".kernel") else out
    step = max(1, BLOCK // max(stored[0].size, 1))
    for start in range(0, len(stored), step):
      rows = slice(start, min(start + step, len(stored)))
      stored[rows] = self._read(name, rows)


def read_into(params: Mapping[str, Any], name: str, out: np.ndarray) -> None:
  """Fills `out` with a parameter, without a temporary copy if `params` supports that."""
  if hasattr(params, "read_into"):
    params.read_into(name, out)
  else:
    out[...] = np.asarray(params[name])


@contextlib.contextmanager
def reading(params: Mapping[str, Any]) -> Iterator[Callable[[], None]]:
  """Shows a progress bar on stderr, if that is a terminal, while all parameters are read from a file. Yields
  a function to call once per parameter."""
  if not getattr(params, "progress", False) or not sys.stderr.isatty():
    yield lambda: None
    return
  from rich.progress import Progress  # imported only where a bar is shown

  with Progress(console=stderr_console(), transient=True) as bar:
    task = bar.add_task(escape(getattr(params, "label", "")), total=len(params))
    yield lambda: bar.advance(task)


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
  """An uninitialised array that XLA's CPU backend uses without a copy: its memory starts at a multiple of 64
  bytes."""
  dtype = np.dtype(dtype)
  size = math.prod(shape) * dtype.itemsize
  memory = np.empty(size + 64, np.uint8)
  start = -memory.ctypes.data % 64
  return memory[start : start + size].view(dtype).reshape(shape)


class Arena:
  """Arrays as those of `aligned_empty`, next to each other in large blocks: for these NumPy asks the system for large
  pages, where a core finds memory with fewer lookups."""

  BLOCK = 1 << 24  # bytes: several large pages, and little to waste

  def __init__(self):
    self._free = np.empty(0, np.uint8)

  def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if len(self._free) < size:
      self._free = aligned_empty((max(size, self.BLOCK),), np.uint8)
    memory, self._free = self._free[:size], self._free[-(-size // 64) * 64 :]
    return memory.view(dtype).reshape(shape)


def collect(
  config: ModelConfig,
  where: Path,
  source_name: Callable[[str], str],
  stored: Mapping[str, tuple[int, ...]],
  read: Callable[[str, str, slice], np.ndarray],
  progress: bool,
) -> StoredParams:
  """All parameters in the shapes of `param_shapes`, which are read from the file on access.

  Args:
    where: file or folder, for messages.
    source_name: our name → the file's name.
    stored: the file's name → shape as stored. Kernels are stored [out, in], as in PyTorch.
    read: (our name, the file's name, rows) → these rows of the tensor as stored, in any float dtype.
    progress: show a bar on stderr, if that is a terminal, while all are read (`reading`).

  Raises:
    WeightsError: a tensor is missing, unknown, or of another shape than the architecture requires.
  """
  shapes = param_shapes(config)
  names = {ours: source_name(ours) for ours in shapes}
  for ours, theirs in names.items():
    if theirs not in stored:
      raise WeightsError(f"{where}: tensor {theirs} is missing")
    wanted = _as_stored(ours, shapes[ours])
    if stored[theirs] != wanted:
      raise WeightsError(f"{where}: tensor {theirs} has shape {list(stored[theirs])}, not {list(wanted)}")
  if extra := sorted(set(stored) - set(names.values())):
    more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
    raise WeightsError(f"{where}: tensor {extra[0]}{more} is not part of this architecture")

  return StoredParams(
    shapes, lambda ours, rows: read(ours, names[ours], rows), f"Reading {where.name}", progress
  )


def stderr_console() -> Console:
  """A console for progress and notes: on stderr, so that stdout has results only."""
  return Console(stderr=True)


def _as_stored(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The stored shape of a parameter: kernels are transposed."""
  return shape[::-1] if name.endswith(".kernel") else shape
