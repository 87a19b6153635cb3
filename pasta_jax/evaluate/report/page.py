"""The report as one self-contained HTML page.

Tables, plots, fastest and slowest prompts, and every response with its timeline.
"""

import base64
import zlib
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path

from pasta_jax.decode.record import ResponseRecord
from pasta_jax.decode.trace import from_json
from pasta_jax.decode.views.pieces import drawable
from pasta_jax.decode.views.seen import SCRIPT
from pasta_jax.decode.views.timeline import timeline_style, timeline_svg
from pasta_jax.evaluate.report import judged
from pasta_jax.evaluate.report.figures import speed_name
from pasta_jax.evaluate.report.readings import FORM_CHECK, parts_name, rate_name, reads
from pasta_jax.evaluate.report.run_record import Run
from pasta_jax.evaluate.report.summary import Threshold
from pasta_jax.evaluate.report.tables import about, group_tables, table
from pasta_jax.lang.positions import PositionRule
from pasta_jax.utils.files import write_atomic
from pasta_jax.utils.json_io import to_json
from pasta_jax.utils.progress import progress_bar
from pasta_jax.weights.checkpoint import load_checkpoint

SHOWN = 3  # fastest prompts, and as many slowest ones, side by side with the baseline
PLOT_TITLES = {
  "calibration": "Declared and true lengths of chunks",
  "speedups": "How many prompts reach which speed",
  "speedups_by_category": "By category",
  "speedups_by_length": "By length of the answer",
}
WIDE = ("calibration", "speed_quality_")  # plots of panels side by side


def _plot_title(name: str) -> str:
  if name.startswith("parts_"):
    return parts_name(name.removeprefix("parts_"))
  return PLOT_TITLES.get(name) or f"Speed against quality: {rate_name(name.removeprefix('speed_quality_'))}"


def _file(name: str) -> str:
  """The text of a file beside this module."""
  return (resources.files("pasta_jax.evaluate.report") / name).read_text(encoding="utf-8")


def _html(text: str) -> str:
  """Any text as HTML that shows it."""
  return escape(drawable(text))


def _packed(text: str) -> str:
  return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _table(rows: Sequence[Sequence[str]]) -> str:
  cells = lambda row, tag: "".join(f"<{tag}>{_html(c)}</{tag}>" for c in row)
  return (
    f"<table><thead><tr>{cells(rows[0], 'th')}</tr></thead><tbody>"
    + "".join(f"<tr>{cells(r, 'td')}</tr>" for r in rows[1:])
    + "</tbody></table>"
  )


def _facts(row: dict, judge: str = "", preference: float | None = None) -> str:
  """In words; with `judge`, its preference for this answer over the baseline's."""
  record = ResponseRecord.from_json(row)
  parts = [
    f"{record.text_tokens} tokens",
    f"longest path {record.longest_path}",
    f"theoretical parallelism {record.theoretical_parallelism:.2f}×",
  ]
  if record.promises:
    parts.append(f"{record.promises} promises")
  if record.unseparated:
    parts.append(f"joins without a separator {record.unseparated}")
  if record.finish_reason != "stop":
    parts.append("cut off")
  if preference is not None:
    over = "preferred over the baseline's" if reads(judge) else f"{FORM_CHECK} against the baseline's"
    parts.append(f"{over}: {100 * preference:.0f} %" + (f" ({judge})" if reads(judge) else ""))
  return " · ".join(parts)


def _extremes(run: Run, name: str, ranked: Sequence[tuple[dict, float]]) -> str:
  """Fastest and slowest prompts of a system, with the baseline's answers."""
  rows = run.timed if any("seconds" in r for r, _ in ranked) else run.responses  # those whose speed is shown
  baseline = {r["id"]: r for r in rows.get(run.baseline, [])}
  out = []
  for title, chosen in (("Fastest", ranked[:SHOWN]), ("Slowest", ranked[::-1][:SHOWN])):
    out.append(f"<h3>{title}</h3>")
    for row, speed in chosen:
      sides = [(name, row), (run.baseline, baseline.get(row["id"]))]
      boxes = "".join(
        f'<div><h3>{_html(n)}</h3><div class="muted">{_html(_facts(r))}</div>'
        f'<div class="text">{_html(r["text"])}</div></div>'
        for n, r in sides
        if r
      )
      out.append(
        f'<div class="prompt">{_html(row["prompt"])} <span class="muted">{speed:.2f}×</span></div>'
        f'<div class="pair">{boxes}</div>'
      )
  return "".join(out)


def _timelines(run: Run) -> dict[str, dict[str, str]]:
  """The packed SVG of every response, by system and id."""
  checkpoint = load_checkpoint(run.config["model"]["source"], progress=False)
  vocabulary = checkpoint.vocabulary
  rule = PositionRule(run.config["positions"]["strategy"], run.config["positions"]["fixed"])
  rows = [(name, r) for name, rows in run.responses.items() for r in rows if r["trace"]["threads"]]
  drawn: dict[str, dict[str, str]] = {}
  bar, task = progress_bar("timelines", len(rows))
  with bar:
    for name, r in rows:
      record = ResponseRecord.from_json(r)
      caption = [
        ("tokens", f"{record.total_tokens}"),
        ("shown to the reader", f"{record.text_tokens}"),
        ("longest path", f"{record.longest_path}"),
        ("theoretical parallelism", f"{record.theoretical_parallelism:.2f}×"),
        ("promises", f"{record.promises}"),
        ("peak parallelism", f"{record.peak_parallelism}"),
        ("finish", record.finish_reason),
      ]
      trace = from_json(r["trace"], vocabulary, rule)
      svg = timeline_svg(trace, vocabulary.speaking(trace.form), caption, alone=False)
      drawn.setdefault(name, {})[r["id"]] = _packed(svg)
      bar.advance(task)
  return drawn


