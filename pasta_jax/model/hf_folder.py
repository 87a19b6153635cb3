"""Models in Hugging Face's folder format: config.json, *.safetensors, tokenizer files."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors then returns)
import numpy as np
from numpy.typing import ArrayLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pasta_jax.model.config import ModelConfig, RopeScaling
from pasta_jax.model.families import FAMILIES, family_of, has_local_layers, local_layers
from pasta_jax.model.tokenizer import Tokenizer
from pasta_jax.model.weights import StoredParams, WeightsError, collect, param_shapes, read_json, rename

_NAMES = {
  "embed.embedding": "model.embed_tokens.weight",
  "attn_norm.scale": "input_layernorm.weight",
  "attn.q.kernel": "self_attn.q_proj.weight",
  "attn.k.kernel": "self_attn.k_proj.weight",
  "attn.v.kernel": "self_attn.v_proj.weight",
  "attn.q.bias": "self_attn.q_proj.bias",
  "attn.k.bias": "self_attn.k_proj.bias",
  "attn.v.bias": "self_attn.v_proj.bias",
  "attn.q_norm.scale": "self_attn.q_norm.weight",
  "attn.k_norm.scale": "self_attn.k_norm.weight",
  "attn.o.kernel": "self_attn.o_proj.weight",
  "mlp_norm.scale": "post_attention_layernorm.weight",  # where no norm stands behind attention
  "mlp.gate.kernel": "mlp.gate_proj.weight",
  "mlp.up.kernel": "mlp.up_proj.weight",
  "mlp.down.kernel": "mlp.down_proj.weight",
  "final_norm.scale": "model.norm.weight",
  "head.kernel": "lm_head.weight",
}
_NAMES_WITH_POST_NORMS = _NAMES | {
  "attn_post_norm.scale": "post_attention_layernorm.weight",
  "mlp_norm.scale": "pre_feedforward_layernorm.weight",
  "mlp_post_norm.scale": "post_feedforward_layernorm.weight",
}
# Folders of models that see images too: their text part's family, and what its part of config.json leaves out, as
# transformers has it.
_WITH_IMAGES: dict[str, tuple[str, dict[str, Any]]] = {"gemma3": ("gemma3_text", dict(
  vocab_size=262_208, num_attention_heads=8, num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256,
  rms_norm_eps=1e-6, max_position_embeddings=131_072, sliding_window=4096, rope_theta=1e6, rope_local_base_freq=1e4,
  hidden_activation="gelu_pytorch_tanh"))}
# Of their tensors: what the text part's names begin with, for "model." and for what stands outside of it.
_TEXT_PART = {"language_model.model.": "model.", "model.language_model.": "model.", "language_model.": ""}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
# Of each family, whatever its config.json calls it: Gemma's first files said "gelu", and meant the approximation.
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu"}
_COUNTS = (
  "vocab_size",
  "hidden_size",
  "num_hidden_layers",
  "num_attention_heads",
  "num_key_value_heads",
  "head_dim",
  "intermediate_size",
  "max_position_embeddings",
)
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def load_hf_folder(folder: Path,
                   progress: bool) -> tuple[ModelConfig, StoredParams, Tokenizer, dict[str, str]]:
  """Architecture, parameters (see `weights.param_shapes`), tokenizer, and what `save_hf_folder` got as `pasta`.

  Raises:
    WeightsError: a file is missing or damaged, an architecture or a feature that the decoder lacks (other kinds of
      scaled RoPE, say), or tensors that do not fit config.json.
  """
  config = read_config(folder / "config.json")
  tokenizer = Tokenizer.from_file(folder / "tokenizer.json", folder / "tokenizer_config.json")
  if tokenizer.vocab_size > config.vocab_size:
    raise WeightsError(f"{folder}: {tokenizer.vocab_size} tokens, but only {config.vocab_size} embeddings")

  # Tensor → (open file, its name there); `safe_open` has no public type. They stay open, and mapped, as long as they
  # may be read.
  file_of: dict[str, tuple[Any, str]] = {}
  stored: dict[str, tuple[int, ...]] = {}
  with_images = read_json(folder / "config.json").get("model_type") in _WITH_IMAGES
  for path in _shards(folder):
    file = _open(path)
    for there in file.keys():  # noqa: SIM118  (not a dict)
      name = _of_text(there) if with_images else there
      if name is None or _redundant(name, config):
        continue
      if name in file_of:
        raise WeightsError(f"{path}: tensor {name} is in another file already")
      file_of[name], stored[name] = (file, there), tuple(file.get_slice(there).get_shape())

  def read(theirs: str, rows: slice) -> np.ndarray:
    file, name = file_of[theirs]
    return file.get_slice(name)[rows]

  params = collect(
    config,
    folder,
    lambda name: hf_name(config, name),
    stored,
    lambda _, theirs, rows: read(theirs, rows),
    progress,
  )
  return config, params, tokenizer, _pasta(folder / "config.json", tokenizer)


def save_hf_folder(folder: Path, config: ModelConfig, params: Mapping[str, ArrayLike], tokenizer: Tokenizer, *,
                   dtype: str = "float32", pasta: Mapping[str, str] | None = None,
                   file_bytes: int = 4 << 30) -> list[Path]:
  """Writes a model so that `load_hf_folder` and `transformers` read it; returns the files of its tensors, which hold
  about `file_bytes` each at most, and of which one is in memory at a time.

  `pasta` is for weights with PASTA's tags among the rows of the vocabulary, at `config.tag_ids`: the metadata of their
  adapter, which goes into config.json; the tokenizer then knows the tags.

  The folder is made under another name first: it is there whole or not at all. One that stood there before
  is replaced.
  """
  temporary = folder.with_name(folder.name + ".tmp")
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir(parents=True)
  parts: list[list[str]] = [[]]
  size = 0
  for name, shape in param_shapes(config).items():
    bytes_ = math.prod(shape) * np.dtype(dtype).itemsize
    if parts[-1] and size + bytes_ > file_bytes:
      parts.append([])
      size = 0
    parts[-1].append(name)
    size += bytes_
  files = [_SINGLE] if len(parts) == 1 else [f"model-{i:05}-of-{len(parts):05}.safetensors"
                                             for i in range(1, len(parts) + 1)]
  for file, names in zip(files, parts):
    tensors = {}
    for name in names:
      x = np.asarray(params[name], dtype)
      tensors[hf_name(config, name)] = np.ascontiguousarray(x.T if name.endswith(".kernel") else x)
    save_file(tensors, temporary / file, {"format": "pt"})
  if len(files) > 1:
    where = {hf_name(config, name): file for file, names in zip(files, parts) for name in names}
    total = sum((temporary / file).stat().st_size for file in files)
    (temporary / _INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2))
  described = _described(config, tokenizer) | {"dtype": dtype} | ({"pasta": dict(pasta)} if pasta else {})
  (temporary / "config.json").write_text(json.dumps(described, indent=2) + "\n")
  tokenizer.save(temporary, config.tag_ids if pasta else ())
  shutil.rmtree(folder, ignore_errors=True)
  temporary.replace(folder)
  return [folder / file for file in files]


def _shards(folder: Path) -> list[Path]:
  """The weight files: those that the index names, else the single file, else all *.safetensors."""
  if (folder / _INDEX).exists():
    index = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(index, dict):
      raise WeightsError(f"{folder / _INDEX}: weight_map is missing")
    return [folder / name for name in sorted(set(index.values()))]
  if (folder / _SINGLE).exists():
    return [folder / _SINGLE]
  if paths := sorted(folder.glob("*.safetensors")):
    return paths
  raise WeightsError(f"{folder}: no *.safetensors file")


def _open(path: Path) -> Any:
  try:
    return safe_open(path, framework="np")
  except (OSError, SafetensorError) as error:
    raise WeightsError(f"{path}: truncated, damaged or missing ({error})") from error


def _of_text(name: str) -> str | None:
  """A tensor's name in a folder of the text part alone; None for what sees."""
  return next((new + name.removeprefix(old) for old, new in _TEXT_PART.items() if name.startswith(old)), None)


