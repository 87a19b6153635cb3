"""config.json of Hugging Face folders: read as a `ModelConfig`, and written from one."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from pasta_jax.model.config import MAX_COUNT, MAX_LAYERS, ModelConfig, RopeScaling
from pasta_jax.model.families import FAMILIES, family_of, has_local_layers, local_layers
from pasta_jax.utils.typed import Parsed, checked
from pasta_jax.weights.arrays import WeightsError
from pasta_jax.weights.model_files import read_json
from pasta_jax.weights.tokenizer import Tokenizer

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
# config.json's names of activations. Gemma's first files say "gelu" but mean the approximation.
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu"}
_COUNTS = (  # null where a field of another name, or the family, has the number
  "vocab_size",
  "hidden_size",
  "num_hidden_layers",
  "num_attention_heads",
  "num_key_value_heads",
  "head_dim",
  "intermediate_size",
  "max_position_embeddings",
)
# Defaults of missing keys, as in transformers. (A key with the value null is not missing.)
_LLAMA: dict[str, Any] = dict(
  rms_norm_eps=1e-6,
  rope_theta=1e4,
  tie_word_embeddings=False,
  hidden_act="silu",
  max_position_embeddings=2048,
)
_QWEN = _LLAMA | dict(max_position_embeddings=32_768, num_key_value_heads=32, max_window_layers=28)
_GEMMA = _LLAMA | dict(
  hidden_act="gelu_pytorch_tanh",
  tie_word_embeddings=True,
  max_position_embeddings=8192,
  num_key_value_heads=16,
  head_dim=256,
)
_GEMMA2 = _GEMMA | dict(num_key_value_heads=4, sliding_window=4096, query_pre_attn_scalar=256)
_DEFAULTS: dict[str, dict[str, Any]] = {
  "llama": _LLAMA,
  "mistral": _LLAMA | dict(max_position_embeddings=131_072, num_key_value_heads=8, sliding_window=4096),
  "qwen2": _QWEN,
  "qwen3": _QWEN | dict(head_dim=128),
  "gemma": _GEMMA,
  "gemma2": _GEMMA2 | dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
  "gemma3_text": _GEMMA2
  | dict(
    vocab_size=262_208,
    num_attention_heads=8,
    max_position_embeddings=131_072,
    rope_theta=1e6,
    rope_local_base_freq=1e4,
  ),
}


class _Rope(Parsed):
  """RoPE's fields: transformers 5 nests them by kind of layer if the kinds differ."""

  rope_type: str = "default"
  type: str = "default"
  rope_theta: float | None = None
  factor: float | None = None
  low_freq_factor: float | None = None
  high_freq_factor: float | None = None
  original_max_position_embeddings: float | None = None
  partial_rotary_factor: float | None = 1.0
  full_attention: "_Rope | None" = None
  sliding_attention: "_Rope | None" = None


class _Fields(Parsed):
  """The types of config.json's fields that are neither counts nor names."""

  rms_norm_eps: float
  tie_word_embeddings: bool | None
  rope_theta: float | None = None
  rope_local_base_freq: float | None = None
  partial_rotary_factor: float | None = 1.0
  rope_scaling: _Rope | None = None
  rope_parameters: _Rope | None = None
  sliding_window: int | None = None
  sliding_window_pattern: int | None = None
  max_window_layers: int | None = None
  layer_types: list[str] | None = None
  query_pre_attn_scalar: Annotated[float, Field(gt=0)] = 1.0
  attn_logit_softcapping: float | None = None
  final_logit_softcapping: float | None = None


# Models with a vision part, and the family of their text part.
_VISION = {"gemma3": "gemma3_text"}


def has_vision(raw: Mapping[str, Any]) -> bool:
  """Whether a config.json describes a model with a vision part; the tensors of its text part have other
  names."""
  return raw.get("model_type") in tuple(_VISION)  # a tuple: the value in a damaged file may not be hashable


def read_config(path: Path) -> ModelConfig:
  """The architecture in the config.json at `path`. Raises as `parse_config`, or if the file cannot be
  read."""
  return parse_config(read_json(path), path)


