"""Reads GGUF files of the families in `families`: metadata, architecture, weights and tokenizer.

The container is parsed here, not with `gguf.GGUFReader`: that one makes a few NumPy arrays for every
string of a vocabulary (2 s for 100,000 strings), and on a truncated file fails wherever it happens to.
De-quantisation is the `gguf` package's.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from pasta_jax.model.config import ModelConfig, RopeScaling
from pasta_jax.model.families import FAMILIES, has_local_layers, local_layers
from pasta_jax.model.tokenizer import Tokenizer
from pasta_jax.model.weights import StoredParams, WeightsError, collect, rename

_NAMES = {
  "embed.embedding": "token_embd.weight",
  "attn_norm.scale": "attn_norm.weight",
  "attn.q.kernel": "attn_q.weight",
  "attn.k.kernel": "attn_k.weight",
  "attn.v.kernel": "attn_v.weight",
  "attn.q.bias": "attn_q.bias",
  "attn.k.bias": "attn_k.bias",
  "attn.v.bias": "attn_v.bias",
  "attn.q_norm.scale": "attn_q_norm.weight",
  "attn.k_norm.scale": "attn_k_norm.weight",
  "attn_post_norm.scale": "post_attention_norm.weight",
  "mlp_post_norm.scale": "post_ffw_norm.weight",
  "attn.o.kernel": "attn_output.weight",
  "mlp_norm.scale": "ffn_norm.weight",
  "mlp.gate.kernel": "ffn_gate.weight",
  "mlp.up.kernel": "ffn_up.weight",
  "mlp.down.kernel": "ffn_down.weight",
  "final_norm.scale": "output_norm.weight",
  "head.kernel": "output.weight",
}
# Architectures by the names of `families`, where these differ. Mistral's files say llama.
_FAMILY_NAMES = {"gemma3": "gemma3_text"}
# Container types by number. 8 is a string and 9 an array; both are written out by hand below.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PLAIN_TYPES: dict[GGMLQuantizationType, np.dtype[Any]] = {
  GGMLQuantizationType.F32: np.dtype("<f4"),
  GGMLQuantizationType.F16: np.dtype("<f2"),
}


class StoredTensor(NamedTuple):
  """Where one tensor lies: its shape in NumPy order (slowest axis first) and its bytes, still quantised."""

  shape: tuple[int, ...]
  kind: GGMLQuantizationType
  data: np.ndarray  # uint8, a view of the mapped file


def load_gguf(path: Path, progress: bool) -> tuple[ModelConfig, StoredParams, Tokenizer]:
  """Architecture, parameters (see `weights.param_shapes`) and tokenizer of a GGUF file.

  Raises:
    WeightsError: not GGUF, truncated, an architecture that is not known, or tensors that do not fit it.
  """
  fields, tensors = read_container(path)
  config = _config(path, fields, tensors)
  tokenizer = _tokenizer(path, fields)
  if tokenizer.vocab_size > config.vocab_size:
    raise WeightsError(f"{path}: {tokenizer.vocab_size} tokens, but only {config.vocab_size} embeddings")

  def read(ours: str, theirs: str, rows: slice) -> np.ndarray:
    tensor = tensors[theirs]
    chosen: slice | np.ndarray = rows
    if fields["general.architecture"] == "llama" and ours.endswith((".attn.q.kernel", ".attn.k.kernel")):
      every = np.arange(tensor.shape[0])[:, None]
      chosen = _unpermute(every, config.n_heads if ".q." in ours else config.n_kv_heads)[rows, 0]
    values = _values(path, theirs, tensor, chosen)
    return values - np.float32(config.norm_offset) if ours.endswith(".scale") else values  # stored as they are used

  stored = {name: tensor.shape for name, tensor in tensors.items()}
  params = collect(config, path, lambda name: rename(name, _NAMES, "blk."), stored, read, progress)
  return config, params, tokenizer


def read_container(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
  """Metadata and tensors of a GGUF file (version 2 or 3, little-endian).

  Raises:
    WeightsError: not a GGUF file, or one that ends too early.
  """
  try:
    buffer = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)  # slicing is cheaper
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
      key = cursor.string()  # on a line of its own: an assignment evaluates its right side first
      fields[key] = cursor.value(cursor.scalar("I"))
    infos = [cursor.tensor_info() for _ in range(n_tensors)]
    alignment = fields.get("general.alignment", 32)
    start = -(-cursor.at // alignment) * alignment
    return fields, {name: _locate(buffer, start, shape, kind, offset) for name, shape, kind, offset in infos}
  except (struct.error, EOFError) as error:
    raise WeightsError(f"{path}: truncated GGUF file") from error
  except WeightsError:
    raise
  except (KeyError, ValueError, ZeroDivisionError, TypeError) as error:
    raise WeightsError(f"{path}: damaged GGUF file ({error})") from error


class _Cursor:
  """A reading position in the container's header; reading past the end raises struct.error or EOFError."""

  def __init__(self, buffer: np.ndarray):
    self.data = buffer.data
    self.at = 4  # behind the magic

  def scalar(self, code: str) -> Any:
    (value,) = struct.unpack_from("<" + code, self.data, self.at)
    self.at += struct.calcsize("<" + code)
    return value

  def string(self) -> str:
    length = self.scalar("Q")
    if self.at + length > len(self.data):
      raise EOFError
    self.at += length
    return str(self.data[self.at - length : self.at], "utf-8")

  def value(self, kind: int) -> Any:
    if kind == _STRING:
      return self.string()
    if kind != _ARRAY:
      return self.scalar(_SCALARS[kind])
    item, count = self.scalar("I"), self.scalar("Q")
    if item in (_STRING, _ARRAY):
      return [self.value(item) for _ in range(count)]
    code = f"<{count}{_SCALARS[item]}"
    values = list(struct.unpack_from(code, self.data, self.at))
    self.at += struct.calcsize(code)
    return values

  def tensor_info(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    """Name, shape (slowest axis first; the file writes the fastest first), type, offset of the data."""
    name = self.string()
    dims = tuple(self.scalar("Q") for _ in range(self.scalar("I")))
    return name, dims[::-1], GGMLQuantizationType(self.scalar("I")), self.scalar("Q")


def _locate(
  buffer: np.ndarray, start: int, shape: tuple[int, ...], kind: GGMLQuantizationType, offset: int
) -> StoredTensor:
  block, n_bytes = GGML_QUANT_SIZES[kind]
  if not shape or shape[-1] % block:
    raise ValueError(f"a {kind.name} tensor of shape {list(shape)}")
  size = int(np.prod(shape, dtype=object)) // block * n_bytes
  if start + offset + size > buffer.size:
    raise EOFError
  return StoredTensor(shape, kind, buffer[start + offset : start + offset + size])


def _values(path: Path, name: str, tensor: StoredTensor, rows: slice | np.ndarray) -> np.ndarray:
  """The numbers of some of a tensor's rows, in its stored shape."""
  if dtype := _PLAIN_TYPES.get(tensor.kind):
    return tensor.data.view(dtype).reshape(tensor.shape)[rows]
  data = tensor.data.reshape(tensor.shape[0], -1)[rows] if len(tensor.shape) > 1 else tensor.data[None]
  try:
    # As one row: blocks never cross rows, and `dequantize` takes 16 rows a call however short they are.
    values = dequantize(data.reshape(1, -1), tensor.kind)
    return values.reshape(-1, *tensor.shape[1:]) if len(tensor.shape) > 1 else values[0][rows]
  except NotImplementedError as error:
    raise WeightsError(f"{path}: tensor {name} is {tensor.kind.name}, which cannot be read") from error


def _unpermute(weight: np.ndarray, n_heads: int) -> np.ndarray:
  """Rows of a query or key projection, back in Hugging Face's order.

  llama.cpp rotates neighbours (0, 1), (2, 3), …; its converter therefore interleaves the two halves of
  each head's rows. Our RoPE rotates halves (i, i + H/2), as the weights were trained.
  """
  out, d_model = weight.shape
  pairs = weight.reshape(n_heads, out // n_heads // 2, 2, d_model)
  return pairs.swapaxes(1, 2).reshape(out, d_model)


def _config(path: Path, fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> ModelConfig:
  arch = fields.get("general.architecture")
  family = _FAMILY_NAMES.get(str(arch), str(arch))
  if family not in FAMILIES:
    known = [next((a for a, f in _FAMILY_NAMES.items() if f == name), name) for name in FAMILIES if name != "mistral"]
    raise WeightsError(f"{path}: architecture {arch!r} is not supported, only {', '.join(known)}")
  if "token_embd.weight" not in tensors:
    raise WeightsError(f"{path}: tensor token_embd.weight is missing")

  def field(name: str, *default: Any) -> Any:
    return fields.get(f"{arch}.{name}", *default) if default else fields[f"{arch}.{name}"]

  if (experts := field("expert_count", None)) not in (None, 0):
    raise WeightsError(f"{path}: {arch}.expert_count = {experts} is not supported")

  try:
    d_model, n_heads, n_layers = field("embedding_length"), field("attention.head_count"), field("block_count")
    head_dim = field("attention.key_length", d_model // n_heads)
    if (rotated := field("rope.dimension_count", head_dim)) != head_dim:
      raise WeightsError(f"{path}: RoPE over {rotated} of {head_dim} dimensions is not supported")
    scaling = field("rope.scaling.type", "none")
    attention: dict[str, Any] = {"window": field("attention.sliding_window", None) or 0}
    if has_local_layers(family):
      largest = (family, n_layers) in (("gemma2", 46), ("gemma3_text", 62))  # 27B scales by its width
      attention |= {
        "local_layers": local_layers(family, n_layers),
        "query_scale": (d_model // n_heads if largest else head_dim) ** -0.5,
        "attention_softcap": field("attn_logit_softcapping", 0.0),
        "logit_softcap": field("final_logit_softcapping", 0.0),
        "local_rope_theta": 10_000.0 if family == "gemma3_text" else 0.0,
      }
    return ModelConfig(
      vocab_size=tensors["token_embd.weight"].shape[0],
      d_model=d_model,
      n_layers=n_layers,
      n_heads=n_heads,
      n_kv_heads=field("attention.head_count_kv", n_heads),
      head_dim=head_dim,
      d_ff=field("feed_forward_length"),
      rope_theta=field("rope.freq_base", 10_000.0),
      rope_scaling=None if scaling == "none" else RopeScaling(scaling, field("rope.scaling.factor")),
      # Stored as float32: 1e-5 comes back as 9.999999747e-06 without the detour over its shortest text.
      norm_eps=float(str(np.float32(field("attention.layer_norm_rms_epsilon")))),
      tie_embeddings="output.weight" not in tensors,
      max_position=field("context_length"),
      **FAMILIES[family],
      **attention,
    )
  except KeyError as error:
    raise WeightsError(f"{path}: metadata {error.args[0]} is missing") from error
  except WeightsError:
    raise
  except (ValueError, ZeroDivisionError, TypeError) as error:
    raise WeightsError(f"{path}: {error}") from error


def _tokenizer(path: Path, fields: Mapping[str, Any]) -> Tokenizer:
  model = fields.get("tokenizer.ggml.model")
  if model not in ("gpt2", "llama"):
    raise WeightsError(f"{path}: tokenizer {model!r} is not supported, only 'gpt2' (bytes) and 'llama' (pieces)")
  field = lambda name: fields[f"tokenizer.ggml.{name}"]
  eos = fields.get("tokenizer.ggml.eot_token_id", fields.get("tokenizer.ggml.eos_token_id"))
  try:
    if model == "llama":
      given = {"scores": field("scores"), "prefix": bool(fields.get("tokenizer.ggml.add_space_prefix", True))}
    else:
      given = {"merges": field("merges"), "pre": field("pre")}
    return Tokenizer.from_gguf_fields(
      tokens=field("tokens"), token_types=field("token_type"), eos_id=eos,
      bos_id=fields.get("tokenizer.ggml.bos_token_id"), chat_template=fields.get("tokenizer.chat_template", ""),
      **given)
  except KeyError as error:
    raise WeightsError(f"{path}: metadata {error.args[0]} is missing") from error
  except ValueError as error:
    raise WeightsError(f"{path}: {error}") from error