def _wall_clock(seconds: float | None, baseline: float | None) -> str:
  """Of one response; `baseline`: the baseline's seconds for the same prompt, to compare with."""
  if seconds is None:
    return ""
  return f" · {seconds:.1f} s" + (f", realised speedup {baseline / seconds:.2f}×" if baseline else "")


def _data(run: Run) -> dict:
  """What the page's script shows: prompts, and by system each answer's text, facts and parallelism."""
  judge = next(iter(run.judgements), "")
  prompts: dict[str, dict] = {}
  answers: dict[str, dict[str, dict]] = {}
  for name, rows in run.responses.items():
    seconds = {r["id"]: r["seconds"] for r in run.timed.get(name, [])}
    baseline_rows = run.timed.get(run.baseline, []) if name != run.baseline else []
    baseline = {r["id"]: r["seconds"] for r in baseline_rows}
    preferences = run.judgements[judge].get(name, {}) if judge else {}
    for r in rows:
      prompts.setdefault(
        r["id"],
        {"id": r["id"], "prompt": drawable(r["prompt"]), "category": drawable(r.get("category") or "")},
      )
      preference = preferences[r["id"]]["preference"] if r["id"] in preferences else None
      answers.setdefault(name, {})[r["id"]] = {
        "text": drawable(r["text"]),
        "facts": _facts(r, judge, preference) + _wall_clock(seconds.get(r["id"]), baseline.get(r["id"])),
        "speed": round(r["theoretical_parallelism"], 3),
      }
  order = [*(n for n in answers if n != run.baseline), *([run.baseline] if run.baseline in answers else [])]
  return {"systems": order, "prompts": list(prompts.values()), "answers": answers}


def _threshold_card(t: Threshold) -> str:
  reached = "–" if t.value is None else f"{t.value:.2f}"
  return (
    f'<div class="card"><div class="muted">{_html(t.what)}</div>'
    f'<div class="big {"met" if t.is_met else "missed"}">{reached} '
    f'<span class="muted">of {t.wanted:g} wanted: {"met" if t.is_met else "not met"}</span></div></div>'
  )


def write_page(
  path: Path,
  run: Run,
  summary: dict,
  svgs: Mapping[str, str],
  ranked: Mapping[str, Sequence[tuple[dict, float]]],
  thresholds: Sequence[Threshold],
) -> None:
  """Writes the page.

  `svgs` are the plots by name, `ranked` each system's (row, speed) with the fastest first (`figures.speeds`).
  """
  data = _data(run)
  timelines = _timelines(run)
  met = "".join(map(_threshold_card, thresholds))
  plots = "".join(
    f'<div class="card{" wide" if n.startswith(WIDE) else ""}"><h3>{_html(_plot_title(n))}</h3>{svg}</div>'
    for n, svg in svgs.items()
  )
  extremes = "".join(
    f"<h2>Fastest and slowest prompts: {_html(n)} ({speed_name(run)})</h2>{_extremes(run, n, rows)}"
    for n, rows in ranked.items()
    if n in run.responses and n != run.baseline and any(r["promises"] for r, _ in rows)
  )
  options = "".join(f'<option value="{escape(n)}">{_html(n)}</option>' for n in data["systems"])
  cards = lambda found: "".join(
    f'<div class="card"><h3>{_html(heading)}</h3>{_table(rows)}</div>' for heading, rows in found.items()
  )
  judgements, groups = cards(judged.tables(summary)), cards(group_tables(summary))
  notes = "".join(f'<p class="note">{_html(note)}</p>' for note in judged.notes(summary))
  write_atomic(
    path,
    f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>PASTA: speed and quality</title>
<style>{_file("report.css")}{timeline_style()}</style>
</head>
<body>
<main>
<h1>Speed and quality</h1>
<p class="note">{_html(" · ".join(about(summary)))}</p>
{f'<div class="row">{met}</div>' if met else ""}
<h2>Figures</h2>
<div class="card">{_table(table(summary))}</div>
{notes}
{f'<h2>Judgements</h2><div class="row">{judgements}</div>' if judgements else ""}
<h2>By category and length</h2>
<div class="row">{groups}</div>
<h2>Plots</h2>
<div class="row">{plots}</div>
<h2>Any response</h2>
<div id="explore">
<div class="card">
<select id="system" aria-label="system">{options}</select>
<div style="height:8px"></div>
<select id="order" aria-label="order">
<option value="fast">most parallel first</option>
<option value="slow">least parallel first</option>
<option value="file">in the file's order</option></select>
<div style="height:8px"></div>
<input id="search" type="search" placeholder="search prompts" aria-label="search prompts"/>
<ul id="list"></ul>
</div>
<div class="card" id="answer"></div>
</div>
{extremes}
</main>
<script type="text/plain" id="answers">{_packed(to_json(data))}</script>
<script type="text/plain" id="timelines">{_packed(to_json(timelines))}</script>
<script>{_file("report.js")}{SCRIPT}</script>
</body>
</html>
""",
  )