def _redundant(name: str, config: ModelConfig) -> bool:
  """Tensors that old exports write although they follow from the rest: RoPE's table, a tied head."""
  return name.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and name == _NAMES["head.kernel"])


def read_config(path: Path) -> ModelConfig:
  """The architecture that a `config.json` describes. Raises WeightsError, one line, if it is none of the families'."""
  raw = read_json(path)
  if raw.get("model_type") in _WITH_IMAGES and isinstance(text := raw.get("text_config"), dict):
    family, usual = _WITH_IMAGES[raw["model_type"]]
    raw = usual | {key: value for key, value in text.items() if value is not None} | {"model_type": family}
  if (kind := raw.get("model_type")) not in FAMILIES:
    raise WeightsError(f"{path}: architecture {kind!r} is not supported, only {', '.join(FAMILIES)}")
  for feature in ("attention_bias", "mlp_bias"):
    if raw.get(feature):
      raise WeightsError(f"{path}: {feature} is not supported")
  given = raw.get("hidden_activation") or raw.get("hidden_act") or "silu"
  if _ACTIVATIONS.get(given) != FAMILIES[kind]["activation"]:
    raise WeightsError(f"{path}: activation {given!r} is not supported in the family {kind!r}")
  # transformers 5 writes rope_parameters; before, rope_theta stood alone and rope_scaling beside it.
  rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
  rope = rope.get(_GLOBAL, rope)
  for key in _COUNTS:
    if not isinstance(count := raw.get(key, 1), int | None) or count == 0:
      raise WeightsError(f"{path}: {key} = {count!r} is not a count")
  context = raw.get("max_position_embeddings", 2048)
  if raw.get("use_sliding_window"):
    raise WeightsError(f"{path}: use_sliding_window is not supported in the family {kind!r}")
  try:
    d_model, n_heads = raw["hidden_size"], raw["num_attention_heads"]
    return ModelConfig(
      vocab_size=raw["vocab_size"],
      d_model=d_model,
      n_layers=raw["num_hidden_layers"],
      n_heads=n_heads,
      n_kv_heads=raw.get("num_key_value_heads") or n_heads,
      head_dim=raw.get("head_dim") or d_model // n_heads,
      d_ff=raw["intermediate_size"],
      rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0))),
      rope_scaling=_rope_scaling(rope, context),
      norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
      max_position=context,
      tie_embeddings=bool(raw.get("tie_word_embeddings", kind.startswith("gemma"))),  # these do not say so
      **FAMILIES[kind],
      **(_attention(raw, kind) if kind == "mistral" or has_local_layers(kind) else {}),
    )
  except KeyError as error:
    raise WeightsError(f"{path}: {error.args[0]} is missing") from error
  except (ValueError, ZeroDivisionError, TypeError) as error:
    raise WeightsError(f"{path}: {error}") from error


