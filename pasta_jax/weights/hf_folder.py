"""Models in Hugging Face's folder format: config.json, *.safetensors, tokenizer files."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pasta_jax.lang.forms import from_metadata
from pasta_jax.lang.syntax import token_texts
from pasta_jax.model.config import ModelConfig
from pasta_jax.utils.files import atomic_folder
from pasta_jax.utils.typed import checked
from pasta_jax.weights.adapter import check_metadata
from pasta_jax.weights.arrays import StoredParams, WeightsError, collect, param_shapes, rename
from pasta_jax.weights.hf_config import has_vision, parse_config, to_hf_config
from pasta_jax.weights.model_files import (
  PLAIN_TYPES,
  inside,
  open_tensors,
  read_json,
  save_tensors,
  write_json,
)
from pasta_jax.weights.tokenizer import Tokenizer

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
  "mlp_norm.scale": "post_attention_layernorm.weight",  # in models without post-norms
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
# In models with a vision part: prefixes of the text part's tensors -> the same in a folder of the text part
# alone.
_TEXT_PART = {
  "language_model.model.": "model.",
  "model.language_model.": "model.",
  "language_model.": "",
  "lm_head.": "lm_head.",
}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def load_hf_folder(
  folder: Path, progress: bool
) -> tuple[ModelConfig, StoredParams, Tokenizer, dict[str, str]]:
  """Architecture, parameters (see `arrays.param_shapes`), tokenizer, and the `pasta` of `save_hf_folder`.

  The folder's tensors decide whether the head is tied.

  Raises:
    WeightsError: a file is missing or damaged, the architecture or one of its features is not supported, or
      the tensors do not fit config.json.
  """
  described = read_json(folder / "config.json")
  config = parse_config(described, folder / "config.json")
  stored: dict[str, Any] = {}  # tensors that are not read yet; they keep their files open and mapped
  for path in _shards(folder):
    file = open_tensors(path)
    for stored_name in file.keys():  # noqa: SIM118  (not a dict)
      name = _text_part_name(stored_name) if has_vision(described) else stored_name
      if name is None or name.endswith("rotary_emb.inv_freq"):  # RoPE's table, which config.json determines
        continue
      if name in stored:
        raise WeightsError(f"{path}: tensor {name} is also in another file")
      stored[name] = file.get_slice(stored_name)
      if (kind := stored[name].get_dtype()) not in PLAIN_TYPES:
        raise WeightsError(
          f"{path}: tensor {stored_name} has type {kind}: only {', '.join(PLAIN_TYPES)} can be read"
        )
  config = _tied(config, stored)
  params = collect(
    config,
    folder,
    lambda name: hf_name(config, name),
    {name: tuple(tensor.get_shape()) for name, tensor in stored.items()},
    lambda _, theirs, rows: stored[theirs][rows],
    progress,
  )
  tokenizer = Tokenizer.from_folder(folder, config.vocab_size)  # after the sizes are known to be true
  return config, params, tokenizer, _pasta(described, folder / "config.json", tokenizer)


def save_hf_folder(
  folder: Path, config: ModelConfig, params: Mapping[str, ArrayLike], tokenizer: Tokenizer, **settings: Any
) -> list[Path]:
  """Writes a model for `load_hf_folder` and `transformers`, atomically, replacing an existing folder. Returns
  the files of its tensors. `settings` are those of `fill_hf_folder`."""
  with atomic_folder(folder) as temporary:
    files = fill_hf_folder(temporary, config, params, tokenizer, **settings)
  return [folder / file for file in files]


def fill_hf_folder(
  folder: Path,
  config: ModelConfig,
  params: Mapping[str, ArrayLike],
  tokenizer: Tokenizer,
  *,
  dtype: str = "float32",
  pasta: Mapping[str, str] | None = None,
  file_bytes: int = 4 << 30,
) -> list[str]:
  """Writes the files of a model to an empty folder. Returns the names of those of its tensors: each has about
  `file_bytes` at most, and one at a time is in memory.

  `pasta` is for weights with PASTA's tags in the vocabulary, at `config.tag_ids`: the metadata of their
  adapter, which config.json keeps; the tokenizer then has the tags as tokens.

  Raises OSError if a file cannot be written.
  """
  parts: list[list[str]] = [[]]
  size = 0
  for name, shape in param_shapes(config).items():
    bytes_ = math.prod(shape) * np.dtype(dtype).itemsize
    if parts[-1] and size + bytes_ > file_bytes:
      parts.append([])
      size = 0
    parts[-1].append(name)
    size += bytes_
  files = (
    [_SINGLE]
    if len(parts) == 1
    else [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
  )
  for file, names in zip(files, parts):
    tensors = {}
    for name in names:
      x = np.asarray(params[name], dtype)
      tensors[hf_name(config, name)] = np.ascontiguousarray(x.T if name.endswith(".kernel") else x)
    save_tensors(folder / file, tensors, {"format": "pt"})
  if len(files) > 1:
    where = {hf_name(config, name): file for file, names in zip(files, parts) for name in names}
    total = sum((folder / file).stat().st_size for file in files)
    write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": where})
  described = to_hf_config(config, tokenizer) | {"dtype": dtype} | ({"pasta": dict(pasta)} if pasta else {})
  write_json(folder / "config.json", described)
  promise = from_metadata(pasta or {}).promise
  tokenizer.save(folder, token_texts(config.tag_ids, promise) if pasta else None)
  return files


def _shards(folder: Path) -> list[Path]:
  """The weight files: the single one, otherwise those in the index, otherwise all *.safetensors."""
  if (folder / _SINGLE).exists():
    return [folder / _SINGLE]
  if (folder / _INDEX).exists():
    try:
      index = checked(
        dict[str, str], read_json(folder / _INDEX).get("weight_map"), "weight_map is missing or damaged"
      )
      return [inside(folder, name) for name in sorted(set(index.values()))]
    except WeightsError:
      raise
    except ValueError as error:
      raise WeightsError(f"{folder / _INDEX}: {error}") from error
  if paths := sorted(folder.glob("*.safetensors")):
    return paths
  raise WeightsError(f"{folder}: no *.safetensors file")


def _text_part_name(name: str) -> str | None:
  """A tensor's name in a folder of the text part alone; None for tensors of the vision part."""
  return next((new + name.removeprefix(old) for old, new in _TEXT_PART.items() if name.startswith(old)), None)


