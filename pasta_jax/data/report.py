"""Statistics of annotated rows: a table for the terminal, and one HTML page with histograms and samples."""

import dataclasses
import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.figure
import numpy as np
import rich.box
import rich.table

from pasta_jax.data.examples import encoded, program_of
from pasta_jax.lang.cost import cost
from pasta_jax.lang.forms import Forms
from pasta_jax.lang.layout import NO_TARGET, Layout, layout
from pasta_jax.lang.program import unseparated
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.utils.terminal import as_text

SAMPLES = 6
MOST_TOKENS = 2000  # of a sample that are shown
MOST_BARS = 60  # of a histogram
LABELS = {
  "rows": ("rows", "{:,}"),
  "with_chunks": ("with chunks", "{:.0%}"),
  "with_syncs": ("of these with a sync", "{:.0%}"),
  "chunks": ("chunks each", "{:.1f}"),
  "unseparated": ("joins without a separator", "{:.1%}"),
  "covered": ("of their text in chunks", "{:.0%}"),
  "prompt": ("tokens of a prompt", "{:.0f}"),
  "response": ("tokens of a response, tags included", "{:.0f}"),
  "speedup": ("theoretical parallelism", "{:.2f}"),
  "speedup_of_all": ("the same, all rows", "{:.2f}"),
}


class Facts(NamedTuple):
  """One value a row, each an array [N]."""

  prompt: np.ndarray  # tokens
  response: np.ndarray  # tokens, tags included
  chunks: np.ndarray  # how many
  covered: np.ndarray  # share of the text in chunks
  unseparated: np.ndarray  # chunks that meet other text without a blank or line break
  synced: np.ndarray  # whether there is a sync
  speedup: np.ndarray  # theoretical parallelism


def form_line(form: Forms) -> str:
  """The form of the language that rows are laid out in."""
  others = [f"{f.name} {getattr(form, f.name)}" for f in dataclasses.fields(form) if f.name != "positions"]
  return ", ".join([*others, f"positions {form.positions.strategy}"])


def facts(rows: Sequence[dict], vocabulary: Vocabulary, form: Forms) -> Facts:
  """The facts of all rows that the vocabulary can encode, laid out in `form`."""
  found: list[tuple] = []
  for row in rows:
    program = program_of(row, form.visibility)
    used = [c for c in row["chunks"] if form.visibility == "live" or not c.get("needs")]
    try:
      thread = encoded(program, vocabulary, form.positions)
      prompt = vocabulary.tokenizer.chat_prompt([{"role": "user", "content": row["prompt"]}])
    except ValueError:
      continue
    outer, end = 0, -1
    for c in sorted(used, key=lambda c: (c["start"], -c["end"])):
      if c["start"] >= end:
        outer, end = outer + c["end"] - c["start"], c["end"]
    found.append(
      (
        len(prompt),
        thread.total_tokens,
        len(used),
        outer / len(row["response"]),
        unseparated(program),
        bool(row["syncs"]),
        cost(thread, vocabulary.table).theoretical_parallelism,
      )
    )
  return Facts(*(np.array([row[i] for row in found]) for i in range(len(Facts._fields))))


def figures(f: Facts) -> dict[str, float]:
  """See `LABELS`. Lengths are means, parallelism is a geometric mean; figures of chunks are over rows with
  chunks."""
  some = f.chunks > 0
  if not len(some):
    return dict.fromkeys(LABELS, math.nan) | {"rows": 0}
  mean = lambda x: float(x.mean()) if len(x) else math.nan
  return {
    "rows": len(f.chunks),
    "with_chunks": mean(some),
    "with_syncs": mean(f.synced[some]),
    "chunks": mean(f.chunks[some]),
    "unseparated": float(f.unseparated.sum() / f.chunks.sum()) if some.any() else math.nan,
    "covered": mean(f.covered[some]),
    "prompt": mean(f.prompt),
    "response": mean(f.response),
    "speedup": math.exp(mean(np.log(f.speedup[some]))),
    "speedup_of_all": math.exp(mean(np.log(f.speedup))),
  }


def table(by_name: Mapping[str, Mapping[str, float]]) -> rich.table.Table:
  """The figures in columns, for a terminal."""
  out = rich.table.Table(box=rich.box.SIMPLE_HEAD)
  for name in ("", *by_name):
    out.add_column(as_text(name), justify="right" if name else "left")
  for key, (label, form) in LABELS.items():
    out.add_row(label, *(form.format(found[key]) for found in by_name.values()))
  return out


def histograms(f: Facts) -> matplotlib.figure.Figure:
  """Histograms of lengths, numbers of chunks and theoretical parallelism."""
  figure = matplotlib.figure.Figure(figsize=(10, 2.6), layout="constrained")
  some = f.chunks > 0
  for axes, values, label, bins in zip(
    figure.subplots(1, 3),
    (f.response, f.chunks, f.speedup[some]),
    ("tokens of a response", "chunks", "theoretical parallelism (rows with chunks)"),
    (24, np.arange(f.chunks.max() + 2) - 0.5 if f.chunks.max() < MOST_BARS else MOST_BARS, 24),
  ):
    axes.hist(values, bins=bins, color="#2f7de1")
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
  return figure


