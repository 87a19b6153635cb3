"""Llama-family models in Hugging Face's folder format: config.json, *.safetensors, tokenizer files."""

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors then returns)
import numpy as np
from numpy.typing import ArrayLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pasta_jax.model.config import ModelConfig
from pasta_jax.model.tokenizer import Tokenizer
from pasta_jax.model.weights import WeightsError, collect, read_json, rename

_NAMES = {
  "embed.embedding": "model.embed_tokens.weight",
  "attn_norm.scale": "input_layernorm.weight",
  "attn.q.kernel": "self_attn.q_proj.weight",
  "attn.k.kernel": "self_attn.k_proj.weight",
  "attn.v.kernel": "self_attn.v_proj.weight",
  "attn.o.kernel": "self_attn.o_proj.weight",
  "mlp_norm.scale": "post_attention_layernorm.weight",
  "mlp.gate.kernel": "mlp.gate_proj.weight",
  "mlp.up.kernel": "mlp.up_proj.weight",
  "mlp.down.kernel": "mlp.down_proj.weight",
  "final_norm.scale": "model.norm.weight",
  "head.kernel": "lm_head.weight",
}
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


def load_hf_folder(folder: Path, progress: bool) -> tuple[ModelConfig, dict[str, np.ndarray], Tokenizer]:
  """Architecture, parameters (see `weights.param_shapes`) and tokenizer of a Hugging Face folder.

  Raises:
    WeightsError: a file is missing or damaged, another architecture than llama, a feature of llama that
      the decoder lacks (biases, scaled RoPE), or tensors that do not fit config.json.
  """
  config = _config(folder / "config.json")
  tokenizer = Tokenizer.from_file(folder / "tokenizer.json", folder / "tokenizer_config.json")
  if tokenizer.vocab_size > config.vocab_size:
    raise WeightsError(f"{folder}: {tokenizer.vocab_size} tokens, but only {config.vocab_size} embeddings")

  with contextlib.ExitStack() as stack:
    file_of: dict[str, Any] = {}  # tensor → open file; `safe_open` has no public type
    stored: dict[str, tuple[int, ...]] = {}
    for path in _shards(folder):
      file = stack.enter_context(_open(path))
      for name in file.keys():  # noqa: SIM118  (not a dict)
        if _redundant(name, config):
          continue
        if name in file_of:
          raise WeightsError(f"{path}: tensor {name} is in another file already")
        file_of[name], stored[name] = file, tuple(file.get_slice(name).get_shape())
    params = collect(
      config,
      folder,
      lambda name: rename(name, _NAMES, "model.layers."),
      stored,
      lambda _, theirs: file_of[theirs].get_tensor(theirs),
      progress,
    )
  return config, params, tokenizer


def save_hf_folder(folder: Path, config: ModelConfig, params: Mapping[str, ArrayLike], tokenizer: Tokenizer) -> Path:
  """Writes a model so that `load_hf_folder` and `transformers` read it, float32; returns the file of its tensors.

  The folder is made under another name first: it is there whole or not at all. One that stood there before
  is replaced.
  """
  temporary = folder.with_name(folder.name + ".tmp")
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir(parents=True)
  tensors = {}
  for name, x in params.items():
    x = np.asarray(x, np.float32)
    tensors[rename(name, _NAMES, "model.layers.")] = np.ascontiguousarray(x.T if name.endswith(".kernel") else x)
  save_file(tensors, temporary / _SINGLE, {"format": "pt"})
  described = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", vocab_size=config.vocab_size,
    hidden_size=config.d_model, num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
    num_key_value_heads=config.n_kv_heads, head_dim=config.head_dim, intermediate_size=config.d_ff,
    rope_theta=config.rope_theta, rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tie_embeddings,
    max_position_embeddings=config.max_position, eos_token_id=tokenizer.eos_id, bos_token_id=tokenizer.bos_id,
    dtype="float32")
  (temporary / "config.json").write_text(json.dumps(described, indent=2) + "\n")
  tokenizer.save(temporary)
  shutil.rmtree(folder, ignore_errors=True)
  temporary.replace(folder)
  return folder / _SINGLE


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


def _redundant(name: str, config: ModelConfig) -> bool:
  """Tensors that old exports write although they follow from the rest: RoPE's table, a tied head."""
  return name.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and name == _NAMES["head.kernel"])


def _config(path: Path) -> ModelConfig:
  raw = read_json(path)
  if (kind := raw.get("model_type")) != "llama":
    raise WeightsError(f"{path}: architecture {kind!r} is not supported, only 'llama'")
  for feature in ("attention_bias", "mlp_bias"):
    if raw.get(feature):
      raise WeightsError(f"{path}: {feature} is not supported")
  if (activation := raw.get("hidden_act", "silu")) != "silu":
    raise WeightsError(f"{path}: activation {activation!r} is not supported, only 'silu'")
  # transformers 5 writes rope_parameters; before, rope_theta stood alone and rope_scaling beside it.
  rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
  if (scaling := rope.get("rope_type", rope.get("type", "default"))) != "default":
    raise WeightsError(f"{path}: RoPE scaling {scaling!r} is not supported")
  for key in _COUNTS:
    if not isinstance(count := raw.get(key, 1), int | None) or count == 0:
      raise WeightsError(f"{path}: {key} = {count!r} is not a count")
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
      norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
      tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
      max_position=raw.get("max_position_embeddings", 2048),
    )
  except KeyError as error:
    raise WeightsError(f"{path}: {error.args[0]} is missing") from error
  except (ValueError, ZeroDivisionError, TypeError) as error:
    raise WeightsError(f"{path}: {error}") from error
