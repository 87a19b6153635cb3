"""What every weight reader shares: the error, the list of parameters, and one checked way to read them.

A reader (`gguf_file.py`, `hf_folder.py`) says how its file names each parameter and hands over what the file
holds; `collect` compares that with the architecture before a single number is converted, so a damaged or
foreign file is refused in one line instead of failing somewhere inside the model. The numbers are read when
they are asked for, straight into the type and the place where they are wanted: a model is in memory once.
"""

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from pasta_jax.model.config import ModelConfig


class WeightsError(ValueError):
  """Weights or tokenizer that cannot be used. The message is one line that names the file and the fault."""


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Name → shape of every parameter of a decoder. Kernels are [in, out]; letters as in `ModelConfig`."""
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
  """Our parameter name in the words of a file format.

  `table` maps the part after "layers.{i}." (or the whole name, outside the layers) to the file's word;
  `layer_prefix` is what the file writes before a layer's number, such as "blk.".
  """
  if name.startswith("layers."):
    _, index, rest = name.split(".", 2)
    return f"{layer_prefix}{index}.{table[rest]}"
  return table[name]


_BLOCK = 1 << 22  # numbers that are converted at a time


class StoredParams(Mapping[str, np.ndarray]):
  """Parameters in a file, named and shaped as in `param_shapes`: each is read when it is asked for,
  float32."""

  def __init__(
    self,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str, slice], np.ndarray],
    label: str,
    progress: bool,
  ):
    """`read`: (our name, rows) → these rows of the tensor as stored (kernels [out, in]), any float type."""
    self._shapes, self._read = shapes, read
    self.label, self.progress = label, progress  # for whoever reads them all

  def __iter__(self) -> Iterator[str]:
    return iter(self._shapes)

  def __len__(self) -> int:
    return len(self._shapes)

  def __getitem__(self, name: str) -> np.ndarray:
    out = np.empty(self._shapes[name], np.float32)
    self.read_into(name, out)
    return out

  def read_into(self, name: str, out: np.ndarray) -> None:
    """Fills `out`, of the parameter's shape and any float type, a block of rows at a time."""
    stored = out.T if name.endswith(".kernel") else out
    step = max(1, _BLOCK // max(stored[0].size, 1))
    for start in range(0, len(stored), step):
      rows = slice(start, min(start + step, len(stored)))
      stored[rows] = self._read(name, rows)


def read_into(params: Mapping[str, Any], name: str, out: np.ndarray) -> None:
  """Fills `out` with a parameter, without another copy of it where `params` can do that."""
  if hasattr(params, "read_into"):
    params.read_into(name, out)
  else:
    out[...] = np.asarray(params[name])


@contextlib.contextmanager
def reading(params: Mapping[str, Any]) -> Iterator[Callable[[], None]]:
  """A bar on stderr while all parameters are read from a file, if that is a terminal; call it once for
  each."""
  if not getattr(params, "progress", False) or not sys.stderr.isatty():
    yield lambda: None
    return
  with Progress(console=stderr_console(), transient=True) as bar:
    task = bar.add_task(getattr(params, "label", ""), total=len(params))
    yield lambda: bar.advance(task)


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
  """An array that XLA's CPU backend takes over without copying it: its memory begins at a multiple of 64
  bytes."""
  dtype = np.dtype(dtype)
  size = math.prod(shape) * dtype.itemsize
  memory = np.empty(size + 64, np.uint8)
  start = -memory.ctypes.data % 64
  return memory[start : start + size].view(dtype).reshape(shape)


def collect(
  config: ModelConfig,
  where: Path,
  source_name: Callable[[str], str],
  stored: Mapping[str, tuple[int, ...]],
  read: Callable[[str, str, slice], np.ndarray],
  progress: bool,
) -> StoredParams:
  """All parameters in the shapes of `param_shapes`, to be read from the file when they are asked for.

  Args:
    where: file or folder, for messages.
    source_name: our name → the file's name.
    stored: the file's name → shape as stored. Kernels are stored [out, in], as PyTorch keeps them.
    read: (our name, the file's name, rows) → these rows of the tensor as stored, any float type.
    progress: show a bar on stderr while all are read, if that is a terminal.

  Raises:
    WeightsError: a tensor is missing, unknown, or of another shape than the architecture asks for.
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
  """Progress goes to stderr, so that stdout carries results only."""
  return Console(stderr=True)


def read_text(path: Path) -> str:
  """A text file beside the weights. Raises WeightsError if it cannot be read."""
  try:
    return path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    reason = error.strerror if isinstance(error, OSError) else error
    raise WeightsError(f"{path}: cannot be read ({reason})") from error


def read_json(path: Path) -> dict[str, Any]:
  """A JSON object beside the weights. Raises WeightsError if the file cannot be read or holds no object."""
  try:
    value = json.loads(read_text(path))
  except json.JSONDecodeError as error:
    raise WeightsError(f"{path}: not JSON ({error})") from error
  if not isinstance(value, dict):
    raise WeightsError(f"{path}: not a JSON object")
  return value


def _as_stored(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  return shape[::-1] if name.endswith(".kernel") else shape
