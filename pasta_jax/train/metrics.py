"""Metrics of a run: JSON lines, and the same scalars for TensorBoard."""

from pathlib import Path

from tensorboardX import SummaryWriter

from pasta_jax.decode.record import current
from pasta_jax.utils.files import write_atomic
from pasta_jax.utils.json_io import or_nan, parse_json
from pasta_jax.utils.jsonl import append_row, read_finished_lines
from pasta_jax.utils.typed import Parsed, checked


class _Step(Parsed):
  step: int


class MetricWriter:
  """Appends to `workdir/metrics.jsonl` and `workdir/tensorboard`; a resumed run drops the steps it
  repeats."""

  def __init__(self, workdir: Path, first_step: int):
    self._path = workdir / "metrics.jsonl"
    if self._path.exists():  # drops steps that will run again, and a line cut off by a kill
      kept = [line for line in self._path.read_bytes().splitlines() if 0 < _step(line) <= first_step]
      write_atomic(self._path, b"".join(line + b"\n" for line in kept))
    self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)

  def write(self, step: int, scalars: dict[str, float]) -> None:
    """Writes the scalars of one step."""
    append_row(self._path, {"step": step, **scalars})
    for name, value in scalars.items():
      self._board.add_scalar(name, value, step)

  def close(self) -> None:
    self._board.close()


def last_scalars(workdir: Path, share: float = 0.0) -> dict[str, float]:
  """The scalars of a run's last step, or their means over the last `share` of its steps."""
  rows = [current(row) for row in read_finished_lines(workdir / "metrics.jsonl")]
  if not rows:
    raise ValueError(f"{workdir / 'metrics.jsonl'} has no step")
  rows = rows[-max(1, round(share * len(rows))) :]
  return {k: sum(or_nan(r[k]) for r in rows) / len(rows) for k in rows[-1] if all(k in r for r in rows)}


def _step(line: bytes) -> int:
  """The step of a line of metrics.jsonl; 0 if the line is incomplete or damaged."""
  try:
    return checked(_Step, parse_json(line), "").step
  except ValueError:
    return 0
