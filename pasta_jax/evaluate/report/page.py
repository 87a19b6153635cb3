"""The report as one self-contained HTML page: figures, plots, best and worst prompts, and any response with
its timeline."""

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from pasta_jax.decode.trace import from_json
from pasta_jax.decode.views.timeline import printable, timeline_style, timeline_svg
from pasta_jax.lang.layout import PositionRule
from pasta_jax.utils.progress import progress_bar
from pasta_jax.weights.checkpoint import load_checkpoint

if TYPE_CHECKING:
  from pasta_jax.evaluate.report.report import Run

SHOWN = 3  # best, and as many worst prompts side by side


def _file(name: str) -> str:
  """A file of this package."""
  return (resources.files("pasta_jax.evaluate") / name).read_text(encoding="utf-8")


def _packed(text: str) -> str:
  return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _table(rows: Sequence[Sequence[str]]) -> str:
  cells = lambda row, tag: "".join(f"<{tag}>{escape(c)}</{tag}>" for c in row)
  return (
    f"<table><thead><tr>{cells(rows[0], 'th')}</tr></thead><tbody>"
    + "".join(f"<tr>{cells(r, 'td')}</tr>" for r in rows[1:])
    + "</tbody></table>"
  )


def _facts(row: dict, preference: float | None = None) -> str:
  parts = [
    f"{row['text_tokens']} tokens",
    f"longest path {row['longest_path']}",
    f"{row['theoretical_speedup']:.2f}× in theory",
  ]
  if row["promises"]:
    parts.append(f"{row['promises']} promises")
  if row["finish_reason"] != "stop":
    parts.append("cut off")
  if preference is not None:
    parts.append(f"preferred with {100 * preference:.0f} %")
  return " · ".join(parts)


def _extremes(run: "Run", name: str, ranked: list[tuple[dict, float]]) -> str:
  """Best and worst prompts of a system beside the baseline's answers."""
  # Those that the speed-up is about: the answers by the clock where there are any.
  rows = run.timed if any("seconds" in r for r, _ in ranked) else run.responses
  base = {r["id"]: r for r in rows.get(run.baseline, [])}
  out = []
  for title, chosen in (("Fastest", ranked[:SHOWN]), ("Slowest", ranked[::-1][:SHOWN])):
    out.append(f"<h3>{title}</h3>")
    for row, speed in chosen:
      sides = [(name, row), (run.baseline, base.get(row["id"]))]
      boxes = "".join(
        f'<div><h3>{escape(n)}</h3><div class="muted">{escape(_facts(r))}</div>'
        f'<div class="text">{escape(printable(r["text"]))}</div></div>'
        for n, r in sides
        if r
      )
      out.append(
        f'<div class="prompt">{escape(printable(row["prompt"]))} <span class="muted">{speed:.2f}×</span></div>'
        f'<div class="pair">{boxes}</div>'
      )
  return "".join(out)


def _timelines(run: "Run") -> dict[str, dict[str, str]]:
  """Packed SVGs by system and id, of every response."""
  checkpoint = load_checkpoint(run.config["model"]["source"], progress=False)
  vocabulary = checkpoint.vocabulary
  rule = PositionRule(run.config["positions"]["strategy"], run.config["positions"]["fixed"])
  rows = [(name, r) for name, rows in run.responses.items() for r in rows if r["trace"]["threads"]]
  drawn: dict[str, dict[str, str]] = {}
  bar, task = progress_bar("timelines", len(rows))
  with bar:
    for name, r in rows:
      caption = [
        ("tokens", f"{r['total_tokens']}"),
        ("shown to the reader", f"{r['text_tokens']}"),
        ("longest path", f"{r['longest_path']}"),
        ("theoretical speed-up", f"{r['theoretical_speedup']:.2f}×"),
        ("promises", f"{r['promises']}"),
        ("at once, at most", f"{r['peak_parallelism']}"),
        ("finish", r["finish_reason"]),
      ]
      svg = timeline_svg(from_json(r["trace"], vocabulary, rule), vocabulary, caption)
      drawn.setdefault(name, {})[r["id"]] = _packed(svg.replace(timeline_style(), ""))
      bar.advance(task)
  return drawn


def _by_clock(seconds: float | None, baseline: float | None, compared: bool) -> str:
  if seconds is None:
    return ""
  return f" · {seconds:.1f} s by the clock" + (
    f", {baseline / seconds:.2f}×" if baseline and compared else ""
  )


