"""The newest checkpoint of a training run as weights: to decode or evaluate a run that has not ended."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from pasta_jax.model.config import ModelConfig
from pasta_jax.weights.adapter import Adapter, Merged
from pasta_jax.weights.arrays import WeightsError, param_shapes

TRAINED = "trainable."  # what the names of trained arrays begin with in a checkpoint (`train.state`)


def is_run(folder: Path) -> bool:
  """Whether a folder is that of a training run."""
  return (folder / "checkpoints").is_dir() and not (folder / "tokenizer.json").exists()


def load_run(
  folder: Path, load: Callable[[str], Any]
) -> tuple[Any, ModelConfig, Mapping[str, Any], dict[str, str]]:
  """(the `checkpoint.Checkpoint` that the run began with, architecture, parameters, adapter's metadata).

  `load` is `load_checkpoint`, for the weights that the run began with. Raises WeightsError, one line, if no
  checkpoint can be read, or those weights are others now.
  """
  steps = [int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit()]
  if not steps:
    raise WeightsError(f"{folder}: the run has saved no checkpoint yet")
  place = (folder / "checkpoints" / str(max(steps))).resolve()
  if not (place / "about").is_dir():
    raise WeightsError(f"{place} does not say which weights it belongs to: it is of an earlier version")
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
    about = reader.restore(place / "about")
  base = load(about["source"])
  found = _trained(place / "state")
  factors: dict[str, tuple[Any, Any]] = {}
  for name in [n.removesuffix(".lora_a") for n in found if n.endswith(".lora_a")]:
    pair = found.pop(f"{name}.lora_a"), found.pop(f"{name}.lora_b")
    rest = name.removeprefix("layers.")
    factors |= {f"layers.{i}.{rest}": (pair[0][i], pair[1][i]) for i in range(len(pair[0]))}
  tags, head_tags = found.pop("embed.tags", None), found.pop("head_tags", None)
  adapter = Adapter(about["scale"], factors, tags, head_tags)
  whole = Merged(base.config, _Trained(base.config, found, place) if found else base.params, adapter)
  return base, whole.config, whole, about["metadata"] if tags is not None else {}


def _trained(state: Path) -> dict[str, np.ndarray]:
  """Trained arrays by name, layers stacked; nothing else of the state is read."""
  with ocp.PyTreeCheckpointer() as reader:
    described = reader.metadata(state).item_metadata.tree
    wanted = {
      name: jax.ShapeDtypeStruct(m.shape, m.dtype)
      for name, m in described.items()
      if name.startswith(TRAINED)
    }
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    read = reader.restore(state, args=ocp.args.PyTreeRestore(wanted, restore_args=how, partial_restore=True))
  return {name.removeprefix(TRAINED).removesuffix(".value"): np.asarray(x) for name, x in read.items()}


class _Trained(Mapping[str, np.ndarray]):
  """Parameters that were all trained, named as in `weights.param_shapes`."""

  def __init__(self, config: ModelConfig, arrays: Mapping[str, np.ndarray], place: Path):
    self._shapes, self._arrays = param_shapes(config), arrays
    for name, shape in self._shapes.items():
      if self[name].shape != shape:
        raise WeightsError(
          f"{place}: {name} is {list(self[name].shape)}, the weights that the run began with have "
          f"{list(shape)} now"
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
