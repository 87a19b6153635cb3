"""Plots for the page and for papers: speed by prompt and by group of prompts, lengths of chunks, wins by parts.

`speed_quality` draws speed against quality in the same style.
"""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.figure
import matplotlib.ticker
import numpy as np

from pasta_jax.evaluate.metrics.declared import NEAR
from pasta_jax.evaluate.metrics.measures import natural
from pasta_jax.utils.text import one_line

# Medium lightness: readable on light and on dark backgrounds.
COLOURS = ("#2f7de1", "#e0702a", "#1f9d6b", "#c44f97", "#a5831f", "#7d68d8", "#1f9fb8", "#d8515a")
INK = "#010203"  # placeholder that `svg` replaces by the page's own text colour
STYLE: Any = {
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


def label_of(name: str) -> str:
  """A name as a label. The blank before it keeps one that begins with an underscore in the legend."""
  return " " + one_line(name, LABEL)


def _new(width: float, height: float) -> tuple[Figure, matplotlib.axes.Axes]:
  figure = Figure(figsize=(width, height), layout="constrained")
  return figure, figure.subplots()


def colours(names: Sequence[str]) -> dict[str, str]:
  """A colour for each system, the same in every figure."""
  return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def distribution(speeds: Mapping[str, Sequence[float]], *, speed: str, palette: Mapping[str, str]) -> Figure:
  """The speed of each system's prompts, sorted: the share of prompts that reach a given speed."""
  with matplotlib.rc_context(STYLE):
    figure, ax = _new(6.4, 3.4)
    ax.axhline(1, color=INK, linewidth=0.8, alpha=0.35, linestyle=(0, (3, 3)))
    for name, values in speeds.items():
      ordered = np.sort(np.asarray(values))[::-1]
      share = 100 * (np.arange(len(ordered)) + 0.5) / max(len(ordered), 1)
      ax.plot(share, ordered, color=palette[name], linewidth=2, label=label_of(name))
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
  with matplotlib.rc_context(STYLE):
    figure, ax = _new(6.4, 0.9 + 0.24 * len(names) * max(len(figures), 1) + 0.12 * len(names))
    height = 0.8 / max(len(figures), 1)
    for k, (system, values) in enumerate(figures.items()):
      y = np.arange(len(names)) + (k - (len(figures) - 1) / 2) * height
      widths = [values.get(g, math.nan) for g in names]
      ax.barh(y, widths, height * 0.88, color=palette[system], label=label_of(system))
      for at, width in zip(y, widths):
        if not math.isnan(width):
          ax.text(width, at, f" {width:.2f}", va="center", fontsize=8, color=INK)
    ax.axvline(1, color=INK, linewidth=0.8, alpha=0.35, linestyle=(0, (3, 3)))
    ax.set_yticks(np.arange(len(names)), list(map(label_of, names)))
    ax.invert_yaxis()
    ax.set_xlabel(f"{speed} (times)")
    if len(figures) > 1:
      ax.legend(frameon=False, labelcolor="linecolor", loc="lower right")
    return figure


LATE = 100  # tokens: chunks that end further from their number are in the outer bars of `calibration`


def calibration(lengths: Mapping[str, Sequence[tuple[int, int]]], *, palette: Mapping[str, str]) -> Figure:
  """The tokens of chunks against those that their promises declare: `lengths[system]` are (declared, true).

  Left: for each declared length that a system gave to chunks, the median, and the middle half of them as a bar.
  Right: true less declared tokens, in bars of `declared.NEAR` tokens, of which one ends at the declared length.
  """
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(10.4, 4.0), layout="constrained")
    ax, late = figure.subplots(1, 2)
    for k, (system, pairs) in enumerate(lengths.items()):
      by_declared: dict[int, list[int]] = {}
      for declared, true in pairs:
        by_declared.setdefault(declared, []).append(true)
      xs = sorted(by_declared)
      low, median, high = np.array([np.percentile(by_declared[x], (25, 50, 75)) for x in xs]).T
      beside = np.array(xs) * 1.025 ** (k - (len(lengths) - 1) / 2)  # bars of systems side by side
      ax.vlines(beside, low, high, color=palette[system], alpha=0.5, linewidth=1.5)
      ax.plot(beside, median, "o-", color=palette[system], markersize=4, linewidth=1, label=label_of(system))
    declared_lengths = [declared for pairs in lengths.values() for declared, _ in pairs]
    ends = (min(declared_lengths), max(declared_lengths))
    ax.plot(ends, ends, color=INK, linewidth=0.8, alpha=0.35, linestyle=(0, (3, 3)))
    for scale, axis in ((ax.set_xscale, ax.xaxis), (ax.set_yscale, ax.yaxis)):
      scale("log", base=2)
      axis.set_major_formatter(lambda v, _: f"{v:g}")
      axis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    ax.set_xlabel("declared length of a chunk (tokens)")
    ax.set_ylabel("its length: median, middle half (tokens)")
    ax.legend(frameon=False, labelcolor="linecolor")
    edges = np.arange(-LATE, LATE + 1, NEAR) + 0.5  # a bar has the lengths of one `declared.place`
    for system, pairs in lengths.items():
      tokens = np.clip([true - declared for declared, true in pairs], edges[0], edges[-1])
      late.stairs(
        100 * np.histogram(tokens, edges)[0] / len(tokens), edges, color=palette[system], linewidth=1.5
      )
    late.axvline(0.5, color=INK, linewidth=0.8, alpha=0.35, linestyle=(0, (3, 3)))
    late.set_xlabel("its length less the declared one (tokens; outer bars: and all beyond)")
    late.set_ylabel("share of chunks, %")
    return figure


