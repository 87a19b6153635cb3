"""Prints the figures of all rounds in a folder, from their `round.json`."""

import math
from collections.abc import Iterable
from pathlib import Path

import rich.box
import rich.console
import rich.table

from pasta_jax.decode.record import current
from pasta_jax.preference.audit import KINDS
from pasta_jax.utils.json_io import or_nan, read_json
from pasta_jax.utils.terminal import as_text

SIDES = ("samples", "best", "worst")


def show(workdir: Path) -> None:
  """Prints each round's speedup and quality, the samples' defects, and what training changed."""
  paths = sorted(workdir.glob("*/round*/round.json"))
  rounds = [current(_numbers(read_json(path))) for path in paths]
  if not rounds:
    return
  table = rich.table.Table(title="rounds", box=rich.box.SIMPLE_HEAD, pad_edge=False)
  for heading in ("policy", "samples", "speedup", "quality", "pairs", "defects", "margin", "accuracy"):
    table.add_column(heading, justify="left" if heading in ("policy", "samples") else "right", no_wrap=True)
  defects, learned, judged = [], [], []
  for report in rounds:
    for weight, figures in report["by weight"].items():
      name = [report["policy"], f"round {report['round']}"]
      if len(report["by weight"]) > 1:
        name.append(f"λ = {weight}")
      table.add_row(
        as_text("\n".join(name)),
        "all\nbest\nworst",
        _by_side(figures, "speedup"),
        _by_side(figures, "quality"),
        str(figures["pairs"]),
        f"{100 * figures['share with defects']:.0f} %",
        f"{report['training']['margin']:.1f}",
        f"{100 * report['training']['accuracy']:.0f} %",
      )
      shares = figures["defects of samples, share"].items()
      listed = ", ".join(f"{defect} {100 * share:.0f} %" for defect, share in shares)
      defects.append(f"{', '.join(name)}: {listed or 'none'}")
      if said := figures.get("judge"):
        listed = ", ".join(f"{what} {value:.3g}" for what, value in said.items())
        judged.append(f"{', '.join(name)}: {listed}")
    if gains := report.get("learned"):
      learned.append(f"{report['policy']}, round {report['round']}: {', '.join(_gains(gains))}")
  console = rich.console.Console(highlight=False)
  console.print(table)
  console.print("Defects, each as a share of all samples:", *map(as_text, defects), sep="\n")
  if judged:
    console.print("What the judge said of the samples:", *map(as_text, judged), sep="\n")
  if learned:
    console.print("Gain of log p in best / worst answers, nats per token:", *map(as_text, learned), sep="\n")


def _by_side(figures: dict, key: str) -> str:
  return "\n".join(f"{figures[side].get(key, math.nan):.2f}" for side in SIDES)


def _numbers(figures: dict) -> dict:
  """Figures, and those inside them, as they were written."""
  plain = lambda v: _numbers(v) if isinstance(v, dict) else or_nan(v)
  return {key: plain(value) for key, value in figures.items()}


def _gains(gains: dict) -> Iterable[str]:
  """The gain of each class of tokens in best and worst answers (`audit.gains`)."""
  best, worst = gains["best"], gains["worst"]
  form = lambda side, kind: f"{side[kind]['gain']:+.2f}" if kind in side else "-"
  return (f"{k} {form(best, k)} / {form(worst, k)}" for k in KINDS if k in best or k in worst)