def _tied(config: ModelConfig, stored: dict[str, Any]) -> ModelConfig:
  """`config`, with `tie_embeddings` as the tensors have it: a head that differs from the embeddings is not
  tied, whatever config.json says (as in transformers 5). Removes the copy of a tied head from `stored`."""
  embedding, head = _NAMES["embed.embedding"], _NAMES["head.kernel"]
  if not config.tie_embeddings or head not in stored:
    return config
  if embedding not in stored:
    stored[embedding] = stored[head]
  else:
    one, other = stored[embedding], stored[head]
    n = (*one.get_shape(), 0)[0]
    rows = [slice(at, min(at + 1024, n)) for at in range(0, n, 1024)]
    if one.get_shape() != other.get_shape() or not all(np.array_equal(one[r], other[r]) for r in rows):
      return dataclasses.replace(config, tie_embeddings=False)
  del stored[head]
  return config


def peft_prefix(folder: Path) -> str:
  """Prefix of the text part's modules in transformers: "model.", or a longer one in models with a vision
  part."""
  path = folder / "config.json"
  return "model.language_model." if path.is_file() and has_vision(read_json(path)) else "model."


def folder_metadata(folder: Path) -> dict[str, str]:
  """Metadata of the adapter that was merged into the weights of a folder; {} if there was none."""
  path = folder / "config.json"
  return _metadata(read_json(path), path) if path.is_file() else {}


def _metadata(described: Mapping[str, Any], path: Path) -> dict[str, str]:
  metadata = described.get("pasta") or {}
  try:
    check_metadata(metadata)
  except ValueError as error:
    raise WeightsError(f"{path}: pasta is not the metadata of an adapter: {error}") from error
  return metadata


def _pasta(described: Mapping[str, Any], path: Path, tokenizer: Tokenizer) -> dict[str, str]:
  """As `folder_metadata`, of what config.json at `path` says."""
  metadata = _metadata(described, path)
  if metadata and not tokenizer.knows_tags:
    raise WeightsError(f"{path} mentions PASTA's tags, which the tokenizer in the same folder does not have")
  return metadata


def hf_name(config: ModelConfig, name: str) -> str:
  """Hugging Face's name of a parameter of ours."""
  return rename(name, _NAMES_WITH_POST_NORMS if config.post_norms else _NAMES, "model.layers.")
