"""The file of an adapter, and weights with an adapter merged into them.

`model.lora` adds adapters to models for training.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np

from pasta_jax.config.sections import OWN_SETTINGS, Decode
from pasta_jax.lang import forms
from pasta_jax.lang.syntax import TAG_TEXTS
from pasta_jax.model.config import ModelConfig
from pasta_jax.model.lora import Adapter, adapter_of, merged_kernel, put
from pasta_jax.model.transformer import Transformer
from pasta_jax.utils.files import atomic_path
from pasta_jax.utils.json_io import parse_json, to_json
from pasta_jax.utils.typed import checked
from pasta_jax.weights.arrays import WeightsError, aligned_empty, param_shapes, read_into
from pasta_jax.weights.model_files import PLAIN_TYPES, faults_of_library, inside, open_tensors, save_tensors

FORMAT = "pasta-jax-adapter-1"
# How a file stores the low-rank factors; its header names any but the first. Tag rows are bfloat16 in both.
# int8: each rank component (a column of lora_a, a row of lora_b) is integers from -127 to 127 times one float32 of
# "NAME.lora_a.scale" or "NAME.lora_b.scale" [r]: training changes components by different amounts.
Storage = Literal["bfloat16", "int8"]
STORAGES = get_args(Storage)
_FACTORS = (".lora_a", ".lora_b")  # [in, r] and [r, out]
_MAX_SCALE = 1e6  # of updates and of rank components; usual ones are below 100


class AdapterError(ValueError):
  """An adapter cannot be read, or was made for another model. The message is one line."""


def signature(config: ModelConfig) -> dict[str, int]:
  """The sizes in which an adapter must match the model that it is put on."""
  return {
    "layers": config.n_layers,
    "d_model": config.d_model,
    "d_ff": config.d_ff,
    "heads": config.n_heads,
    "kv_heads": config.n_kv_heads,
    "vocabulary": config.vocab_size,
  }


def write_adapter(
  path: Path, adapter: Adapter, config: ModelConfig, *, storage: Storage = "bfloat16"
) -> None:
  """Writes an adapter of the model `config` as one safetensors file, atomically."""
  belongs = signature(config) | ({"tags": config.tag_ids} if adapter.tags is not None else {})
  header = {"format": FORMAT, "scale": repr(adapter.scale), "model": to_json(belongs), **adapter.metadata}
  write_file(path, adapter._replace(metadata=header), storage)


def write_file(path: Path, adapter: Adapter, storage: Storage) -> None:
  """`write_adapter` for an adapter whose metadata are the whole header of a file, as those of `read_file`."""
  rows = {"embed.tags": adapter.tags, "head.tags": adapter.head_tags}
  arrays = {name: np.asarray(x).astype(ml_dtypes.bfloat16) for name, x in rows.items() if x is not None}
  for name, pair in adapter.factors.items():
    for end, factor in zip(_FACTORS, pair):
      arrays |= _stored(name + end, np.asarray(factor), storage)
  header = {name: value for name, value in adapter.metadata.items() if name != "storage"}
  header |= {"storage": storage} if storage != STORAGES[0] else {}
  with atomic_path(path) as temporary:
    save_tensors(temporary, arrays, header)


def _stored(name: str, factor: np.ndarray, storage: Storage) -> dict[str, np.ndarray]:
  """The arrays of a file for one factor, by name."""
  if storage == "bfloat16":
    return {name: factor.astype(ml_dtypes.bfloat16)}
  factor, within = factor.astype(np.float32), _within(name)
  scale = np.abs(factor).max(within) / 127  # [r]
  scale = np.maximum(scale, np.finfo(np.float32).tiny)  # not 0 where a component is
  return {name: np.rint(factor / np.expand_dims(scale, within)).astype(np.int8), f"{name}.scale": scale}


def _within(name: str) -> int:
  """The axis of a factor along which one rank component runs."""
  return 0 if name.endswith(".lora_a") else 1


def save_adapter(path: Path, model: Transformer, metadata: Mapping[str, str]) -> None:
  """Writes the updates and tag rows of a model, whose layers may be stacked (`write_adapter`)."""
  write_adapter(path, adapter_of(model)._replace(metadata=metadata), model.config)


def load_adapter(path: Path, model: Transformer) -> Mapping[str, str]:
  """Puts the adapter of a file on a model, in place; returns the file's metadata.

  Raises AdapterError if the file cannot be read or does not fit; the model is then unchanged.
  """
  adapter = read_adapter(path, model.config)
  put(adapter, model)
  return adapter.metadata


def form_of(path: Path | None) -> forms.Forms:
  """The form of the language that an adapter speaks; the paper's without one. Raises as `read_metadata`."""
  return forms.Forms() if path is None else forms.from_metadata(read_metadata(path))


