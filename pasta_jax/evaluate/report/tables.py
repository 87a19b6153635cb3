"""A summary as rows of text: for the terminal, Markdown and the page."""

import re

import rich.console
import rich.table

from pasta_jax.evaluate.metrics.measures import natural
from pasta_jax.evaluate.report import judged, lengths
from pasta_jax.utils.terminal import as_text
from pasta_jax.utils.text import one_line

Rows = judged.Rows

_SHARE = lambda v: f"{100 * v:.0f} %"
_TIMES = lambda v: f"{v:.2f}"
_NUMBER = lambda v: f"{v:.0f}"
FIGURES = (  # (heading, part of a system's entry, key, format)
  ("prompts answered", "responses", "prompts", _NUMBER),
  ("answers with promises or points", "responses", "promise_share", _SHARE),
  ("theoretical speedup", "responses", "speedup_over_baseline", _TIMES),
  ("theoretical parallelism", "responses", "theoretical_parallelism", _TIMES),
  (
    "theoretical parallelism, answers with promises",
    "responses",
    "theoretical_parallelism_with_promises",
    _TIMES,
  ),
  ("tokens per round, tags included", "responses", "tokens_per_round", _TIMES),
  ("non-text tokens (tags, outlines)", "responses", "tag_overhead", _SHARE),
  ("declared lengths: median error", "responses", "length_error", _SHARE),
  ("ill-formed answers", "responses", "malformed_share", _SHARE),
  ("joins without a separator", "responses", "unseparated_share", lambda v: f"{100 * v:.1f} %"),
  ("answers that promise a topic twice", "responses", "topic_twice_share", _SHARE),
  ("answers that loop", "responses", "loop_share", _SHARE),
  ("answers cut off", "responses", "cut_share", _SHARE),
  ("answers that a limit of {text_limit} tokens of text cuts", "responses", "cut_by_text_share", _SHARE),
  ("text tokens per answer", "responses", "text_tokens", _NUMBER),
  ("text tokens per answer, median", "responses", "median_text_tokens", _NUMBER),
  ("prompts timed", "timed", "prompts", _NUMBER),
  ("realised speedup", "timed", "realised_speedup", _TIMES),
  ("95 % interval", "timed", "interval", str),
  ("realised speedup at equal length", "timed", "same_text_speedup", _TIMES),
  ("efficiency (that over theoretical parallelism)", "timed", "efficiency", _SHARE),
  ("prompts slower than the baseline", "timed", "slower_share", _SHARE),
  ("tokens per second", "timed", "tokens_a_second", lambda v: f"{v:.1f}"),
)
NOTHING = judged.NOTHING


def table(summary: dict) -> Rows:
  """The heading, then a row for each figure that any system has, and a column for each system.

  The first rows say where the systems come from and who read their answers.
  """
  systems = summary["systems"]
  rows = [["", *systems], *judged.provenance(summary)]
  for heading, part, key, form in FIGURES:
    row = [heading.format(text_limit=summary.get("text_limit"))]
    for entry in systems.values():
      figures = dict(entry.get(part, {}))
      if "realised_speedup_low" in figures:
        figures["interval"] = _interval(figures)
      row.append(form(figures[key]) if key in figures else NOTHING)
    if any(cell != NOTHING for cell in row[1:]):
      rows.append(row)
  of_lengths = [lengths.cells(entry.get("responses", {})) for entry in systems.values()]
  for heading in lengths.HEADINGS:
    if any(heading in cells for cells in of_lengths):
      rows.append([heading, *(cells.get(heading, NOTHING) for cells in of_lengths)])
  return [*rows, *judged.rates(summary)]


def _interval(figures: dict) -> str:
  return f"{figures['realised_speedup_low']:.2f} to {figures['realised_speedup_high']:.2f}"


def group_tables(summary: dict) -> dict[str, Rows]:
  """Speed by category and by length, by heading: a row for each group and a column for each system.

  Realised speedups with 95 % intervals if there are timings, else theoretical parallelism.
  """
  systems = {n: e for n, e in summary["systems"].items() if n != summary["baseline"]}
  timed = any("realised_speedup" in e.get("timed", {}) for e in systems.values())
  part, key, what = (
    ("timed", "realised_speedup", "realised speedup")
    if timed
    else ("responses", "theoretical_parallelism", "theoretical parallelism")
  )

  def cell(figures: dict) -> str:
    if key not in figures:
      return NOTHING
    interval = f", {_interval(figures)}" if timed else ""
    return f"{figures[key]:.2f}{interval} ({figures['prompts']})"

  tables = {}
  for heading, kind in (("By category", "category"), ("By length of the answer", "length")):
    groups = {n: e.get(f"{part}_by_{kind}", {}) for n, e in systems.items()}
    names = sorted({g for by_name in groups.values() for g in by_name}, key=natural)
    rows = [[g, *(cell(by_name.get(g, {})) for by_name in groups.values())] for g in names]
    tables[f"{heading}: {what} (prompts)"] = [["", *systems], *rows]
  return tables


def about(summary: dict) -> tuple[str, str]:
  """(model, prompts and baseline, machine and version) in words."""
  timed = f"; {summary['timed']} of them timed ({summary['dtype']})" if summary["timed"] else ""
  return (
    f"{summary['model']}, {summary['prompts']} prompts{timed}, against {summary['baseline']}",
    f"{summary['machine']}; pasta-jax {summary['version']}",
  )


def markdown(summary: dict) -> str:
  """All tables, with model, machine and version."""
  return "\n".join(
    [
      _escaped("; ".join(about(summary))),
      "",
      *_markdown_table(table(summary)),
      *(line for note in judged.notes(summary) for line in ("", _escaped(note))),
      *(
        line
        for heading, rows in {**judged.tables(summary), **group_tables(summary)}.items()
        for line in ("", _escaped(heading), "", *_markdown_table(rows))
      ),
      "",
    ]
  )


def _markdown_table(rows: Rows) -> list[str]:
  line = lambda cells: "| " + " | ".join(cells) + " |"
  head, *body = [[_escaped(cell) for cell in row] for row in rows]
  return [line(head), line(["---"] * len(head)), *map(line, body)]


# What Markdown reads as markup; an underscore inside a word is text.
_MARKUP = re.compile(r"[\\`*<>|~$&\[\]]|(?<![^\W_])_|_(?![^\W_])")


def _escaped(text: str) -> str:
  """Any text as Markdown that shows it, on one line."""
  return _MARKUP.sub(lambda m: "\\" + m[0], one_line(text, len(text) * 6))


def show(summary: dict) -> None:
  """Prints the table, and what judges say, in the terminal."""
  timed = f", {summary['timed']} timed" if summary["timed"] else ""
  console = rich.console.Console(highlight=False)
  shown = {f"{summary['prompts']} prompts{timed}": table(summary), **judged.tables(summary)}
  for title, rows in shown.items():
    printed = rich.table.Table(title=as_text(title))
    for k, name in enumerate(rows[0]):
      printed.add_column(as_text(name), justify="right" if k else "left")
    for row in rows[1:]:
      printed.add_row(*map(as_text, row))
    console.print(printed)
  for note in judged.notes(summary):
    console.print(as_text(note))
