"""Plots for the page and for papers: speed against quality, speed by prompt, speed by group of prompts."""

import io
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.figure
import matplotlib.ticker
import numpy as np

from pasta_jax.utils.text import one_line

# Medium lightness: readable on light and on dark backgrounds.
COLOURS = ("#2f7de1", "#e0702a", "#1f9d6b", "#c44f97", "#a5831f", "#7d68d8", "#1f9fb8", "#d8515a")
# Jin et al. 2025, abstract: Gemma 7B on AlpacaEval, length-controlled win rate by GPT-4, realised speedup.
PAPER = {(1.93, 50 - 7.1): (0, -14), (1.21, 50 + 2.2): (0, 8)}  # and the label's offset in points
_INK = "#010203"  # placeholder that `svg` replaces by the page's own text colour
_STYLE: Any = {
  "font.size": 10,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "svg.fonttype": "none",
  "font.family": "sans-serif",
  "axes.titlesize": 11,
  "figure.dpi": 160,
  "svg.hashsalt": "pasta",
  "text.parse_math": False,  # names of systems, judges and categories are text, dollars and all
}
Figure = matplotlib.figure.Figure


LABEL = 40  # characters of a name in a figure; tables have all of it
MOST_GROUPS = 40  # of a figure: a picture of thousands cannot be drawn


def _label(name: str) -> str:
  """A name as a label. The blank before it keeps one that begins with an underscore in the legend."""
  return " " + one_line(name, LABEL)


def _new(width: float, height: float) -> tuple[Figure, matplotlib.axes.Axes]:
  figure = Figure(figsize=(width, height), layout="constrained")
  return figure, figure.subplots()


def colours(names: Sequence[str]) -> dict[str, str]:
  """A colour for each system, the same in every figure."""
  return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def _pareto_front(points: Iterable[tuple]) -> list[tuple[float, float]]:
  """The Pareto-optimal (speed, quality), sorted by speed."""
  all_ = sorted({p[:2] for p in points})
  return [p for p in all_ if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in all_)]


def pareto(
  points: Mapping[str, tuple[float, float, tuple[float, float] | None]],
  *,
  speed: str,
  judge: str,
  palette: Mapping[str, str],
  baseline: str,
  paper: bool = True,
) -> Figure:
  """Speed against quality. `points`: (speedup, win rate in per cent, 95 % interval of the speedup or None).

  A line joins the Pareto-optimal systems. `paper` adds the two ends of the paper's range, measured with
  another model and another judge.
  """
  with matplotlib.rc_context(_STYLE):
    figure, ax = _new(6.4, 4.0)
    ax.axhline(50, color=_INK, linewidth=0.8, alpha=0.35, linestyle=(0, (3, 3)))
    ax.axvline(1, color=_INK, linewidth=0.8, alpha=0.35, linestyle=(0, (3, 3)))
    if paper:
      ax.plot(
        *zip(*PAPER),
        "o",
        markerfacecolor="none",
        markeredgecolor=_INK,
        alpha=0.5,
        markersize=7,
        linestyle=(0, (1, 2)),
        color=_INK,
      )
      for point, offset in PAPER.items():
        ax.annotate(
          "the paper's",
          point,
          textcoords="offset points",
          xytext=offset,
          ha="center",
          fontsize=8,
          color=_INK,
          alpha=0.65,
        )
    ax.plot(*zip(*_pareto_front(points.values())), color=_INK, linewidth=1, alpha=0.4)
    for name, (x, y, interval) in points.items():
      if interval:
        ax.plot(interval, (y, y), color=palette[name], linewidth=2, alpha=0.5, solid_capstyle="round")
      ax.plot([x], [y], "o", color=palette[name], markersize=9)
      ax.annotate(
        _label(name),
        (x, y),
        textcoords="offset points",
        xytext=(0, -15),
        ha="center",
        color=palette[name],
        fontweight="bold",
      )
    ax.set_xlabel(f"{speed} (times)")
    ax.set_ylabel(f"win rate against{_label(baseline)}, % ({one_line(judge, LABEL)})")
    ax.margins(0.15)
    return figure