def _described(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
  """config.json: the inverse of `_config`."""
  family = family_of(config)
  activation = "gelu_pytorch_tanh" if config.activation == "gelu" else config.activation
  return dict(
    architectures=[f"{family.removesuffix('_text').capitalize()}ForCausalLM"], model_type=family,
    hidden_act=activation, hidden_activation=activation, vocab_size=config.vocab_size,
    hidden_size=config.d_model, num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
    num_key_value_heads=config.n_kv_heads, head_dim=config.head_dim, intermediate_size=config.d_ff,
    rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tie_embeddings,
    max_position_embeddings=config.max_position, eos_token_id=tokenizer.eos_id, bos_token_id=tokenizer.bos_id,
    **_described_rope(config), **_described_attention(config))  # fmt: skip


def _pasta(path: Path, tokenizer: Tokenizer) -> dict[str, str]:
  """What config.json says of the adapter that was merged into the weights; {} where none was."""
  found = read_json(path).get("pasta", {})
  if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
    raise WeightsError(f"{path}: pasta holds no metadata of an adapter")
  if found and not tokenizer.knows_tags:
    raise WeightsError(f"{path} speaks of PASTA's tags, which the tokenizer beside it does not have")
  return found


def hf_name(config: ModelConfig, name: str) -> str:
  """Hugging Face's name of a parameter of ours."""
  return rename(name, _NAMES_WITH_POST_NORMS if config.post_norms else _NAMES, "model.layers.")


def _attention(raw: Mapping[str, Any], kind: str) -> dict[str, Any]:
  """What Mistral and the later Gemmas say of attention. Raises KeyError for what is missing."""
  out: dict[str, Any] = {"window": raw.get("sliding_window") or 0}
  if kind == "mistral":
    return out
  if kinds := raw.get("layer_types"):
    out["local_layers"] = tuple(k == _LOCAL for k in kinds)
  else:  # as at first
    out["local_layers"] = local_layers(kind, raw["num_hidden_layers"], raw.get("sliding_window_pattern"))
  if kind == "gemma3_text":
    rope = (raw.get("rope_parameters") or {}).get(_LOCAL, {"rope_theta": raw.get("rope_local_base_freq", 10_000.0)})
    out["local_rope_theta"] = float(rope["rope_theta"])
  return out | {
    "query_scale": raw["query_pre_attn_scalar"] ** -0.5,
    "attention_softcap": raw.get("attn_logit_softcapping") or 0.0,
    "logit_softcap": raw.get("final_logit_softcapping") or 0.0,
  }


def _described_attention(config: ModelConfig) -> dict[str, Any]:
  """The inverse of `_attention`."""
  out: dict[str, Any] = {"sliding_window": config.window or None}
  if config.post_norms:
    out["layer_types"] = [_LOCAL if config.is_local(i) else _GLOBAL for i in range(config.n_layers)]
    out["query_pre_attn_scalar"] = round((config.query_scale or config.head_dim ** -0.5) ** -2)  # a whole number
    out["attn_logit_softcapping"] = config.attention_softcap or None
    out["final_logit_softcapping"] = config.logit_softcap or None
  return out


def _rope_scaling(rope: Mapping[str, Any], context: int) -> RopeScaling | None:
  """Raises KeyError for what is missing, ValueError for a kind that is not supported."""
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind == "default":
    return None
  if kind != "llama3":
    return RopeScaling(kind, float(rope["factor"]))
  return RopeScaling(kind, float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"]),
                     int(rope.get("original_max_position_embeddings", context)))


def _described_rope(config: ModelConfig) -> dict[str, Any]:
  """As transformers before and behind 5 read it."""
  out: dict[str, Any] = {"rope_type": "default"}
  if s := config.rope_scaling:
    out = {"rope_type": s.kind, "factor": s.factor}
    if s.kind == "llama3":
      out |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor,
              "original_max_position_embeddings": s.original_max_position}
  parameters: dict[str, Any] = out | {"rope_theta": config.rope_theta}
  described = {"rope_theta": config.rope_theta} | ({"rope_scaling": out} if config.rope_scaling else {})
  if local := config.local_rope_theta:
    parameters = {_GLOBAL: parameters, _LOCAL: {"rope_type": "default", "rope_theta": local}}
    described["rope_local_base_freq"] = local
  return described | {"rope_parameters": parameters}
