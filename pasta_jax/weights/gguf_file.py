"""Reads models of `model.families` from GGUF files: architecture, weights and tokenizer.

Defaults of missing metadata are llama.cpp's, which depend on the family.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pasta_jax.model.config import ModelConfig, RopeScaling
from pasta_jax.model.families import FAMILIES, has_local_layers, local_layers
from pasta_jax.utils.typed import Parsed, checked
from pasta_jax.weights.arrays import StoredParams, WeightsError, collect, rename
from pasta_jax.weights.gguf_container import StoredTensor, read_container, refuse_unreadable, values
from pasta_jax.weights.tokenizer import Tokenizer
from pasta_jax.weights.tokenizer_forms import too_few

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
# Families by GGUF's names of architectures. Mistral's files use "llama".
_FAMILIES = {family.removesuffix("_text"): family for family in FAMILIES if family != "mistral"}
# Must be numbers that hold for all layers: some architectures have a list, with one number per layer.
_COUNTS = (
  "embedding_length", "block_count", "attention.head_count", "attention.head_count_kv", "attention.key_length",
  "feed_forward_length", "context_length")  # fmt: skip
_NUMBERS = (
  "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.freq_base_swa", "rope.scaling.factor",
  "rope.scale_linear", "attn_logit_softcapping", "final_logit_softcapping")  # fmt: skip
# [H/2] divisors of RoPE's frequencies. Llama 3's files have this tensor and no metadata about their scaling.
_ROPE_FACTORS = "rope_freqs.weight"
# Gemma 2's values, which its first files lack.
_GEMMA2 = {"attention.sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
# Pre-tokenizers of byte-level vocabularies whose texts begin with a BOS token, unless the file says
# otherwise.
_WITH_BOS = ("llama-bpe", "llama3", "llama-v3", "tekken")


class _Vocabulary(Parsed):
  """The fields of a tokenizer."""

  tokens: list[str]
  token_type: list[int]
  merges: list[str] = []
  pre: str = ""
  scores: list[float] = []
  add_space_prefix: bool = True
  eos_token_id: int | None = None
  eot_token_id: int | None = None
  bos_token_id: int | None = None
  padding_token_id: int | None = None
  unknown_token_id: int | None = None
  chat_template: str = ""


def load_gguf(path: Path, progress: bool) -> tuple[ModelConfig, StoredParams, Tokenizer]:
  """Architecture, parameters (see `arrays.param_shapes`) and tokenizer of a GGUF file, or of a split model if
  `path` is one of its parts.

  Raises:
    WeightsError: the file is not GGUF or is truncated, the architecture is not supported, or tensors do not
      fit it.
  """
  fields, tensors = read_container(path)
  refuse_unreadable(path, tensors.items())
  config = _config(path, fields, tensors)
  if factors := tensors.pop(_ROPE_FACTORS, None):
    config = _with_rope_factors(path, config, values(factors, slice(None)))
  tokenizer = _tokenizer(path, fields)
  if tokenizer.vocab_size > config.vocab_size:
    raise WeightsError(f"{path}: {too_few(config.vocab_size, tokenizer.vocab_size)}")

  def read(ours: str, theirs: str, rows: slice) -> np.ndarray:
    tensor = tensors[theirs]
    stored_rows: slice | np.ndarray = rows
    if fields["general.architecture"] == "llama" and ours.endswith((".attn.q.kernel", ".attn.k.kernel")):
      indices = np.arange(tensor.shape[0])[:, None]
      stored_rows = _unpermute(indices, config.n_heads if ".q." in ours else config.n_kv_heads)[rows, 0]
    numbers = values(tensor, stored_rows)
    # GGUF stores the scales of norms with the offset included.
    return numbers - np.float32(config.norm_offset) if ours.endswith(".scale") else numbers

  stored = {name: tensor.shape for name, tensor in tensors.items()}
  params = collect(config, path, gguf_name, stored, read, progress)
  return config, params, tokenizer


def gguf_name(name: str) -> str:
  """The name, in these files, of a parameter of ours."""
  return rename(name, _NAMES, "blk.")


def as_stored(name: str, array: np.ndarray, config: ModelConfig, arch: str) -> np.ndarray:
  """A parameter of ours as a file of the architecture `arch` stores it: the inverse of what `load_gguf` reads."""
  stored = array.T if name.endswith(".kernel") else array
  if arch == "llama" and name.endswith((".attn.q.kernel", ".attn.k.kernel")):
    stored = _permute(stored, config.n_heads if ".q." in name else config.n_kv_heads)
  return stored + np.float32(config.norm_offset) if name.endswith(".scale") else stored


def _unpermute(weight: np.ndarray, n_heads: int) -> np.ndarray:
  """Rows of a query or key projection [out, D], in Hugging Face's order.

  llama.cpp rotates the pairs (0, 1), (2, 3), …, so its converter interleaves the two halves of each head's
  rows. Our RoPE rotates the pairs (i, i + H/2), as in the original weights.
  """
  out, d_model = weight.shape
  pairs = weight.reshape(n_heads, out // n_heads // 2, 2, d_model)
  return pairs.swapaxes(1, 2).reshape(out, d_model)


def _permute(weight: np.ndarray, n_heads: int) -> np.ndarray:
  """The inverse of `_unpermute`."""
  out, d_model = weight.shape
  halves = weight.reshape(n_heads, 2, out // n_heads // 2, d_model)
  return halves.swapaxes(1, 2).reshape(out, d_model)


def _config(path: Path, fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> ModelConfig:
  """The architecture, without a RoPE scaling that is stored as a tensor (`_with_rope_factors`)."""
  arch = str(fields.get("general.architecture"))
  if arch not in _FAMILIES:
    raise WeightsError(f"{path}: architecture {arch!r} is not supported, only {', '.join(_FAMILIES)}")
  family = _FAMILIES[arch]
  if "token_embd.weight" not in tensors:
    raise WeightsError(f"{path}: tensor token_embd.weight is missing")
  given = _under(f"{arch}.", fields)
  for key in _COUNTS:
    if type(count := given.get(key, 1)) is not int or count < 1:
      raise WeightsError(f"{path}: {arch}.{key} = {count!r:.40} is not a count")
  if (experts := given.get("expert_count", 0)) != 0:
    raise WeightsError(f"{path}: {arch}.expert_count = {experts} is not supported")

  try:
    checked(dict[str, float], {key: given[key] for key in _NUMBERS if key in given}, arch)
    d_model, n_heads, n_layers = (
      given["embedding_length"],
      given["attention.head_count"],
      given["block_count"],
    )
    # Checked before shapes are listed: a damaged file may claim millions of layers.
    if (last := f"blk.{n_layers - 1}.attn_norm.weight") not in tensors:
      raise WeightsError(f"{path}: tensor {last} is missing")
    head_dim = given.get("attention.key_length", d_model // n_heads)
    if (rotated := given.get("rope.dimension_count", head_dim)) != head_dim:
      raise WeightsError(f"{path}: RoPE over {rotated} of {head_dim} dimensions is not supported")
    return ModelConfig(
      vocab_size=tensors["token_embd.weight"].shape[0],
      d_model=d_model,
      n_layers=n_layers,
      n_heads=n_heads,
      n_kv_heads=given.get("attention.head_count_kv", n_heads),
      head_dim=head_dim,
      d_ff=given["feed_forward_length"],
      rope_theta=given.get("rope.freq_base", 10_000.0),
      rope_scaling=_rope_scaling(given),
      norm_eps=_written(given["attention.layer_norm_rms_epsilon"]),
      tie_embeddings="output.weight" not in tensors,
      max_position=given["context_length"],
      **FAMILIES[family],
      **_attention(family, given, head_dim),
    )
  except KeyError as error:
    raise WeightsError(f"{path}: metadata {arch}.{error.args[0]} is missing") from error
  except WeightsError:
    raise
  except (ValueError, ArithmeticError, TypeError) as error:
    raise WeightsError(f"{path}: {error}") from error


def _under(prefix: str, fields: Mapping[str, Any]) -> dict[str, Any]:
  """The fields whose names start with a prefix, without that prefix."""
  return {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}


def _attention(family: str, given: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
  """The sliding window, and the further features of Gemma 2 and 3. Raises KeyError for missing fields."""
  if not has_local_layers(family):
    return {"window": given.get("attention.sliding_window", 0)}
  if family == "gemma2":
    given = _GEMMA2 | dict(given)
  n_layers, pattern = given["block_count"], given.get("attention.sliding_window_pattern")
  # The 27B models scale queries by D / N, not by the head width.
  largest = (family, n_layers) in (("gemma2", 46), ("gemma3_text", 62))
  return {
    "window": given["attention.sliding_window"],
    "local_layers": (
      tuple(map(bool, pattern)) if isinstance(pattern, list) else local_layers(family, n_layers, pattern)
    ),
    "query_scale": (given["embedding_length"] // given["attention.head_count"] if largest else head_dim)
    ** -0.5,
    "attention_softcap": given.get("attn_logit_softcapping", 0.0),
    "logit_softcap": given.get("final_logit_softcapping", 0.0),
    "local_rope_theta": given.get("rope.freq_base_swa", 10_000.0) if family == "gemma3_text" else 0.0,
  }


def _rope_scaling(given: Mapping[str, Any]) -> RopeScaling | None:
  """The scaling that the metadata name. The oldest files have only a factor, of the kind "linear".

  Raises ValueError for a kind that is not supported, KeyError if its factor is missing.
  """
  factor = given.get("rope.scaling.factor", given.get("rope.scale_linear", 0.0))
  kind = given.get("rope.scaling.type", "linear" if factor else "none")
  if kind not in ("none", "linear"):
    raise ValueError(f"RoPE scaling {kind!r} is not supported in GGUF, only 'linear' and Llama 3's")
  if kind == "linear" and not factor:
    raise KeyError("rope.scaling.factor")
  return RopeScaling("linear", factor) if kind == "linear" else None


def _with_rope_factors(path: Path, config: ModelConfig, factors: np.ndarray) -> ModelConfig:
  """`config` with the RoPE scaling of Llama 3 that divides the frequencies by `factors` [H/2].

  The lowest frequencies are divided by the full factor; the ends of the ramp are the same in every Llama 3.

  Raises:
    WeightsError: no such scaling gives these factors, or the model has another scaling already.
  """
  if config.rope_scaling is None and factors.shape == (config.head_dim // 2,) and 1 <= factors.max() < np.inf:
    scaled = dataclasses.replace(config, rope_scaling=RopeScaling("llama3", _written(factors.max())))
    if np.allclose(config.rope_frequencies() / scaled.rope_frequencies(), factors, rtol=1e-4, atol=0):
      return scaled
  raise WeightsError(
    f"{path}: tensor {_ROPE_FACTORS} has RoPE factors that are not Llama 3's, which is not supported"
  )


def _written(stored: Any) -> float:
  """The shortest decimal of a number that was stored as float32: 1e-5, not 9.999999747e-06."""
  return float(str(np.float32(stored)))


def _tokenizer(path: Path, fields: Mapping[str, Any]) -> Tokenizer:
  """The tokenizer in the metadata. Raises WeightsError if it is damaged or of another kind."""
  given = _under("tokenizer.ggml.", fields)
  if (model := given.get("model")) not in ("gpt2", "llama"):
    raise WeightsError(
      f"{path}: tokenizer {model!r:.40} is not supported, only 'gpt2' (bytes) and 'llama' (pieces)"
    )
  needed = ("tokens", "token_type", *(("scores",) if model == "llama" else ("merges", "pre")))
  if missing := [key for key in needed if key not in given]:
    raise WeightsError(f"{path}: metadata tokenizer.ggml.{missing[0]} is missing")
  try:
    read = checked(
      _Vocabulary, given | {"chat_template": fields.get("tokenizer.chat_template", "")}, "tokenizer"
    )
    return Tokenizer.from_gguf_fields(
      tokens=read.tokens,
      token_types=read.token_type,
      eos_id=read.eos_token_id,
      eot_id=read.eot_token_id,
      bos_id=read.bos_token_id,
      pad_id=read.padding_token_id,
      unk_id=read.unknown_token_id,
      add_bos=bool(given.get("add_bos_token", model == "llama" or read.pre in _WITH_BOS)),
      chat_template=read.chat_template,
      merges=read.merges,
      pre=read.pre,
      scores=read.scores if model == "llama" else None,
      prefix=model == "llama" and read.add_space_prefix,
    )
  except (ValueError, TypeError) as error:
    raise WeightsError(f"{path}: {error}") from error
