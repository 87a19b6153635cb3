"""PASTA's adapters: low-rank updates and tag rows. Added for training, saved as one file, put back."""

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pasta_jax.model.build import unstack
from pasta_jax.model.decoder import Decoder, Linear, LoraParam, TagParam

FORMAT = "pasta-jax-adapter-1"


class AdapterError(ValueError):
  """An adapter that cannot be read, or that belongs to another model."""


def linears(model: Decoder) -> dict[str, Linear]:
  """The linear modules inside the layers, by path ("layers.0.attn.q"); one entry each where stacked."""
  return {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)
          if isinstance(module, Linear) and path[0] == "layers"}


def add_lora(model: Decoder, rank: int, alpha: float, rngs: nnx.Rngs) -> None:
  """Puts a zero-effect update of the given rank on every linear module of the layers, in place.

  `a` starts normal with variance 1/in, `b` at zero (Hu et al. 2021); the update is scaled by alpha / rank.
  """
  for module in linears(model).values():
    *lead, n_in, n_out = module.kernel.shape
    module.lora_a = LoraParam(jax.random.normal(rngs.params(), (*lead, n_in, rank)) * n_in ** -0.5)
    module.lora_b = LoraParam(jnp.zeros((*lead, rank, n_out)))
    module.lora_scale = alpha / rank


def add_tags(model: Decoder, rows: np.ndarray, head_rows: np.ndarray | None = None) -> None:
  """Gives PASTA's tags rows [6, D] of the vocabulary (`config.tag_ids`), apart from the base's, in place; an untied
  head gets the same, or others."""
  model.embed.tags = TagParam(jnp.asarray(rows, jnp.float32))
  if model.head is not None:
    model.head_tags = TagParam(jnp.asarray(rows if head_rows is None else head_rows, jnp.float32).T)


def save_adapter(path: Path, model: Decoder, metadata: Mapping[str, str]) -> None:
  """Writes the model's updates and tag rows, bfloat16, as one safetensors file; nothing half-written."""
  if not isinstance(model.layers, nnx.List):
    model = unstack(model)
  arrays = {}
  if model.embed.tags is not None:
    arrays["embed.tags"] = model.embed.tags[...]
  if model.head_tags is not None:
    arrays["head.tags"] = model.head_tags[...]
  scale = 1.0
  for name, module in linears(model).items():
    if module.lora_a is not None and module.lora_b is not None:
      arrays[f"{name}.lora_a"], arrays[f"{name}.lora_b"] = module.lora_a[...], module.lora_b[...]
      scale = module.lora_scale
  belongs = model_signature(model) | ({"tags": model.config.tag_ids} if model.embed.tags is not None else {})
  header = {"format": FORMAT, "scale": repr(scale), "model": json.dumps(belongs), **metadata}
  temporary = path.with_name(path.name + ".tmp")
  save_file({k: np.asarray(v.astype(jnp.bfloat16)) for k, v in arrays.items()}, temporary, header)
  temporary.replace(path)


def model_signature(model: Decoder) -> dict[str, int]:
  """What an adapter must agree on with the model that it is put on."""
  c = model.config
  return {"layers": c.n_layers, "d_model": c.d_model, "d_ff": c.d_ff, "heads": c.n_heads,
          "kv_heads": c.n_kv_heads, "vocabulary": c.vocab_size}


def read_metadata(path: Path) -> dict[str, str]:
  """The header of an adapter's file. Raises AdapterError, one line, if it cannot be read."""
  return _header(path)[0]


def weights_of(path: Path) -> Path | None:
  """The folder beside an adapter's file with the weights that it belongs to, where these were trained too; else None.

  Raises AdapterError, one line, if the file cannot be read or the folder is gone.
  """
  name = read_metadata(path).get("base")
  if name is None:
    return None
  folder = path.parent / name
  if not folder.is_dir():
    raise AdapterError(f"{path} belongs to the weights in {folder}, which is not there: keep both in one folder")
  return folder


def has_tags(path: Path) -> bool:
  """Whether an adapter's file holds tag rows: whether it is one of PASTA. Raises as `read_metadata`."""
  return "embed.tags" in _header(path)[1]


def _header(path: Path) -> tuple[dict[str, str], list[str]]:
  """Metadata and names of arrays."""
  if not path.is_file():
    raise AdapterError(f"no adapter file at {path}")
  try:
    with safe_open(path, "numpy") as file:
      return file.metadata() or {}, list(file.keys())
  except (SafetensorError, OSError) as error:
    raise AdapterError(f"{path} is no readable safetensors file: {error}") from None


def load_adapter(path: Path, model: Decoder) -> dict[str, str]:
  """Puts a saved adapter on an unstacked model, in place; returns the file's metadata.

  Raises AdapterError, one line, if the file cannot be read or does not fit; the model is then as it was.
  """
  metadata = read_metadata(path)
  try:
    with safe_open(path, "flax") as file:
      arrays = {name: file.get_tensor(name).astype(jnp.float32) for name in file.keys()}
  except (SafetensorError, OSError) as error:
    raise AdapterError(f"{path} is no readable safetensors file: {error}") from None
  if metadata.get("format") != FORMAT:
    raise AdapterError(f"{path} is no pasta-jax adapter (format {metadata.get('format')!r}, not {FORMAT!r})")
  try:
    theirs, scale = dict(json.loads(metadata["model"])), float(metadata["scale"])
  except (KeyError, ValueError, TypeError):
    raise AdapterError(f"{path}: its header names no model or no scale") from None
  for key, value in model_signature(model).items():
    if theirs.get(key) != value:
      raise AdapterError(
          f"{path} was made for another model: its {key} is {theirs.get(key)}, this one's {value}")

  tags = arrays.pop("embed.tags", None)
  head_tags = arrays.pop("head.tags", None) if model.head is not None else None
  if tags is not None and (at := tuple(theirs.get("tags", ()))) != model.config.tag_ids:
    there, here = (f"rows {', '.join(map(str, i))}" if i else "rows of their own" for i in (at, model.config.tag_ids))
    raise AdapterError(f"{path} has its tags in {there} of the vocabulary, this model in {here}: train it anew")
  if tags is not None and (tags.ndim != 2 or tags.shape[1] != model.config.d_model):
    raise AdapterError(f"{path}: embed.tags is {tags.shape}, not rows of {model.config.d_model}")
  if model.head is not None and (None if tags is None else tags.shape[::-1]) != (
      None if head_tags is None else head_tags.shape):
    raise AdapterError(f"{path}: embed.tags and head.tags do not fit together, or one is missing")
  factors = {}
  for name, module in linears(model).items():
    a, b = arrays.pop(f"{name}.lora_a", None), arrays.pop(f"{name}.lora_b", None)
    if (a is None) != (b is None):
      raise AdapterError(f"{path} holds only one factor of {name}")
    if a is not None and b is not None:
      n_in, n_out = module.kernel.shape
      if a.ndim != 2 or a.shape[0] != n_in or b.shape != (a.shape[1], n_out):
        raise AdapterError(f"{path}: factors of {name} are {a.shape} and {b.shape}, its kernel {n_in, n_out}")
      factors[name] = a, b
  if arrays:
    raise AdapterError(f"{path} holds {min(arrays)}, which this model does not have")

  if tags is not None:
    model.embed.tags = TagParam(tags)
  if head_tags is not None:
    model.head_tags = TagParam(head_tags)
  for name, module in linears(model).items():
    if name in factors:
      module.lora_a, module.lora_b = map(LoraParam, factors[name])
      module.lora_scale = scale
  return metadata
