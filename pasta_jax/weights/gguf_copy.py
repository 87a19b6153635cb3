"""Writes GGUF files of a model that is one already, in another precision or with other weights."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType

from pasta_jax.utils.files import atomic_path
from pasta_jax.weights.gguf_file import as_stored, gguf_name, load_gguf

# Precisions of matrices that can be written. Arrays of one axis stay in float32, as llama.cpp needs them.
KINDS = {
  "F32": LlamaFileType.ALL_F32,
  "F16": LlamaFileType.MOSTLY_F16,
  "BF16": LlamaFileType.MOSTLY_BF16,
  "Q8_0": LlamaFileType.MOSTLY_Q8_0,
  "Q4_1": LlamaFileType.MOSTLY_Q4_1,
}
_FILE_TYPE, _ALIGNMENT, _VERSION = "general.file_type", "general.alignment", "general.quantization_version"


def gguf_file(source: Path, kind: str, folder: Path, params: Mapping[str, np.ndarray] | None = None) -> Path:
  """The path of a GGUF file with the metadata and the tokenizer of `source` and matrices of `kind`.

  The file is in `folder`, or is `source` itself, where that has the kind and its own weights are wanted: a converter
  may have kept some matrices of a file in a better one.

  Args:
    source: a GGUF file of one part.
    kind: a key of `KINDS`.
    params: other weights of the same architecture, named as in `arrays.param_shapes`; None: those of the source.

  Raises ValueError, one line, for a kind that is unknown or whose blocks do not fit, a source in parts, and parameters
  that are not the source's; WeightsError as `load_gguf`.
  """
  if kind not in KINDS:
    raise ValueError(f"GGUF files are written in {', '.join(KINDS)}, not in {kind!r}")
  config, own, _ = load_gguf(source, progress=False)
  params = own if params is None else params
  if params.keys() != own.keys():
    raise ValueError(
      f"{min(params.keys() ^ own.keys())} is a parameter of {source} or of these weights, not of both"
    )
  reader = gguf.GGUFReader(source)
  fields = {name: f for name, f in reader.fields.items() if not name.startswith("GGUF.")}
  arch = fields["general.architecture"].contents()
  if "split.count" in fields:
    raise ValueError(f"{source} is a model in parts: merge them with llama-gguf-split")
  if params is own and _FILE_TYPE in fields and fields[_FILE_TYPE].contents() == KINDS[kind]:
    return source
  ours = {gguf_name(name): name for name in params}
  with atomic_path(folder / f"{source.stem}-{kind}.gguf") as temporary:
    writer = gguf.GGUFWriter(temporary, arch)
    for name, field in fields.items():
      if name not in ("general.architecture", _FILE_TYPE, _ALIGNMENT, _VERSION):
        items = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], items)
    writer.add_file_type(KINDS[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor in reader.tensors:
      if name := ours.get(tensor.name, ""):
        _add(writer, tensor.name, as_stored(name, params[name], config, arch), GGMLQuantizationType[kind])
      else:  # factors of RoPE
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
  return folder / f"{source.stem}-{kind}.gguf"


def _add(writer: gguf.GGUFWriter, name: str, array: np.ndarray, kind: GGMLQuantizationType) -> None:
  """Adds a tensor, matrices in `kind`. Raises ValueError where their rows are not whole blocks."""
  array = np.ascontiguousarray(array, np.float32)
  if array.ndim == 1 or kind == GGMLQuantizationType.F32:
    writer.add_tensor(name, array)
    return
  block, _ = gguf.GGML_QUANT_SIZES[kind]
  if array.shape[-1] % block:
    raise ValueError(
      f"rows of {name} have {array.shape[-1]} numbers, no whole number of {kind.name}'s blocks of {block}"
    )
  writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