def parse_config(raw: dict[str, Any], path: Path) -> ModelConfig:
  """The architecture in a config.json, or that of its text part if it has a vision part. `path` is for
  messages.

  Raises WeightsError, one line, if the family or a feature is not supported.
  """
  try:
    return _config(raw)
  except KeyError as error:
    raise WeightsError(f"{path}: {error.args[0]} is missing") from error
  except (ValueError, ArithmeticError, TypeError, AttributeError) as error:
    raise WeightsError(f"{path}: {error}") from error


def to_hf_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
  """The content of config.json: the inverse of `parse_config`."""
  family = family_of(config)
  activation = "gelu_pytorch_tanh" if config.activation == "gelu" else config.activation
  return dict(
    architectures=[f"{family.removesuffix('_text').capitalize()}ForCausalLM"], model_type=family,
    hidden_act=activation, hidden_activation=activation, vocab_size=config.vocab_size,
    hidden_size=config.d_model, num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
    num_key_value_heads=config.n_kv_heads, head_dim=config.head_dim, intermediate_size=config.d_ff,
    rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tie_embeddings,
    max_position_embeddings=config.max_position, eos_token_id=tokenizer.eos_token_id,
    bos_token_id=tokenizer.bos_id, **_rope_fields(config), **_attention_fields(config))  # fmt: skip


def _config(raw: dict[str, Any]) -> ModelConfig:
  """Raises KeyError for missing fields, ValueError for features that are not supported, TypeError,
  AttributeError, OverflowError or ZeroDivisionError for damaged fields."""
  if quantised := raw.get("quantization_config"):
    raise ValueError(
      f"weights quantised by {quantised.get('quant_method')!r:.40} are not supported, only float32, "
      "float16 and bfloat16, and GGUF files"
    )
  if has_vision(raw):
    raw = raw["text_config"] | {"model_type": _VISION[raw["model_type"]]}
  kind = str(raw.get("model_type"))
  if kind not in FAMILIES:
    raise ValueError(f"architecture {raw.get('model_type')!r} is not supported, only {', '.join(FAMILIES)}")
  raw = _DEFAULTS[kind] | raw
  checked(_Fields, raw, "a value")
  for feature in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
    if raw.get(feature):
      raise ValueError(f"{feature} is not supported")
  activation = raw.get("hidden_activation") or raw["hidden_act"]
  if _ACTIVATIONS.get(str(activation)) != FAMILIES[kind]["activation"]:
    raise ValueError(f"activation {activation!r} is not supported in the family {kind!r}")
  for key in _COUNTS:
    most = MAX_LAYERS if key == "num_hidden_layers" else MAX_COUNT
    if (count := raw.get(key, 1)) is not None and (type(count) is not int or not 1 <= count <= most):
      raise ValueError(f"{key} = {count!r:.40} is not a count")
  d_model, n_heads = raw["hidden_size"], raw["num_attention_heads"]
  return ModelConfig(
    vocab_size=raw["vocab_size"],
    d_model=d_model,
    n_layers=raw["num_hidden_layers"],
    n_heads=n_heads,
    n_kv_heads=raw.get("num_key_value_heads") or n_heads,
    head_dim=raw.get("head_dim") or d_model // n_heads,
    d_ff=raw["intermediate_size"],
    norm_eps=float(raw["rms_norm_eps"]),
    max_position=raw["max_position_embeddings"],
    tie_embeddings=bool(raw["tie_word_embeddings"]),
    **FAMILIES[kind],
    **_rope(raw),
    **_windows(raw, kind),
    **(_scores(raw) if has_local_layers(kind) else {}),
  )


def _windows(raw: Mapping[str, Any], kind: str) -> dict[str, Any]:
  """The sliding window, and which layers are local."""
  window, kinds, n_layers = raw.get("sliding_window") or 0, raw.get("layer_types"), raw["num_hidden_layers"]
  if kind == "mistral":
    return {"window": window}
  if kinds and not set(kinds) <= {_LOCAL, _GLOBAL}:
    raise ValueError(f"layers of the kinds {', '.join(map(repr, kinds))} are not supported")
  if has_local_layers(kind):
    default = local_layers(kind, n_layers, raw.get("sliding_window_pattern"))
  elif raw.get("use_sliding_window"):  # Qwen
    default = tuple(i >= raw["max_window_layers"] for i in range(n_layers))
  else:
    return {}
  local = tuple(each == _LOCAL for each in kinds) if kinds else default
  return {"window": window, "local_layers": local} if window and any(local) or has_local_layers(kind) else {}