def parts(
  rates: Mapping[str, Mapping[str, Mapping[str, float]]],
  *,
  rate: str,
  palette: Mapping[str, str],
  baseline: str,
) -> Figure:
  """The win rate of answers by the number of their parts: `rates[system][class]` (`readings.parts`).

  Points with 95 % intervals, systems side by side, and the number of answers above each.
  """
  classes = sorted({c for of_system in rates.values() for c in of_system}, key=natural)
  with matplotlib.rc_context(STYLE):
    names = 0.09 * max(len(label_of(system)) for system in rates)  # inches: the legend is beside the axes
    figure, ax = _new(max(5.6, 1 + 0.35 * len(classes) * len(rates)) + names, 4.0)
    ax.axhline(50, color=INK, linewidth=0.8, alpha=0.35, linestyle=(0, (3, 3)))
    for k, (system, of_system) in enumerate(rates.items()):
      beside = 0.7 * ((k + 0.5) / len(rates) - 0.5)
      for n, (name, found) in enumerate(of_system.items()):
        x, y = classes.index(name) + beside, found["win_rate"]
        low, high = (found.get(f"win_rate_{end}", y) for end in ("low", "high"))
        ax.plot((x, x), (low, high), color=palette[system], linewidth=1.5, alpha=0.5)
        ax.plot([x], [y], "o", color=palette[system], markersize=5, label=None if n else label_of(system))
        ax.annotate(
          f"{found['judged']}", (x, high), xytext=(0, 4), textcoords="offset points", ha="center", fontsize=7,
          color=palette[system],
        )  # fmt: skip
    ax.set_xticks(range(len(classes)), classes)
    ax.set_ylim(-4, 108)
    ax.set_yticks(range(0, 101, 25))
    ax.set_xlabel("promises or points of the answer (small: answers judged)")
    ax.set_ylabel(f"{rate} against{label_of(baseline)}, %")
    ax.legend(frameon=False, labelcolor="linecolor", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def svg(figure: Figure) -> str:
  """The figure as an SVG element in the page's text colour. Changes the colours of `figure`."""
  out = io.StringIO()
  with matplotlib.rc_context(
    STYLE
    | {
      "text.color": INK,
      "axes.labelcolor": INK,
      "axes.edgecolor": INK,
      "xtick.color": INK,
      "ytick.color": INK,
    }
  ):
    _ink(figure)
    _write(figure, out, format="svg", transparent=True, metadata={"Date": None})
  text = out.getvalue()
  return text[text.index("<svg") :].replace(INK, "currentColor")


def _ink(figure: Figure) -> None:
  """Gives frame, ticks and labels the placeholder colour."""
  for ax in figure.axes:
    ax.tick_params(colors=INK, which="both")
    for label in (ax.xaxis.label, ax.yaxis.label, ax.title):
      label.set_color(INK)
    for spine in ax.spines.values():
      spine.set_color(INK)


def save(figure: Figure, path: Path) -> None:
  """Writes `path` with .svg and .png added to its name, on white, for papers."""
  with matplotlib.rc_context(STYLE):
    for suffix in (".svg", ".png"):
      metadata = {"Date": None} if suffix == ".svg" else None
      _write(figure, path.with_name(path.name + suffix), facecolor="white", metadata=metadata)


def _write(figure: Figure, out: Path | io.StringIO, **options: Any) -> None:
  with (
    warnings.catch_warnings()
  ):  # the font lacks many scripts: a viewer shows the text of an .svg in its own
    warnings.filterwarnings("ignore", message="Glyph .* missing from")
    figure.savefig(out, **options)
