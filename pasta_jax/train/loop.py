"""The training loop: resume, step, check, log, save; SIGTERM saves and stops.

Resuming: the step number is read from the newest checkpoint, and a step is a function of the state, the seed
and the step number. A run that was killed and resumed is bitwise identical to one that was not.
"""

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pasta_jax.config import current_names
from pasta_jax.config.sections import OWN_SETTINGS
from pasta_jax.data.pipeline import Batch, DataIterator
from pasta_jax.train.checkpoints import Checkpoints
from pasta_jax.train.metrics import MetricWriter
from pasta_jax.train.state import TrainState
from pasta_jax.utils import distributed
from pasta_jax.utils.files import write_atomic
from pasta_jax.utils.json_io import flat, read_json
from pasta_jax.utils.progress import progress_bar
from pasta_jax.utils.waiting import Stopped

Step = Callable[[int, TrainState, Batch], tuple[TrainState, dict[str, float]]]


def run_steps(
  config,
  workdir: Path,
  state: TrainState,
  total: int,
  one_step: Step,
  feed: DataIterator,
  *,
  checkpoint_every: int,
  checkpoint_metadata: dict[str, Any],
) -> TrainState:
  """Runs `one_step(step, state, batch)` up to step `total` with the batches of `feed`; returns the last
  state.

  Leaves checkpoints (with `checkpoint_metadata`, see `checkpoints.checkpoint_metadata`), `metrics.jsonl`,
  `tensorboard/` and `config.json` in `workdir`. The scalars must include `loss` and `gradient_norm`.

  Raises Stopped if one of the processes received SIGTERM, FloatingPointError if one of
  these two scalars is not finite, and ValueError, one line, if an earlier run in `workdir` cannot be resumed.
  """
  if total < 1:
    raise ValueError(f"{total} training steps were requested: at least one is needed")
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(workdir, checkpoint_every, checkpoint_metadata)
  except OSError as error:
    raise ValueError(f"--workdir={workdir} cannot be written: {error.strerror or error}") from None
  stop: list[bool] = []
  previous = signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
  writer = None
  try:
    restored = checkpoints.restore(state)
    state, data = restored or (state, None)
    first = int(state.step)
    if first > total:
      raise ValueError(f"{workdir} is at step {first} already, past the {total} steps requested")
    if data is not None:
      feed.restore(data)
    if distributed.is_first():
      _write_config(workdir / "config.json", config, first)
      writer = MetricWriter(workdir, first)
    bar, task = progress_bar("training", total, first)
    with bar:
      for step in range(first, total):
        started = time.perf_counter()
        batch = feed()
        waited = time.perf_counter() - started
        state, scalars = one_step(step, state, batch)
        scalars["data_wait"] = waited / (time.perf_counter() - started)  # share of the step
        for name in ("loss", "gradient_norm"):  # a bad gradient spoils the state even if the loss is finite
          if not math.isfinite(scalars[name]):
            raise FloatingPointError(
              f"{name} is {scalars[name]} at step {step + 1}; the newest checkpoint is kept"
            )
        if writer is not None:
          writer.write(step + 1, scalars)
        bar.update(task, completed=step + 1, note=f"loss {scalars['loss']:.3f}")
        last = step + 1 == total
        stopping = distributed.any_of(bool(stop))  # read once: a signal during the save stops the next step
        checkpoints.save(state, feed.state(), force=last or stopping)
        if stopping:  # after the last step too: more may follow this training
          raise Stopped(
            f"stopped by SIGTERM after step {step + 1} of {total}; the same command continues from there"
          )
  finally:
    with contextlib.ExitStack() as closing:  # all of them, even if one raises
      closing.callback(signal.signal, signal.SIGTERM, previous)
      if writer is not None:
        closing.callback(writer.close)
      closing.callback(feed.close)
      closing.callback(checkpoints.close)
  return state


def checked_workdir(workdir: str | Path | None) -> Path:
  """The run's folder, which need not exist yet. Raises ValueError if it cannot be created or written."""
  if workdir is None or not str(workdir):
    raise ValueError("training needs a folder for its checkpoints and metrics: pass --workdir=runs/NAME")
  workdir = Path(workdir)
  existing = next(p for p in (workdir.absolute(), *workdir.absolute().parents) if p.exists())
  if not existing.is_dir():
    raise ValueError(f"--workdir={workdir}: {existing} is not a folder")
  if not os.access(existing, os.W_OK | os.X_OK):
    raise ValueError(f"--workdir={workdir}: no permission to write in {existing}")
  return workdir


def _write_config(path: Path, config, first: int) -> None:
  """Writes the resolved config; prints which settings differ from those that a resumed run started with."""
  if first and path.exists():
    try:
      before = current_names(flat(read_json(path)))
    except ValueError:
      before = {}
    now = flat(config.to_dict())
    default = lambda k: OWN_SETTINGS.get(k.removeprefix("decode."))  # of a setting that is not given
    value = lambda values, k: default(k) if values[k] is None else values[k]
    changed = [k for k in sorted(before.keys() & now.keys()) if value(before, k) != value(now, k)]
    if changed:
      changes = ", ".join(f"{k} {before[k]} -> {now[k]}" for k in changed)
      print(f"resuming after step {first} with other settings than before: {changes}")
  write_atomic(path, config.to_json(indent=2))
