"""Weights of a training run's newest checkpoint, to decode or evaluate a run that has not ended."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pasta_jax.model.config import ModelConfig
from pasta_jax.weights.adapter import Adapter, Merged
from pasta_jax.weights.arrays import WeightsError, param_shapes

TRAINED = "trainable."  # prefix of the names of trained arrays in a checkpoint (`train.state`)


def is_run(folder: Path) -> bool:
  """Whether a folder is the working directory of a training run."""
  return (folder / "checkpoints").is_dir() and not (folder / "tokenizer.json").exists()


def load_run(
  folder: Path, load: Callable[[str], Any]
) -> tuple[Any, ModelConfig, Mapping[str, Any], dict[str, str]]:
  """(the `checkpoint.Checkpoint` that the run started from, architecture, parameters, adapter's metadata).

  `load` is `load_checkpoint`; it loads the weights that the run started from. Raises WeightsError, one line,
  if no checkpoint can be read, or if those weights have changed.
  """
  import orbax.checkpoint as ocp  # slow to import, and only runs need it

  steps = [int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit()]
  if not steps:
    raise WeightsError(f"{folder}: the run has saved no checkpoint yet")
  place = (folder / "checkpoints" / str(max(steps))).resolve()
  if not (place / "about").is_dir():
    raise WeightsError(
      f"{place} does not name the weights it belongs to: it was written by an earlier version"
    )
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
    about = reader.restore(place / "about")
  base = load(about["source"])
  arrays = _trained(place / "state")
  factors: dict[str, tuple[Any, Any]] = {}
  for name in [n.removesuffix(".lora_a") for n in arrays if n.endswith(".lora_a")]:
    pair = arrays.pop(f"{name}.lora_a"), arrays.pop(f"{name}.lora_b")
    rest = name.removeprefix("layers.")
    factors |= {f"layers.{i}.{rest}": (pair[0][i], pair[1][i]) for i in range(len(pair[0]))}
  tags, head_tags = arrays.pop("embed.tags", None), arrays.pop("head_tags", None)
  adapter = Adapter(about["scale"], factors, tags, head_tags)
  params = _Trained(base.config, arrays, place) if arrays else base.params
  merged = Merged(base.config, params, adapter)
  return base, merged.config, merged, about["metadata"] if tags is not None else {}


def _trained(state: Path) -> dict[str, np.ndarray]:
  """Trained arrays by name, layers stacked; nothing else of the state is read."""
  import orbax.checkpoint as ocp

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
  """Parameters of a run that trained all of them, named as in `arrays.param_shapes`."""

  def __init__(self, config: ModelConfig, arrays: Mapping[str, np.ndarray], place: Path):
    self._shapes, self._arrays = param_shapes(config), arrays
    for name, shape in self._shapes.items():
      if self[name].shape != shape:
        raise WeightsError(
          f"{place}: {name} has shape {list(self[name].shape)}, but now {list(shape)} in the weights that "
          "the run started from"
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
