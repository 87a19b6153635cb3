"""Where rounds lead: speed and quality of every policy, from the start through its rounds, as a figure.

    python -m pasta_jax.preference.front EVALUATION_FOLDER… OUT.svg

Folders of --mode=eval whose systems are named as stage two names them: "start" and "POLICY_roundN".
(--mode=preference draws the same figure of its own evaluation.)
"""

import json
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.figure

from pasta_jax.evaluate.report.plots import COLOURS

_ROUND = re.compile(r"(?P<policy>.+)_round(?P<number>\d+)")
MEASURES = {
  "theoretical_speedup": "theoretical speedup",
  "theoretical_against_baseline": "baseline's tokens over the longest path",
}


class Point(NamedTuple):
  """A policy behind a round, 0 for the start."""

  policy: str
  number: int
  speed: tuple[float, ...]  # in the order of `MEASURES`
  quality: float  # win rate, %
  error: float  # its standard error


def points(folders: Iterable[Path]) -> list[Point]:
  """Those of the folders' systems that rounds made and that were judged, and the start; none if no round was.

  Raises ValueError, one line, for a folder that is no finished evaluation.
  """
  found: dict[str, Point] = {}
  for folder in folders:
    try:
      systems = json.loads((folder / "summary.json").read_text())["systems"]
    except (OSError, ValueError, KeyError) as error:
      raise ValueError(f"{folder} is no finished evaluation ({error})") from None
    for name, entry in systems.items():
      match = _ROUND.fullmatch(name)
      judged = next(iter(entry.get("quality", {}).values()), None)
      if judged is None or "win_rate" not in judged or not (match or name == "start"):
        continue
      speed = tuple(entry["responses"].get(key, math.nan) for key in MEASURES)
      policy, number = (match["policy"], int(match["number"])) if match else ("start", 0)
      found[name] = Point(
        policy, number, speed, judged["win_rate"], judged.get("win_rate_error", 0.0)
      )  # a single answer has none
  return list(found.values()) if any(p.number for p in found.values()) else []


def draw(found: list[Point]) -> matplotlib.figure.Figure:
  """Quality over each measure of speed: a path for each policy, standard errors of the win rate as bars."""
  with matplotlib.rc_context({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "pasta"}):
    figure = matplotlib.figure.Figure(figsize=(9.6, 3.8), layout="constrained", dpi=160)
    start = next((p for p in found if p.number == 0), None)
    policies = sorted({p.policy for p in found if p.number})
    for k, (axes, label) in enumerate(zip(figure.subplots(1, 2, sharey=True), MEASURES.values())):
      for policy, colour in zip(policies, COLOURS):
        path = sorted((p for p in found if p.policy == policy), key=lambda p: p.number)
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
          label=policy.replace("_", " "),
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
    figure.axes[0].set_ylabel("win rate against the baseline, %")
    figure.legend(
      *figure.axes[1].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8
    )
    figure.axes[0].set_title(
      "numbers: rounds; bars: standard errors", loc="left", fontsize=8, color="#667085"
    )
  return figure


def main(arguments: list[str]) -> None:
  if len(arguments) < 2:
    sys.exit("usage: python -m pasta_jax.preference.front EVALUATION_FOLDER… OUT.svg")
  *folders, out = map(Path, arguments)
  try:
    found = points(folders)
    if not found:
      raise ValueError(f"no round was judged in {', '.join(map(str, folders))}")
    draw(found).savefig(out)
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  main(sys.argv[1:])