def _scores(raw: Mapping[str, Any]) -> dict[str, Any]:
  """Scales and soft caps of Gemma 2 and 3."""
  return {
    "query_scale": raw["query_pre_attn_scalar"] ** -0.5,
    "attention_softcap": raw.get("attn_logit_softcapping") or 0.0,
    "logit_softcap": raw.get("final_logit_softcapping") or 0.0,
  }


def _attention_fields(config: ModelConfig) -> dict[str, Any]:
  """The inverse of `_windows` and `_scores`."""
  out: dict[str, Any] = {"sliding_window": config.window or None}
  if config.local_layers:
    out["layer_types"] = [_LOCAL if config.is_local(i) else _GLOBAL for i in range(config.n_layers)]
  if config.local_layers and not config.post_norms:
    out |= {"use_sliding_window": True, "max_window_layers": config.local_layers.index(True)}
  if config.post_norms:
    out["query_pre_attn_scalar"] = round(
      (config.query_scale or config.head_dim**-0.5) ** -2
    )  # a whole number
    out["attn_logit_softcapping"] = config.attention_softcap or None
    out["final_logit_softcapping"] = config.logit_softcap or None
  return out


def _rope(raw: Mapping[str, Any]) -> dict[str, Any]:
  """RoPE of the model and of its local layers. transformers 5 writes rope_parameters, nested by kind of layer
  if the kinds differ; earlier versions write rope_theta and rope_scaling. If both are present, rope_scaling
  wins: it was probably added by hand."""
  given = raw.get("rope_parameters") or {}
  nested = _GLOBAL in given or _LOCAL in given
  whole = given.get(_GLOBAL) or {} if nested else given
  scaling = raw.get("rope_scaling") or whole
  theta = next(each["rope_theta"] for each in (scaling, whole, raw) if "rope_theta" in each)
  out = {"rope_theta": float(theta), "rope_scaling": _rope_scaling(scaling, raw["max_position_embeddings"])}
  local = given.get(_LOCAL) or {} if nested else {}
  if _kind(local) != "default":
    raise ValueError(f"RoPE of local layers of the kind {_kind(local)!r} is not supported")
  if "rope_local_base_freq" in raw:
    out["local_rope_theta"] = float(local.get("rope_theta", raw["rope_local_base_freq"]))
  if any(each.get("partial_rotary_factor", 1) != 1 for each in (scaling, local, raw)):
    raise ValueError("RoPE over a part of the dimensions (partial_rotary_factor) is not supported")
  return out


def _kind(rope: Mapping[str, Any]) -> str:
  return str(rope.get("rope_type", rope.get("type", "default")))


def _rope_scaling(rope: Mapping[str, Any], context: int) -> RopeScaling | None:
  """Raises KeyError for missing fields, ValueError for a kind that is not supported."""
  kind = _kind(rope)
  if kind == "default":
    return None
  scaling = RopeScaling(kind, 1.0)  # refuses an unknown kind before its fields are looked up
  if kind == "linear":
    return dataclasses.replace(scaling, factor=float(rope["factor"]))
  return RopeScaling(
    kind,
    float(rope["factor"]),
    float(rope["low_freq_factor"]),
    float(rope["high_freq_factor"]),
    int(rope.get("original_max_position_embeddings", context)),
  )


def _rope_fields(config: ModelConfig) -> dict[str, Any]:
  """The inverse of `_rope`, for transformers before and from version 5."""
  out: dict[str, Any] = {"rope_type": "default"}
  if s := config.rope_scaling:
    out = {"rope_type": s.kind, "factor": s.factor}
    if s.kind == "llama3":
      out |= {
        "low_freq_factor": s.low_freq_factor,
        "high_freq_factor": s.high_freq_factor,
        "original_max_position_embeddings": s.original_max_position,
      }
  parameters: dict[str, Any] = out | {"rope_theta": config.rope_theta}
  described = {"rope_theta": config.rope_theta} | ({"rope_scaling": out} if config.rope_scaling else {})
  if local := config.local_rope_theta:
    parameters = {_GLOBAL: parameters, _LOCAL: {"rope_type": "default", "rope_theta": local}}
    described["rope_local_base_freq"] = local
  return described | {"rope_parameters": parameters}
