"""The figure of speed against quality for every policy, from the start through its rounds.

    python -m pasta_jax.preference.pareto_front EVALUATION_FOLDER… OUT.svg

The folders are those of --mode=eval with systems named as stage two names them: "start" and "POLICY_roundN".
--mode=preference draws the same figure of its own evaluation.
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.figure

from pasta_jax.decode.record import current
from pasta_jax.evaluate.report.plots import COLOURS
from pasta_jax.evaluate.report.readings import rate_name
from pasta_jax.utils.json_io import or_nan, read_json
from pasta_jax.utils.typed import Parsed, checked

_ROUND = re.compile(r"(?P<policy>.+)_round(?P<number>\d+)")
MEASURES = {  # of speed: a key of a summary, and its name on an axis
  "theoretical_parallelism": "theoretical parallelism",
  "speedup_over_baseline": "theoretical speedup",
}


class _System(Parsed):
  responses: dict[str, float | None] = {}
  quality: dict[str, dict[str, float | None]] = {}


class _Summary(Parsed):
  """What the figure needs of summary.json."""

  systems: dict[str, _System]


class Point(NamedTuple):
  """A policy after a round; round 0 is the start."""

  policy: str
  number: int
  speed: tuple[float, ...]  # in the order of `MEASURES`
  quality: float  # what the first judge prefers, %
  error: float  # its standard error
  rate: str = "win rate"  # what `quality` is called (readings.rate_name)


def points(folders: Iterable[Path]) -> list[Point]:
  """The judged policies in the folders' evaluations, and the start; [] if no policy of a round was judged.

  Raises ValueError, one line, for a folder without a finished evaluation.
  """
  by_name: dict[str, Point] = {}
  for folder in folders:
    path = folder / "summary.json"
    try:
      summary = checked(_Summary, read_json(path), str(path))
    except (OSError, ValueError) as error:
      raise ValueError(f"{folder} has no finished evaluation ({error})") from None
    for name, entry in summary.systems.items():
      match = _ROUND.fullmatch(name)
      judge, judged = next(iter(entry.quality.items()), ("", {}))
      if (win_rate := judged.get("win_rate")) is None or not (match or name == "start"):
        continue
      figures = current(entry.responses)
      speed = tuple(or_nan(figures.get(key)) for key in MEASURES)
      policy, number = (match["policy"], int(match["number"])) if match else ("start", 0)
      standard_error = judged.get("win_rate_error") or 0.0  # few answers have none
      by_name[name] = Point(policy, number, speed, win_rate, standard_error, rate_name(judge))
  return list(by_name.values()) if any(p.number for p in by_name.values()) else []


def draw(judged: list[Point]) -> matplotlib.figure.Figure:
  """Quality against each measure of speed: a line per policy, bars are standard errors of the win rate."""
  with matplotlib.rc_context(
    {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "pasta", "text.parse_math": False}
  ):
    figure = matplotlib.figure.Figure(figsize=(9.6, 3.8), layout="constrained", dpi=160)
    start = next((p for p in judged if p.number == 0), None)
    policies = sorted({p.policy for p in judged if p.number})
    for k, (axes, label) in enumerate(zip(figure.subplots(1, 2, sharey=True), MEASURES.values())):
      for policy, colour in zip(policies, COLOURS):
        path = sorted((p for p in judged if p.policy == policy), key=lambda p: p.number)
        line = ([start] if start else []) + path
        axes.plot(
          [p.speed[k] for p in line], [p.quality for p in line], color=colour, linewidth=1.2, alpha=0.6
        )
        axes.errorbar(
          [p.speed[k] for p in path],
          [p.quality for p in path],
          [p.error for p in path],
          fmt="o",
          color=colour,
          elinewidth=0.8,
          markersize=6,
          label=" " + policy.replace("_", " "),
        )
        for p in path:
          axes.annotate(
            str(p.number), (p.speed[k], p.quality), textcoords="offset points", xytext=(7, 4), color=colour
          )
      if start:
        axes.errorbar(
          [start.speed[k]],
          [start.quality],
          [start.error],
          fmt="s",
          color="#667085",
          elinewidth=0.8,
          label="start",
        )
      axes.set_xlabel(f"{label} (times)")
      axes.spines[["top", "right"]].set_visible(False)
      axes.margins(0.12)
    figure.axes[0].set_ylabel(f"{judged[0].rate} against the baseline, %")
    figure.legend(
      *figure.axes[1].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8
    )
    figure.axes[0].set_title(
      "numbers: rounds; bars: standard errors", loc="left", fontsize=8, color="#667085"
    )
  return figure


def main(arguments: list[str]) -> None:
  if len(arguments) < 2:
    sys.exit("usage: python -m pasta_jax.preference.pareto_front EVALUATION_FOLDER… OUT.svg")
  *folders, out = map(Path, arguments)
  try:
    judged = points(folders)
    if not judged:
      raise ValueError(f"no round was judged in {', '.join(map(str, folders))}")
    draw(judged).savefig(out)
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  main(sys.argv[1:])