def read_metadata(path: Path) -> dict[str, str]:
  """The header of an adapter's file. Raises AdapterError if it cannot be read."""
  return _header(path)[0]


def check_metadata(metadata: Any) -> None:
  """Refuses metadata of an adapter that other modules would fail on: the form of the language, the settings of
  decoding and the speeds that it was trained for are JSON of known types.

  Raises ValueError that names the field.
  """
  values = checked(dict[str, str], metadata, "metadata")
  forms.from_metadata(values)
  own_settings(values)
  try:
    checked(list[int], parse_json(values.get("speeds", "[]")), "not a list of speeds")
  except ValueError as error:
    raise ValueError(f"speeds: {error}") from error


def settings_entry(decode: Decode, before: Mapping[str, str] | None = None) -> dict[str, str]:
  """The entry of an adapter's header for its own settings of decoding: those that are given, and the others of
  `before`, the header of the adapter that training went on from; {} for none."""
  given = own_settings(before or {})
  given |= {name: value for name in OWN_SETTINGS if (value := getattr(decode, name)) is not None}
  return {"decode": to_json(given)} if given else {}


def own_settings(metadata: Mapping[str, str]) -> dict[str, float]:
  """The inverse: settings of decoding that an adapter carries, for `Decode.resolved`. Raises ValueError, one line
  that names the field, for a damaged entry."""
  try:
    own: dict[str, Any] = checked(
      dict[str, int | float], parse_json(metadata.get("decode", "{}")), "not settings"
    )
    if unknown := sorted(own.keys() - OWN_SETTINGS.keys()):
      raise ValueError(f"{unknown[0]!r} is none of {', '.join(OWN_SETTINGS)}: it is of a newer version")
    decode = dataclasses.replace(Decode(), **own)
  except ValueError as error:
    raise ValueError(f"decode: {error}") from error
  return {name: getattr(decode, name) for name in own}


def weights_of(path: Path) -> Path | None:
  """The folder of the trained weights that an adapter belongs to, next to its file; None if only the adapter
  was trained.

  Raises AdapterError if the file cannot be read, or the folder is missing or elsewhere.
  """
  name = read_metadata(path).get("base")
  if name is None:
    return None
  try:
    folder = inside(path.parent, name)
  except ValueError as error:
    raise AdapterError(f"{path}: base {error}") from error
  if not folder.is_dir():
    raise AdapterError(
      f"{path} belongs to the weights in {folder}, which is not there: keep both in one folder"
    )
  return folder


def has_tags(path: Path) -> bool:
  """Whether an adapter's file has tag rows, that is, whether it is a PASTA adapter. Raises as
  `read_metadata`."""
  return "embed.tags" in _header(path)[1]


def _header(path: Path) -> tuple[dict[str, str], list[str]]:
  """(metadata, names of the arrays)."""
  file = _open(path)
  metadata = file.metadata() or {}
  try:
    check_metadata(metadata)
  except ValueError as error:
    raise AdapterError(f"{path}: the header is damaged: {error}") from error
  return metadata, list(file.keys())


def _open(path: Path) -> Any:
  if not path.is_file():
    raise AdapterError(f"no adapter file at {path}")
  try:
    return open_tensors(path)
  except WeightsError as error:
    raise AdapterError(f"{path} is not a readable safetensors file: {error.__cause__}") from None


