"""Metrics of a run: one JSON object a line, the same scalars for TensorBoard, and a bar in the terminal."""

import json
from pathlib import Path

import rich.console
import rich.progress
from tensorboardX import SummaryWriter


class MetricWriter:
  """Appends to `workdir/metrics.jsonl` and `workdir/tensorboard`; after a resume, later steps are written anew."""

  def __init__(self, workdir: Path, first_step: int):
    self._path = workdir / "metrics.jsonl"
    if self._path.exists():  # lines of steps that will be done again
      kept = [line for line in self._path.read_text().splitlines() if json.loads(line)["step"] <= first_step]
      self._path.write_text("".join(line + "\n" for line in kept))
    self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)

  def write(self, step: int, scalars: dict[str, float]) -> None:
    """Writes the scalars of one step."""
    with open(self._path, "a") as file:
      file.write(json.dumps({"step": step, **scalars}) + "\n")
    for name, value in scalars.items():
      self._board.add_scalar(name, value, step)

  def close(self) -> None:
    self._board.close()


def progress_bar(what: str, total: int, done: int = 0) -> tuple[rich.progress.Progress, rich.progress.TaskID]:
  """A bar on stderr with rate and time left; `update(task, note=…)` shows figures behind it."""
  bar = rich.progress.Progress(
      rich.progress.TextColumn("{task.description}"), rich.progress.BarColumn(),
      rich.progress.MofNCompleteColumn(), rich.progress.TimeRemainingColumn(), rich.progress.TextColumn("{task.fields[note]}"),
      console=rich.console.Console(stderr=True))
  return bar, bar.add_task(what, total=total, completed=done, note="")
