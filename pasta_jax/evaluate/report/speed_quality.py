"""The plot of speed against quality: a panel for each measure of speed, as figure 4 of the paper."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes

from pasta_jax.evaluate.report import paper
from pasta_jax.evaluate.report.plots import INK, LABEL, STYLE, Figure, label_of
from pasta_jax.utils.text import one_line

MEASURES = {  # of speed: a key of a system's figures, and its name on an axis
  "realised_speedup": "realised speedup",
  "speedup_over_baseline": "theoretical speedup",
  "theoretical_parallelism": "theoretical parallelism",
}
_GREY = "#8a93a1"
_SIZE, _SMALL = 8.5, 6.5  # of labels, in points
# Places of a label around its point: (x, y) of its centre in widths and heights of the label and point.
_PLACES = (
  (0, -1),
  (0, 1),
  (1, 0),
  (-1, 0),
  (1, 1),
  (-1, 1),
  (1, -1),
  (-1, -1),
  (0, -2),
  (0, 2),
  (1, 2),
  (1, -2),
)


class Point(NamedTuple):
  """A system against the baseline."""

  speeds: Mapping[str, float]  # by key of `MEASURES`; what was not measured is left out
  intervals: Mapping[str, tuple[float, float]]  # 95 %, of those speeds that have one
  rate: float  # %
  rate_interval: tuple[float, float] | None  # 95 %


def draw(
  points: Mapping[str, Point],
  *,
  rate: str,
  palette: Mapping[str, str],
  fronts: Sequence[Mapping[str, str]],
  baseline: str,
  with_paper: bool,
) -> Figure:
  """Every system's speed and `rate`, the quality's name on the axis.

  `fronts`: systems of one adapter, in the order of the line that joins them, by name, with what labels them.
  `with_paper` adds the paper's systems, measured with another model and another reader.
  """
  shown = [m for m in MEASURES if any(m in p.speeds for p in points.values())]
  with matplotlib.rc_context(STYLE | {"font.size": 9}):
    figure = Figure(figsize=(1.2 + 3.6 * len(shown), 4.3), layout="constrained")
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for ax, measure in zip(axes, shown):
      ax.axhline(50, color=INK, linewidth=0.8, alpha=0.35, linestyle=(0, (3, 3)))
      ax.axvline(1, color=INK, linewidth=0.8, alpha=0.35, linestyle=(0, (3, 3)))
      if with_paper:
        xs = [getattr(p, measure) for p in paper.POINTS]
        ax.plot(xs, [p.win_rate for p in paper.POINTS], "o", color=_GREY, markersize=4, alpha=0.6)
      for front in fronts:
        of_front = [(points[n].speeds[measure], points[n].rate) for n in front if measure in points[n].speeds]
        ax.plot(*zip(*of_front), color=palette[next(iter(front))], linewidth=1.2, alpha=0.6)
      for name, p in points.items():
        if measure in p.speeds:
          _mark(ax, p, measure, palette[name])
      ax.plot([1], [50], "s", color=palette[baseline], markersize=6)
      ax.set_xlabel(f"{MEASURES[measure]} (times)")
      ax.margins(0.16)
    axes[0].set_ylabel(f"{rate} against{label_of(baseline)}, %")
    if with_paper:
      axes[0].set_title(paper.SOURCE, loc="left", fontsize=7.5, color=_GREY)
    figure.draw_without_rendering()  # lays the panels out: labels are placed in their pixels
    names = {name: label for front in fronts for name, label in front.items()}
    for ax, measure in zip(axes, shown):
      ours = [
        (p.speeds[measure], p.rate, names.get(n, one_line(n, LABEL)), palette[n])
        for n, p in points.items()
        if measure in p.speeds
      ]
      ours.append((1.0, 50.0, one_line(baseline, LABEL), palette[baseline]))
      theirs = [(getattr(p, measure), p.win_rate, p.label, _GREY) for p in paper.POINTS] if with_paper else []
      _label(ax, ours, theirs)
    return figure


def _mark(ax: Axes, p: Point, measure: str, colour: str) -> None:
  """The point of a system and its intervals."""
  x = p.speeds[measure]
  if interval := p.intervals.get(measure):
    ax.plot(interval, (p.rate, p.rate), color=colour, linewidth=1.2, alpha=0.5)
  if p.rate_interval:
    ax.plot((x, x), p.rate_interval, color=colour, linewidth=1.2, alpha=0.5)
  ax.plot([x], [p.rate], "o", color=colour, markersize=7)


Labelled = tuple[float, float, str, str]  # speed, rate, label, colour


def _label(ax: Axes, ours: Sequence[Labelled], theirs: Sequence[Labelled]) -> None:
  """Writes each label at the place around its point that covers least of other points and labels, ours first."""
  pixels = ax.figure.dpi / 72  # of a point of text
  at = [ax.transData.transform(p[:2]) for p in (*ours, *theirs)]
  taken = [(x, y, 6 * pixels, 6 * pixels) for x, y in at]  # centre and half sizes
  frame = ax.get_window_extent()
  for k, (_, _, text, colour) in enumerate((*ours, *theirs)):
    size = _SIZE if k < len(ours) else _SMALL
    half = (0.31 * size * len(text) + 1) * pixels, 0.6 * size * pixels
    options = []
    for order, (right, up) in enumerate(_PLACES):
      x = at[k][0] + right * (half[0] + 7 * pixels)
      y = at[k][1] + up * (half[1] + (6 if abs(up) == 1 else 9) * pixels)
      outside = max(frame.x0 - (x - half[0]), x + half[0] - frame.x1, 0) * half[1] * 4
      others = (box for j, box in enumerate(taken) if j != k)
      options.append((outside + sum(_covered((x, y, *half), box) for box in others), order, x, y))
    _, _, x, y = min(options)
    taken.append((x, y, *half))
    offset = ((x - at[k][0]) / pixels, (y - at[k][1]) / pixels)
    ax.annotate(
      " " + text if text.startswith("_") else text,
      (ours[k] if k < len(ours) else theirs[k - len(ours)])[:2],
      textcoords="offset points",
      xytext=offset,
      ha="center",
      va="center",
      color=colour,
      fontsize=size,
      fontweight="bold" if k < len(ours) else "normal",
    )


def _covered(one: tuple[float, ...], other: tuple[float, ...]) -> float:
  """The area that two boxes share, each (x, y, half width, half height)."""
  wide, high = (max(one[2 + d] + other[2 + d] - abs(one[d] - other[d]), 0) for d in (0, 1))
  return wide * high