def _arrays(path: Path, storage: str) -> dict[str, np.ndarray]:
  """The arrays of a file, in float32, factors without their scales. Raises AdapterError for numbers that cannot be
  read, or are not finite."""
  file, arrays = _open(path), {}
  for name in file.keys():  # noqa: SIM118  (not a dict)
    types = ("I8",) if storage == "int8" and name.endswith(_FACTORS) else PLAIN_TYPES
    if (kind := file.get_slice(name).get_dtype()) not in types:
      raise AdapterError(f"{path}: {name} has type {kind}: only {', '.join(types)} can be read")
    try:
      with faults_of_library():
        arrays[name] = file.get_tensor(name).astype(np.float32)
    except ValueError as error:
      raise AdapterError(f"{path} is not a readable safetensors file: {error}") from None
  if storage == "int8":
    for name in [n for n in arrays if n.endswith(_FACTORS)]:
      arrays[name] = _dequantised(path, name, arrays[name], arrays.pop(f"{name}.scale", None))
  for name, array in arrays.items():
    # The sum is fast, and not finite if a number is not (or if it is too large itself).
    if not np.isfinite(array.sum()) and not np.isfinite(array).all():
      raise AdapterError(f"{path}: {name} has numbers that are not finite")
  return arrays


def _dequantised(path: Path, name: str, factor: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
  """A factor of int8 numbers times the scales [r] of its rank components. Raises AdapterError for damaged scales."""
  if scale is None:
    raise AdapterError(f"{path}: {name}.scale is missing")
  within = _within(name)
  if factor.ndim != 2 or scale.shape != (factor.shape[1 - within],):
    raise AdapterError(
      f"{path}: {name} and its scale have shapes {factor.shape} and {scale.shape}: not one scale per rank component"
    )
  if not ((scale > 0) & (scale <= _MAX_SCALE)).all():  # NaN neither
    raise AdapterError(f"{path}: {name}.scale has numbers that are not above 0 and at most {_MAX_SCALE:g}")
  return factor * np.expand_dims(scale, within)


def read_file(path: Path) -> tuple[Adapter, dict[str, int], tuple[int, ...]]:
  """The adapter of a file, in float32; the `signature` of the model that it was made for, and the vocabulary rows of
  its tags there, () for additional ones. Raises AdapterError if it cannot be read."""
  metadata = read_metadata(path)
  if metadata.get("format") != FORMAT:
    raise AdapterError(
      f"{path} is not a pasta-jax adapter (format {metadata.get('format')!r:.40}, not {FORMAT!r})"
    )
  try:
    model = checked(dict[str, int | list[int]], parse_json(metadata["model"]), "model")
    ids = tuple(checked(list[int], model.pop("tags", []), "tags"))
    sizes, scale = checked(dict[str, int], model, "model"), float(metadata["scale"])
  except (KeyError, ValueError):
    raise AdapterError(f"{path}: the header has no model or no scale") from None
  if not abs(scale) <= _MAX_SCALE:  # NaN neither
    raise AdapterError(f"{path}: scale {scale} is not a usable number")
  if (storage := metadata.get("storage", STORAGES[0])) not in STORAGES:
    raise AdapterError(
      f"{path}: storage {storage!r:.40} is none of {', '.join(STORAGES)}: it is of a newer version"
    )
  arrays = _arrays(path, storage)
  tags, head_tags = arrays.pop("embed.tags", None), arrays.pop("head.tags", None)
  factors = {}
  for name in sorted({n[: -len(end)] for n in arrays for end in _FACTORS if n.endswith(end)}):
    a, b = (arrays.pop(name + end, None) for end in _FACTORS)
    if a is None or b is None:
      raise AdapterError(f"{path} has only one factor of {name}")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
      raise AdapterError(
        f"{path}: factors of {name} have shapes {a.shape} and {b.shape}, which have no product"
      )
    factors[name] = a, b
  if arrays:
    raise AdapterError(f"{path} has {min(arrays)}, which is no part of an adapter")
  return Adapter(scale, factors, tags, head_tags, metadata), sizes, ids


def read_adapter(path: Path, config: ModelConfig) -> Adapter:
  """The adapter of a file, in float32. Raises AdapterError if it cannot be read or does not fit the model."""
  adapter, sizes, ids = read_file(path)
  for key, value in signature(config).items():
    if sizes.get(key) != value:
      raise AdapterError(f"{path} was made for another model: {key} is {sizes.get(key)}, not {value}")

  tags, head_tags = adapter.tags, adapter.head_tags
  if tags is not None and ids != config.tag_ids:
    there, here = (
      f"vocabulary rows {', '.join(map(str, i))}" if i else "additional vocabulary rows"
      for i in (ids, config.tag_ids)
    )
    raise AdapterError(f"{path} has its tags in {there}, this model in {here}: train a new adapter")
  if tags is not None and tags.shape != (wanted := (len(ids) or len(TAG_TEXTS), config.d_model)):
    raise AdapterError(f"{path}: embed.tags has shape {tags.shape}, not {wanted}")
  if config.tie_embeddings and head_tags is not None:
    raise AdapterError(f"{path} has head.tags, which this model does not have")
  if not config.tie_embeddings and (None if tags is None else tags.shape[::-1]) != (
    None if head_tags is None else head_tags.shape
  ):
    raise AdapterError(f"{path}: embed.tags and head.tags do not match, or one is missing")
  kernels = param_shapes(config)
  for name, (a, b) in adapter.factors.items():
    kernel = kernels.get(f"{name}.kernel") if name.startswith("layers.") else None
    if kernel is None:
      raise AdapterError(f"{path} has {name}.lora_a, which this model does not have")
    if (a.shape[0], b.shape[1]) != kernel:
      raise AdapterError(
        f"{path}: factors of {name} have shapes {a.shape} and {b.shape}, its kernel {kernel}"
      )
  return adapter


def merged_config(config: ModelConfig, tags: int, *, untied: bool = False) -> ModelConfig:
  """The architecture in which `tags` rows of tags, at `config.tag_ids` or after all others, are rows of the vocabulary;
  with `untied` the head is separate."""
  ids, size = config.tag_ids, config.vocab_size
  if tags:
    ids = ids or tuple(range(size, size + tags))
    size = max(size, *(i + 1 for i in ids))
  tied = config.tie_embeddings and not untied
  return dataclasses.replace(config, vocab_size=size, tag_ids=ids, tie_embeddings=tied)


class Merged(Mapping[str, np.ndarray]):
  """Parameters with an adapter merged into them: updates added to kernels, tag rows written to the vocabulary
  at `config.tag_ids`.

  Lazy: each array is computed when it is read. With `untied` a tied head becomes a separate one, stored [D,
  V].
  """

  def __init__(
    self, config: ModelConfig, params: Mapping[str, Any], adapter: Adapter | None, *, untied: bool = False
  ):
    self._params, self._adapter, self._rows = params, adapter, config.vocab_size
    self._tied = config.tie_embeddings
    tags = 0 if adapter is None or adapter.tags is None else len(adapter.tags)
    self.config = merged_config(config, tags, untied=untied)
    self._shapes = param_shapes(self.config)

  def __iter__(self) -> Iterator[str]:
    return iter(self._shapes)

  def __len__(self) -> int:
    return len(self._shapes)

  def __getitem__(self, name: str) -> np.ndarray:
    out = aligned_empty(self._shapes[name], np.float32)
    self.read_into(name, out)
    return out

  def read_into(self, name: str, out: np.ndarray) -> None:
    """Fills `out`, which has the parameter's shape and any float dtype."""
    tags = head_tags = factors = None
    if self._adapter is not None:
      tags, head_tags = self._adapter.tags, self._adapter.head_tags
      factors = self._adapter.factors.get(name.removesuffix(".kernel"))
    ids = list(self.config.tag_ids)
    if name == "embed.embedding" or name == "head.kernel" and self._tied:
      rows = out if name == "embed.embedding" else out.T
      read_into(self._params, "embed.embedding", rows[: self._rows])
      if tags is not None:
        rows[ids] = np.asarray(tags)
    elif name == "head.kernel":
      read_into(self._params, name, out[:, : self._rows])
      if head_tags is not None:
        out[:, ids] = np.asarray(head_tags)
    elif factors is not None and self._adapter is not None:
      kernel = np.asarray(self._params[name], np.float32)
      a, b = (np.asarray(f, np.float32) for f in factors)
      out[...] = merged_kernel(kernel, (a, b), self._adapter.scale)
    else:
      read_into(self._params, name, out)