_STYLE = """
:root { color-scheme: light dark; --page: #f4f6f8; --card: #fff; --ink: #1a2230; --muted: #667085; --line: #dfe4ea }
@media (prefers-color-scheme: dark) { :root { --page: #0b0e13; --card: #141a22; --ink: #e4e9f0; --muted: #93a0b0;
  --line: #2a3340 } .plots { filter: invert(.88) hue-rotate(180deg) } }
body { margin: 0; padding: 32px 24px 64px; background: var(--page); color: var(--ink);
  font: 15px/1.6 system-ui, sans-serif }
main { max-width: 1100px; margin: 0 auto }
table { border-collapse: collapse } td, th { padding: 2px 18px 2px 0; text-align: right }
td:first-child { text-align: left }
article { margin-top: 20px; padding: 20px 24px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px }
.plots svg { max-width: 100%; height: auto } .muted { color: var(--muted) } h3 { margin: 0 0 8px; font-size: 15px }
.t { position: relative; white-space: pre-wrap; padding: 2px 0; border-bottom: 2px solid transparent }
.tag { font-weight: 600; font-size: 12px } .unlearned { opacity: .55 }
.t:hover { outline: 1px solid currentColor } sup { font-size: 9px; color: var(--muted) }
"""
_HUES = (212, 24, 155, 320, 45, 265, 190, 0)


def page(
  rows: Sequence[dict],
  f: Facts,
  by_split: Mapping[str, Mapping[str, Any]],
  rejected: Mapping[str, int],
  vocabulary: Vocabulary,
  form: Forms,
) -> str:
  """A self-contained HTML page: figures by split, histograms and samples of the rows."""
  head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", *by_split))
  cells = lambda key, form: "".join(f"<td>{form.format(s[key])}</td>" for s in by_split.values())
  body = "".join(f"<tr><td>{label}</td>{cells(key, form)}</tr>" for key, (label, form) in LABELS.items())
  causes = ", ".join(f"{html.escape(cause)} {n:,}" for cause, n in rejected.items()) or "none"
  picture = io.StringIO()
  with matplotlib.rc_context({"svg.hashsalt": "pasta"}):  # the same page from the same rows
    histograms(f).savefig(picture, format="svg", metadata={"Date": None})
  svg = re.sub(r"^.*?(?=<svg)", "", picture.getvalue(), flags=re.DOTALL)
  some = [i for i in range(len(rows)) if f.chunks[i] and f.response[i] <= 400] or list(range(len(rows)))
  samples = "".join(
    _sample(rows[i], vocabulary, form)
    for i in sorted({some[k * len(some) // SAMPLES] for k in range(SAMPLES)})
  )
  return (
    f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><title>Data set</title>'
    f"<style>{_STYLE}</style></head>\n<body><main><h1>Data set</h1>\n<table><tr>{head}</tr>{body}</table>\n"
    f'<p class="muted">Laid out in the form: {form_line(form)}.</p>\n'
    f'<p class="muted">Rejected rows: {causes}.</p>\n<div class="plots">{svg}</div>\n<h2>Samples</h2>\n'
    '<p class="muted">Tokens in the order of training, in the colour of their thread; small numbers are '
    "positions, where they jump. Pale tokens have no target; hover over a token to see its target.</p>\n"
    f"{samples}</main></body></html>\n"
  )


def _sample(row: dict, vocabulary: Vocabulary, form: Forms) -> str:
  """The tokens of a row, with threads, positions and targets."""
  prompt = vocabulary.tokenizer.chat_prompt([{"role": "user", "content": row["prompt"]}])
  thread = encoded(program_of(row, form.visibility), vocabulary, form.positions)
  laid = layout(thread, form.positions, vocabulary.table, prompt)
  start = len(prompt)
  shown_tokens = range(start, min(start + MOST_TOKENS, len(laid)))
  tokens = "".join(_token(laid, i, start, vocabulary) for i in shown_tokens)
  tokens += " …" if len(shown_tokens) < len(laid) - start else ""
  return f"<article><h3>{html.escape(row['prompt'][:300])}</h3><div>{tokens}</div></article>\n"


def _token(laid: Layout, i: int, start: int, vocabulary: Vocabulary) -> str:
  token, thread, target = int(laid.tokens[i]), int(laid.threads[i]), int(laid.targets[i])
  is_tag = token in vocabulary.tag_ids or token in vocabulary.tags.eos
  hue = _HUES[(thread - 1) % len(_HUES)]
  style = f"background: hsl({hue} 80% 55% / .16); border-color: hsl({hue} 70% 50% / .6)" if thread else ""
  jumps = i > start and laid.positions[i] != laid.positions[i - 1] + 1
  learned = "none" if target == NO_TARGET else repr(vocabulary.label(target))
  masked = ", ".join(f"{a}–{b}" for a, b in laid.masked_intervals[i].tolist() if b > a) or "none"
  title = f"thread {thread}, index {i}, position {laid.positions[i]}; target {learned}; masked from {masked}"
  kind = "t" + (" tag" if is_tag else "") + (" unlearned" if target == NO_TARGET else "")
  mark = f"<sup>{laid.positions[i]}</sup>" if jumps or i == start else ""
  text = html.escape(vocabulary.label(token))
  return f'{mark}<span class="{kind}" style="{style}" title="{html.escape(title)}">{text}</span>'
