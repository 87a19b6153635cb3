"""Files of models, opened and written: what they contain comes from strangers, and libraries parse it.

Only regular files are opened, and only those in the folder that names them. Whatever a library raises on a
damaged file is one line here.
"""

import contextlib
import errno
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors then returns)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pasta_jax.utils.json_io import parse_json, to_json
from pasta_jax.weights.arrays import WeightsError

# safetensors' types whose numbers are the weights themselves; others are quantised, with scales elsewhere.
PLAIN_TYPES = ("F64", "F32", "F16", "BF16")


@contextlib.contextmanager
def faults_of_library() -> Iterator[None]:
  """Around one call of a library on what a file contains: whatever it raises becomes a ValueError. A Rust
  library's panic is a BaseException; running out of memory, or being interrupted, is not the file's fault."""
  try:
    yield
  except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
    raise
  except BaseException as error:
    raise ValueError(str(error) or type(error).__name__) from error


def regular(path: Path) -> Path:
  """`path`, if it leads to a regular file: opening a pipe waits for ever, and a device may never end.

  Links are followed: Hugging Face's cache consists of them. Raises WeightsError otherwise.
  """
  if path.is_file():
    return path
  if path.is_dir():
    raise WeightsError(f"{path}: cannot be read (Is a directory)")
  raise WeightsError(
    f"{path}: cannot be read ({'not a file' if path.exists() else 'No such file or directory'})"
  )


def inside(folder: Path, name: str) -> Path:
  """The path of what a file of `folder` calls `name`, such as "model.safetensors".

  Raises ValueError for a name that leads out of the folder.
  """
  parts = PurePosixPath(name).parts
  if not parts or name.startswith("/") or ".." in parts or "\0" in name:
    raise ValueError(f"{name!r:.80} is not the name of a file in the same folder")
  return folder / name


def read_text(path: Path) -> str:
  """The content of a text file. Raises WeightsError if it cannot be read."""
  try:
    return regular(path).read_text(encoding="utf-8").removeprefix("\ufeff")
  except (OSError, UnicodeDecodeError) as error:
    reason = error.strerror if isinstance(error, OSError) else error
    raise WeightsError(f"{path}: cannot be read ({reason})") from error


def read_json(path: Path) -> dict[str, Any]:
  """The JSON object in a file. Raises WeightsError if the file cannot be read or has no object."""
  try:
    value = parse_json(read_text(path))
  except WeightsError:
    raise
  except ValueError as error:
    raise WeightsError(f"{path}: {error}") from error
  if not isinstance(value, dict):
    raise WeightsError(f"{path}: not a JSON object")
  return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
  """Writes indented JSON to a new file."""
  path.write_text(to_json(value, indent=2) + "\n", "utf-8")


def open_tensors(path: Path) -> Any:
  """A safetensors file, mapped: `keys`, `metadata`, `get_slice`. Raises WeightsError if it cannot be read."""
  try:
    with faults_of_library():
      return safe_open(regular(path), framework="np")
  except WeightsError:
    raise
  except ValueError as error:
    raise WeightsError(f"{path}: truncated, damaged or missing ({error})") from error


def save_tensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
  """Writes a safetensors file. Raises OSError if it cannot be written, for example on a full disk."""
  try:
    save_file(tensors, path, metadata)
  except SafetensorError as error:
    full = "no space" in str(error).lower()
    raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(path)) from error
