"""GGUF's container: metadata and tensors of a file, or of all parts of a split model.

It is parsed here and not with `gguf.GGUFReader`, which makes several NumPy arrays for each string of a
vocabulary (2 s for 100,000 strings) and fails with arbitrary errors on a truncated file. The `gguf` package
dequantises.
"""

import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from pasta_jax.weights.arrays import WeightsError
from pasta_jax.weights.model_files import regular

# Scalar types by number. 8 is a string and 9 an array, which `_Cursor.value` reads.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")  # before a string's bytes
_MAX_NESTING, _MAX_AXES = 4, 4  # of arrays in arrays, of which no model has any; of a tensor, as in ggml
_PLAIN_TYPES: dict[GGMLQuantizationType, np.dtype[Any]] = {
  GGMLQuantizationType.F32: np.dtype("<f4"),
  GGMLQuantizationType.F16: np.dtype("<f2"),
  GGMLQuantizationType.F64: np.dtype("<f8"),
}
# llama.cpp's names of the parts of a model, counted from 1.
_PART = re.compile(r"(?P<model>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


class StoredTensor(NamedTuple):
  """A tensor in a file: its shape in NumPy's order (slowest axis first), its type and its bytes, still
  quantised."""

  shape: tuple[int, ...]
  kind: GGMLQuantizationType
  data: np.ndarray  # uint8, a view of the mapped file


def model_name(path: Path) -> str:
  """A file's name without its extension and, if it is a part, without its number."""
  found = _PART.fullmatch(path.name)
  return found["model"] if found else path.name.removesuffix(".gguf")


def model_in(folder: Path) -> Path | None:
  """The GGUF file in a folder, or one of the parts of the only model in it; None if there is no such file.

  Raises:
    WeightsError: the folder has several models.
  """
  models: dict[str, Path] = {}
  for path in sorted(folder.glob("*.gguf")):
    # The count stays in the key: a model that was split in two ways counts as two models.
    models.setdefault(_PART.sub(r"\g<model>-of-\g<count>", path.name), path)
  if len(models) > 1:
    raise WeightsError(
      f"{folder}: has several models; name one: {', '.join(p.name for p in models.values())}"
    )
  return next(iter(models.values()), None)


def read_container(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
  """Metadata and tensors of a model (GGUF version 2 or 3, little-endian), from one file, or from all parts if
  `path` is one of them. Only the first part has the model's metadata.

  Raises:
    WeightsError: a file is not GGUF, is truncated, is missing, or is a part of another model.
  """
  fields, tensors = _read_file(path)
  if (parts := fields.get("split.count", 1)) in (0, 1):
    return fields, tensors
  found = _PART.fullmatch(path.name)
  if not found or (count := int(found["count"])) != parts:
    raise WeightsError(
      f"{path}: one of {parts} parts, whose files must be named NAME-00001-of-{parts:05}.gguf and so on"
    )
  total = fields.get("split.tensors.count")
  fields, tensors = {}, {}
  for number in range(1, count + 1):
    part = path.with_name(f"{found['model']}-{number:05}-of-{count:05}.gguf")
    if not part.is_file():
      raise WeightsError(f"{part}: missing: part {number} of {count}")
    own, stored = _read_file(part)
    if [own.get(f"split.{key}") for key in ("no", "count", "tensors.count")] != [number - 1, count, total]:
      raise WeightsError(f"{part}: not part {number} of {count} of the model of {path.name}")
    if twice := sorted(tensors.keys() & stored.keys()):
      raise WeightsError(f"{part}: tensor {twice[0]} is also in another part")
    fields, tensors = fields or own, tensors | stored
  if len(tensors) != total:
    raise WeightsError(f"{path}: {len(tensors)} tensors in {count} parts, not {total}")
  return fields, tensors


def refuse_unreadable(path: Path, tensors: Iterable[tuple[str, StoredTensor]]) -> None:
  """Raises WeightsError for a tensor of a type that `values` cannot read, before any tensor is read."""
  known: set[GGMLQuantizationType] = set(_PLAIN_TYPES)
  for name, tensor in tensors:
    if tensor.kind not in known:
      try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[tensor.kind][1]), np.uint8), tensor.kind)  # one block
      except NotImplementedError as error:
        raise WeightsError(f"{path}: tensor {name} is {tensor.kind.name}, which cannot be read") from error
      known.add(tensor.kind)


