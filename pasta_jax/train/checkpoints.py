"""Checkpoints of a training run: its state, the input pipeline's state, and what makes weights of them."""

import contextlib
import logging
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from pasta_jax.model import lora
from pasta_jax.model.transformer import Transformer
from pasta_jax.train.state import TrainState
from pasta_jax.utils import distributed
from pasta_jax.utils.text import one_line
from pasta_jax.utils.typed import checked
from pasta_jax.weights.checkpoint import Checkpoint

_OVERHEAD = 2**18  # bytes of a checkpoint's descriptions
START = "start's sha256"  # in an adapter's header: the file that its training went on from
TEACHER = "teacher's sha256"  # and the one whose text it learned


class ForeignCheckpoint(ValueError):
  """A checkpoint of another run or version: it is not damaged, and nothing is taken in its place."""


class Checkpoints:
  """Orbax checkpoints of a TrainState under `workdir/checkpoints`, written in the background."""

  def __init__(self, workdir: Path, every: int, metadata: dict[str, Any], keep: int = 2):
    """`metadata` (`checkpoint_metadata`) is stored with each state; `weights.run_folder` reads it."""
    self._metadata = metadata
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, save_interval_steps=every)
    self._path = (workdir / "checkpoints").resolve()
    # Handlers are named so that shapes can be read before anything is restored.
    handlers = {
      "state": ocp.StandardCheckpointHandler(),
      "data": ocp.JsonCheckpointHandler(),
      "about": ocp.JsonCheckpointHandler(),
    }
    self._manager = ocp.CheckpointManager(self._path, options=options, item_handlers=handlers)

  def save(self, state: TrainState, data: dict[str, Any], *, force: bool = False) -> None:
    """Saves if a save is due at this step (or `force`), with `data`, the state of the input pipeline. The
    state's buffers may be donated as soon as this returns. Raises OSError if this or the last one cannot be
    written."""
    if not force and not self._manager.should_save(int(state.step)):
      return
    self._check_space(state)
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(_by_name(state)),
      data=ocp.args.JsonSave(data),
      about=ocp.args.JsonSave(self._metadata),
    )
    with _one_error(self._path):
      self._manager.save(int(state.step), args=items, force=force)

  def _check_space(self, state: TrainState) -> None:
    """Orbax finds a full disk in several threads, and half-way."""
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _OVERHEAD
    if distributed.is_first() and (free := shutil.disk_usage(self._path).free) < needed:
      raise OSError(
        f"{self._path}: a checkpoint needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free: make room and "
        "start the same command again"
      )

  def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest usable checkpoint's state, with the shapes and shardings of `like`, and its pipeline state;
    None if there is no checkpoint.

    A damaged one is moved out of the way, to `workdir/damaged-STEP`, and the one before it is taken. Raises
    ValueError, one line, if the checkpoint has other arrays than `like`, or if all are damaged.
    """
    damaged = ""
    for step in sorted(self._manager.all_steps(), reverse=True):
      restored, fault = None, ""
      try:
        restored = self._read(step, like)
      except ForeignCheckpoint:
        raise
      except Exception as error:  # Orbax and TensorStore raise many types for damaged files
        fault = one_line(f"{type(error).__name__}: {error}", 120)
      if not distributed.any_of(bool(fault)):
        return restored
      damaged = f"the checkpoint of step {step} is damaged ({fault or 'on another host'})"
      distributed.from_first(partial(self._set_aside, step, damaged))
      self._manager.reload()
    if damaged:
      raise ValueError(f"{self._path}: {damaged}, and there is no older one: choose another --workdir")
    return None

  def _set_aside(self, step: int, message: str) -> None:
    aside = self._path.parent / f"damaged-{step}"
    shutil.rmtree(aside, ignore_errors=True)
    (self._path / str(step)).rename(aside)
    print(f"{message}: it is {aside} now, and the run continues from the one before it", file=sys.stderr)

  def _read(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """One checkpoint. Raises ForeignCheckpoint if it has other arrays than `like`; anything if damaged."""
    wanted = _by_name(like)
    if not all((self._path / str(step) / item).is_dir() for item in ("state", "data")):
      raise ForeignCheckpoint(
        f"{self._path / str(step)} is of an earlier version of this program: choose another --workdir"
      )
    stored = {name: array.shape for name, array in self._manager.item_metadata(step).state.tree.items()}
    for name in sorted(wanted.keys() | stored.keys()):
      here = wanted[name].shape if name in wanted else None
      if stored.get(name) != here:
        there, here = (("absent" if s is None else f"{list(s)}") for s in (stored.get(name), here))
        raise ForeignCheckpoint(
          f"{self._path} belongs to a run with another model or configuration: {name} is "
          f"{there} there, {here} here; choose another --workdir, or the settings of that run"
        )
    self._check_adapters(step)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
    saved = self._manager.restore(
      step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
    )
    data = checked(dict[str, Any], saved.data, "data")
    # By name: the leaves of a dict are sorted, those of the state are in the order of its fields.
    return jax.tree.unflatten(jax.tree.structure(like), [saved.state[name] for name in wanted]), data

  def _check_adapters(self, step: int) -> None:
    """Raises ForeignCheckpoint if the run went on from another adapter, whose scale is not in the state, or had
    another teacher."""
    stored: dict[str, Any] = {}
    if (self._path / str(step) / "about").is_dir():
      found = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
      stored = checked(dict[str, Any], found.get("metadata") or {}, "metadata")
    now = self._metadata.get("metadata") or {}
    for key, did, setting in ((START, "went on from", "start"), (TEACHER, "learned from", "teacher")):
      if stored.get(key) != now.get(key):
        raise ForeignCheckpoint(
          f"{self._path} belongs to a run that {did} another adapter: choose another --workdir, or the "
          f"train.{setting} of that run, unchanged"
        )

  def close(self) -> None:
    """Waits until the last save is on disk. Raises OSError if it cannot be written."""
    with _one_error(self._path):
      self._manager.wait_until_finished()
      self._manager.close()


@contextlib.contextmanager
def _one_error(path: Path) -> Iterator[None]:
  """What Orbax raises, of many types, as one OSError; it has logged it with its stack by then, in each thread."""
  logger = logging.getLogger("absl")
  logger.addFilter(_not_orbax)
  try:
    yield
  except Exception as error:
    raise OSError(f"{path}: no checkpoint could be written ({one_line(str(error), 200)})") from error
  finally:
    logger.removeFilter(_not_orbax)


def _not_orbax(record: logging.LogRecord) -> bool:
  return "orbax" not in record.pathname


def checkpoint_metadata(
  checkpoint: Checkpoint, model: Transformer, metadata: dict[str, str]
) -> dict[str, Any]:
  """What `Checkpoints` stores with the states of a run that started from `checkpoint`; `metadata` is the
  header of its adapter."""
  scales = [module.lora_scale for module in lora.linears(model).values() if module.lora_a is not None]
  return {"source": checkpoint.source, "scale": scales[0] if scales else 1.0, "metadata": metadata}


def _by_name(state: TrainState) -> dict[str, Any]:
  """The state's leaves under stable names, which `weights.run_folder` knows: checkpoints do not depend on
  classes of optax or NNX."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
