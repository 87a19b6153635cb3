"""Weights of a training run's newest checkpoint, to decode or evaluate a run that has not ended."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pasta_jax.lang.forms import from_metadata
from pasta_jax.lang.syntax import TAG_TEXTS
from pasta_jax.model.config import ModelConfig
from pasta_jax.utils.text import one_line
from pasta_jax.utils.typed import Parsed, checked
from pasta_jax.weights.adapter import Adapter, Merged, check_metadata
from pasta_jax.weights.arrays import WeightsError, param_shapes
from pasta_jax.weights.model_files import faults_of_library

TRAINED = "trainable."  # prefix of the names of trained arrays in a checkpoint (`train.state`)
_MAX_EXPANSION = 1000  # bytes of arrays for each byte on disk, where they are compressed


def is_run(folder: Path) -> bool:
  """Whether a folder is the working directory of a training run."""
  return (folder / "checkpoints").is_dir() and not (folder / "tokenizer.json").exists()


class _About(Parsed):
  """What `train.checkpoints` stores with a state."""

  source: str
  scale: float
  metadata: dict[str, str]


def load_run(
  folder: Path, load: Callable[[str], Any]
) -> tuple[Any, ModelConfig, Mapping[str, Any], dict[str, str]]:
  """(the `checkpoint.Checkpoint` that the run started from, architecture, parameters, adapter's metadata).

  `load` is `load_checkpoint`; it loads the weights that the run started from. Where the newest checkpoint is
  damaged, the one before it is read, and a line on stderr says so. Raises WeightsError, one line, if no
  checkpoint can be read, or if those weights have changed.
  """
  place, about, arrays = _newest(folder)
  try:
    base = load(about.source)
  except WeightsError as error:
    raise WeightsError(f"{place}: the weights that the run started from: {error}") from error
  factors: dict[str, tuple[Any, Any]] = {}
  for name in [n.removesuffix(".lora_a") for n in arrays if n.endswith(".lora_a")]:
    a, b = arrays.pop(f"{name}.lora_a"), arrays.pop(f"{name}.lora_b", None)
    if b is None or not _fit(base.config, name, a, b):
      raise WeightsError(f"{place}: the updates of {name} do not fit the weights that the run started from")
    rest = name.removeprefix("layers.")
    factors |= {f"layers.{i}.{rest}": (a[i], b[i]) for i in range(len(a))}
  tags, head_tags = arrays.pop("embed.tags", None), arrays.pop("head_tags", None)
  base = base.speaking(from_metadata(about.metadata))
  wanted = (len(base.config.tag_ids) or len(TAG_TEXTS), base.config.d_model)
  if tags is not None and tags.shape != wanted or head_tags is not None and head_tags.shape != wanted[::-1]:
    raise WeightsError(f"{place}: the rows of the tags do not fit the weights that the run started from")
  adapter = Adapter(about.scale, factors, tags, head_tags)
  params = _Trained(base.config, arrays, place) if arrays else base.params
  merged = Merged(base.config, params, adapter)
  return base, merged.config, merged, about.metadata if tags is not None else {}


def run_metadata(folder: Path) -> dict[str, str]:
  """The adapter's metadata of `load_run`, without its arrays; {} if no checkpoint has any."""
  for step in _steps(folder):
    try:
      metadata = _about(folder.resolve() / "checkpoints" / str(step) / "about").metadata
    except ValueError:
      continue  # damaged: all checkpoints of a run say the same
    return metadata if "positions" in metadata else {}  # every run with tags names its form
  return {}


def _steps(folder: Path) -> list[int]:
  """Of the checkpoints, the newest first."""
  return sorted((int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdecimal()), reverse=True)


def _newest(folder: Path) -> tuple[Path, _About, dict[str, np.ndarray]]:
  """The newest checkpoint that can be read: its folder, what it says of itself, and its trained arrays."""
  steps = _steps(folder)
  if not steps:
    raise WeightsError(f"{folder}: the run has saved no checkpoint yet")
  reasons = []
  for step in steps:
    place = (folder / "checkpoints" / str(step)).resolve()
    if not (place / "about").is_dir():
      reasons.append(
        f"{place} does not name the weights it belongs to: it was written by an earlier version, or is damaged"
      )
      continue
    try:
      about, arrays = _about(place / "about"), _trained(place / "state")
    except ValueError as error:
      reasons.append(f"{place}: cannot be read: {one_line(str(error), 200)}")
      continue
    if reasons:
      print(f"{reasons[0]}; {place} is used instead", file=sys.stderr)
    return place, about, arrays
  raise WeightsError(reasons[0])


def _about(path: Path) -> _About:
  import orbax.checkpoint as ocp  # slow to import, and only runs need it

  with faults_of_library(), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
    value = reader.restore(path)
  about = checked(_About, value, "about")
  check_metadata(about.metadata)
  return about


def _trained(state: Path) -> dict[str, np.ndarray]:
  """Trained arrays by name, layers stacked; nothing else of the state is read. Raises ValueError if they are
  damaged."""
  import orbax.checkpoint as ocp

  with faults_of_library(), ocp.PyTreeCheckpointer() as reader:
    described = reader.metadata(state).item_metadata.tree
    wanted = {
      name: jax.ShapeDtypeStruct(m.shape, m.dtype)
      for name, m in described.items()
      if name.startswith(TRAINED)
    }
    stored = sum(file.stat().st_size for file in state.rglob("*") if file.is_file())
    claimed = sum(math.prod(m.shape) * m.dtype.itemsize for m in wanted.values())
    if claimed > _MAX_EXPANSION * stored:  # checked before it is allocated
      raise ValueError(f"{claimed} bytes of arrays in {stored} bytes of files")
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    read = reader.restore(state, args=ocp.args.PyTreeRestore(wanted, restore_args=how, partial_restore=True))
  return {name.removeprefix(TRAINED).removesuffix(".value"): np.asarray(x) for name, x in read.items()}


def _fit(config: ModelConfig, name: str, a: np.ndarray, b: np.ndarray) -> bool:
  """Whether stacked low-rank factors are [L, in, r] and [L, r, out] of the kernels `name`."""
  kernel = param_shapes(config).get(name.replace("layers.", "layers.0.", 1) + ".kernel")
  if kernel is None or a.ndim != 3:
    return False
  layers, rank = config.n_layers, a.shape[2]
  return a.shape == (layers, kernel[0], rank) and b.shape == (layers, rank, kernel[1])


class _Trained(Mapping[str, np.ndarray]):
  """Parameters of a run that trained all of them, named as in `arrays.param_shapes`."""

  def __init__(self, config: ModelConfig, arrays: Mapping[str, np.ndarray], place: Path):
    self._shapes, self._arrays = param_shapes(config), arrays
    for name, shape in self._shapes.items():
      try:
        found = self[name].shape
      except LookupError:
        raise WeightsError(f"{place}: {name} is missing") from None
      if found != shape:
        raise WeightsError(
          f"{place}: {name} has shape {list(found)}, but now {list(shape)} in the weights that the run "
          "started from"
        )

  def __iter__(self) -> Iterator[str]:
    return iter(self._shapes)

  def __len__(self) -> int:
    return len(self._shapes)

  def __getitem__(self, name: str) -> np.ndarray:
    if name.startswith("layers."):
      _, i, rest = name.split(".", 2)
      return self._arrays[f"layers.{rest}"][int(i)]
    return self._arrays[name]