def _data(run: "Run") -> dict:
  """What the page's script shows: prompts, and by system each answer's text, facts and speed-up."""
  judge = next(iter(run.judgements), None)
  prompts: dict[str, dict] = {}
  answers: dict[str, dict[str, dict]] = {}
  for name, rows in run.responses.items():
    clock = {r["id"]: r["seconds"] for r in run.timed.get(name, [])}
    base = {r["id"]: r["seconds"] for r in run.timed.get(run.baseline, [])}
    judged = run.judgements[judge].get(name, {}) if judge else {}
    for r in rows:
      prompts.setdefault(
        r["id"], {"id": r["id"], "prompt": printable(r["prompt"]), "category": r.get("category", "")}
      )
      preference = judged[r["id"]]["preference"] if r["id"] in judged else None
      answers.setdefault(name, {})[r["id"]] = {
        "text": printable(r["text"]),
        "facts": _facts(r, preference)
        + _by_clock(clock.get(r["id"]), base.get(r["id"]), name != run.baseline),
        "speed": round(r["theoretical_speedup"], 3),
      }
  order = [*(n for n in answers if n != run.baseline), *([run.baseline] if run.baseline in answers else [])]
  return {"systems": order, "prompts": list(prompts.values()), "answers": answers}


def write(
  path: Path,
  run: "Run",
  summary: dict,
  table: list[list[str]],
  drawn: Mapping[str, str],
  ranked: Mapping[str, list[tuple[dict, float]]],
  report_groups: Mapping[str, list[list[str]]],
  verdict: Sequence[tuple] = (),
  note: str = "",
) -> None:
  """Writes the page. `drawn` are SVGs by name, `ranked` each system's (record, speed-up), fastest first;
  `report_groups` tables by heading, `note` what must be said of the figures."""
  data = _data(run)
  timelines = _timelines(run)
  titles = {
    "speedups": "How many prompts get how much",
    "speedups_by_category": "By category",
    "speedups_by_length": "By length of the answer",
  }
  plots = "".join(
    f'<div class="card"><h3>{escape(titles.get(n, "Speed against quality"))}</h3>{svg}</div>'
    for n, svg in drawn.items()
  )
  met = "".join(
    f'<div class="card"><div class="muted">{escape(what)}</div><div class="big {"met" if ok else "missed"}">'
    f'{"–" if value is None else f"{value:.2f}"} <span class="muted">of {wanted:g} wanted: '
    f"{'met' if ok else 'not met'}</span></div></div>"
    for what, value, wanted, ok in verdict
  )
  extremes = "".join(
    f"<h2>Best and worst prompts: {escape(n)}</h2>{_extremes(run, n, rows)}"
    for n, rows in ranked.items()
    if n in run.responses and n != run.baseline and any(r["promises"] for r, _ in rows)
  )
  options = "".join(f"<option>{escape(n)}</option>" for n in data["systems"])
  groups = "".join(
    f'<div class="card"><h3>{escape(heading)}</h3>{_table(rows)}</div>'
    for heading, rows in report_groups.items()
  )
  timed = f", {summary['timed']} by the clock" if summary["timed"] else ""
  about = " · ".join(
    (
      summary["model"],
      f"{summary['prompts']} prompts{timed}, against {summary['baseline']}",
      summary["machine"],
      f"pasta-jax {summary['version']}",
    )
  )
  path.write_text(
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
<p class="note">{escape(about)}</p>
{f'<div class="row">{met}</div>' if met else ""}
<h2>Figures</h2>
<div class="card">{_table(table)}</div>
{f'<p class="note">{escape(note)}</p>' if note else ""}
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
<option value="fast">fastest first</option>
<option value="slow">slowest first</option>
<option value="file">in the file's order</option></select>
<div style="height:8px"></div>
<input id="search" type="search" placeholder="search prompts" aria-label="search prompts"/>
<ul id="list"></ul>
</div>
<div class="card" id="answer"></div>
</div>
{extremes}
</main>
<script type="text/plain" id="answers">{_packed(json.dumps(data))}</script>
<script type="text/plain" id="timelines">{_packed(json.dumps(timelines))}</script>
<script>{_file("report.js")}</script>
</body>
</html>
""",
    encoding="utf-8",
  )