def distribution(speeds: Mapping[str, Sequence[float]], *, speed: str, palette: Mapping[str, str]) -> Figure:
  """The speed of each system's prompts, sorted: the share of prompts that reach a given speed."""
  with matplotlib.rc_context(_STYLE):
    figure, ax = _new(6.4, 3.4)
    ax.axhline(1, color=_INK, linewidth=0.8, alpha=0.35, linestyle=(0, (3, 3)))
    for name, values in speeds.items():
      ordered = np.sort(np.asarray(values))[::-1]
      share = 100 * (np.arange(len(ordered)) + 0.5) / max(len(ordered), 1)
      ax.plot(share, ordered, color=palette[name], linewidth=2, label=_label(name))
    ax.set_xlabel("share of prompts, %")
    ax.set_ylabel(f"{speed}, at least (times)")
    ax.set_xlim(0, 100)
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter(lambda v, _: f"{v:g}×")
    ax.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())  # the default one writes mathematics
    ax.legend(frameon=False, labelcolor="linecolor")
    return figure


def groups(figures: Mapping[str, Mapping[str, float]], *, speed: str, palette: Mapping[str, str]) -> Figure:
  """A bar for each group of prompts and system: `figures[system][group]` is its speed. Of very many groups
  the first ones are shown."""
  names = list(dict.fromkeys(g for values in figures.values() for g in values))[:MOST_GROUPS]
  with matplotlib.rc_context(_STYLE):
    figure, ax = _new(6.4, 0.9 + 0.24 * len(names) * max(len(figures), 1) + 0.12 * len(names))
    height = 0.8 / max(len(figures), 1)
    for k, (system, values) in enumerate(figures.items()):
      y = np.arange(len(names)) + (k - (len(figures) - 1) / 2) * height
      widths = [values.get(g, math.nan) for g in names]
      ax.barh(y, widths, height * 0.88, color=palette[system], label=_label(system))
      for at, width in zip(y, widths):
        if not math.isnan(width):
          ax.text(width, at, f" {width:.2f}", va="center", fontsize=8, color=_INK)
    ax.axvline(1, color=_INK, linewidth=0.8, alpha=0.35, linestyle=(0, (3, 3)))
    ax.set_yticks(np.arange(len(names)), list(map(_label, names)))
    ax.invert_yaxis()
    ax.set_xlabel(f"{speed} (times)")
    if len(figures) > 1:
      ax.legend(frameon=False, labelcolor="linecolor", loc="lower right")
    return figure


def svg(figure: Figure) -> str:
  """The figure as an SVG element in the page's text colour. Changes the colours of `figure`."""
  out = io.StringIO()
  with matplotlib.rc_context(
    _STYLE
    | {
      "text.color": _INK,
      "axes.labelcolor": _INK,
      "axes.edgecolor": _INK,
      "xtick.color": _INK,
      "ytick.color": _INK,
    }
  ):
    _ink(figure)
    _write(figure, out, format="svg", transparent=True, metadata={"Date": None})
  text = out.getvalue()
  return text[text.index("<svg") :].replace(_INK, "currentColor")


def _ink(figure: Figure) -> None:
  """Gives frame, ticks and labels the placeholder colour."""
  for ax in figure.axes:
    ax.tick_params(colors=_INK, which="both")
    for label in (ax.xaxis.label, ax.yaxis.label, ax.title):
      label.set_color(_INK)
    for spine in ax.spines.values():
      spine.set_color(_INK)


def save(figure: Figure, path: Path) -> None:
  """Writes `path` with .svg and .png added to its name, on white, for papers."""
  with matplotlib.rc_context(_STYLE):
    for suffix in (".svg", ".png"):
      metadata = {"Date": None} if suffix == ".svg" else None
      _write(figure, path.with_name(path.name + suffix), facecolor="white", metadata=metadata)


def _write(figure: Figure, out: Path | io.StringIO, **options: Any) -> None:
  with (
    warnings.catch_warnings()
  ):  # the font lacks many scripts: a viewer shows the text of an .svg in its own
    warnings.filterwarnings("ignore", message="Glyph .* missing from")
    figure.savefig(out, **options)