def values(tensor: StoredTensor, rows: slice | np.ndarray) -> np.ndarray:
  """The numbers of some rows of a tensor, in its stored shape."""
  if dtype := _PLAIN_TYPES.get(tensor.kind):
    return tensor.data.view(dtype).reshape(tensor.shape)[rows]
  data = tensor.data.reshape(tensor.shape[0], -1)[rows] if len(tensor.shape) > 1 else tensor.data[None]
  # As one row: blocks never cross rows, and `dequantize` works on 16 rows at a time, however short they are.
  numbers = dequantize(data.reshape(1, -1), tensor.kind)
  return numbers.reshape(-1, *tensor.shape[1:]) if len(tensor.shape) > 1 else numbers[0][rows]


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
  """Metadata and tensors of one file."""
  try:
    # An ndarray is cheaper to slice.
    buffer = np.memmap(regular(path), dtype=np.uint8, mode="r").view(np.ndarray)
  except WeightsError:
    raise
  except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
    raise WeightsError(f"{path}: cannot be read ({error})") from error
  if bytes(buffer[:4]) != b"GGUF":
    raise WeightsError(f"{path}: not a GGUF file")
  try:
    cursor = _Cursor(buffer)
    version = cursor.scalar("I")
    if version not in (2, 3):
      raise WeightsError(f"{path}: GGUF version {version} is not supported")
    n_tensors, n_fields = cursor.scalar("Q"), cursor.scalar("Q")
    fields: dict[str, Any] = {}
    for _ in range(n_fields):
      key = cursor.string()  # a separate line: an assignment evaluates its right side first
      fields[key] = cursor.value(cursor.scalar("I"))
    infos = [cursor.tensor_info() for _ in range(n_tensors)]
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
      raise ValueError(f"an alignment of {alignment!r:.40}")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, shape, kind, offset in infos:
      end = start + offset + _size(shape, kind)
      if end > buffer.size:
        raise WeightsError(
          f"{path}: truncated: tensor {name:.80} ends at byte {end}, the file has {buffer.size}"
        )
      if name in tensors:
        raise ValueError(f"tensor {name:.80} occurs twice")
      tensors[name] = StoredTensor(shape, kind, buffer[start + offset : end])
    return fields, tensors
  except (struct.error, EOFError) as error:
    raise WeightsError(f"{path}: truncated: the file ends within its header") from error
  except WeightsError:
    raise
  except (KeyError, ValueError, ArithmeticError, TypeError) as error:
    raise WeightsError(f"{path}: damaged GGUF file ({error})") from error


class _Cursor:
  """A reading position in the header. Reading past the end raises struct.error or EOFError."""

  def __init__(self, buffer: np.ndarray):
    self.data = buffer.data
    self.at = 4  # after the magic number

  def scalar(self, code: str) -> Any:
    (value,) = struct.unpack_from("<" + code, self.data, self.at)
    self.at += struct.calcsize("<" + code)
    return value

  def string(self) -> str:
    return self.strings(1)[0]

  def strings(self, count: int) -> list[str]:
    """Vocabularies have 100,000 of them: a loop without calls."""
    data, at, read, out = self.data, self.at, _LENGTH.unpack_from, []
    for _ in range(count):
      (length,) = read(data, at)
      at += 8
      if at + length > len(data):
        raise EOFError
      out.append(str(data[at : at + length], "utf-8"))
      at += length
    self.at = at
    return out

  def value(self, kind: int, nesting: int = 0) -> Any:
    if kind == _STRING:
      return self.string()
    if kind != _ARRAY:
      return self.scalar(_SCALARS[kind])
    item, count = self.scalar("I"), self.scalar("Q")
    if nesting == _MAX_NESTING:
      raise ValueError("arrays nested too deeply")
    if item == _STRING:
      return self.strings(count)
    if item == _ARRAY:
      return [self.value(item, nesting + 1) for _ in range(count)]
    code = f"<{count}{_SCALARS[item]}"
    items = list(struct.unpack_from(code, self.data, self.at))
    self.at += struct.calcsize(code)
    return items

  def tensor_info(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    """Name, shape (slowest axis first; the file writes the fastest first), type, offset of the data."""
    name = self.string()
    if (axes := self.scalar("I")) > _MAX_AXES:
      raise ValueError(f"tensor {name:.80} has {axes} axes")
    dims = tuple(self.scalar("Q") for _ in range(axes))
    return name, dims[::-1], GGMLQuantizationType(self.scalar("I")), self.scalar("Q")


def _size(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
  """Bytes of a tensor. Raises ValueError if its rows are not a whole number of blocks."""
  block, n_bytes = GGML_QUANT_SIZES[kind]
  if not shape or shape[-1] % block:
    raise ValueError(f"a {kind.name} tensor of shape {list(shape)}")
  return int(np.prod(shape, dtype=object)) // block * n_bytes
