"""From a run's folder to its figures: `summary.json`, a Markdown table, a page, plots, and AlpacaEval's own
files.

    python main.py --mode=report --workdir=runs/eval

Reads what `evaluate.run` left there and loads no weights but the tokenizer's. It can be run at any time, on
whatever systems, timings and judgements there are.
"""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import rich.console
import rich.table

from pasta_jax.evaluate.errors import EvalError
from pasta_jax.evaluate.metrics.length_control import length_controlled
from pasta_jax.evaluate.metrics.measures import geometric_mean, grouped, length_class, natural, summarise
from pasta_jax.evaluate.report import page, plots
from pasta_jax.utils.jsonl import read_jsonl
from pasta_jax.utils.records import read_records


@dataclasses.dataclass
class Run:
  """What stands in a run's folder: records and judgements by system."""

  config: dict
  responses: dict[str, list[dict]]
  timed: dict[str, list[dict]]
  judgements: dict[str, dict[str, dict[str, dict]]]  # judge, system, id -> row with `preference`
  baseline: str
  machines: list[str]
  versions: list[str]

  @property
  def systems(self) -> list[str]:
    return [n for n in dict.fromkeys([*self.responses, *self.timed])]


def read_run(workdir: Path) -> Run:
  """Reads a folder that `--mode=eval` made: what concerns the requests of the last call. Raises EvalError if
  there are no responses."""
  try:
    config = json.loads((workdir / "config.json").read_text())
  except (OSError, ValueError):
    raise EvalError(f"{workdir} holds no evaluation: run --mode=eval --workdir={workdir} first") from None
  order = [*config["systems"]]
  found = lambda folder: sorted(
    (p.stem for p in (workdir / folder).glob("*.jsonl") if read_records(p)),
    key=lambda n: (order.index(n) if n in order else len(order), n),
  )
  about = json.loads((workdir / "run.json").read_text())
  asked = set(about["requests"])
  rows_of = lambda folder: {
    n: rows
    for n in found(folder)
    if (rows := [r for r in read_records(workdir / folder / f"{n}.jsonl") if r["id"] in asked])
  }
  responses, timed = rows_of("responses"), rows_of("timed")
  if not responses:
    raise EvalError(f"{workdir} holds no responses: run --mode=eval --workdir={workdir} first")
  judgements: dict[str, dict[str, dict[str, dict]]] = {}
  baseline = config["eval"]["baseline"]
  for path in sorted((workdir / "judgements").glob(f"*/*-against-{baseline}.jsonl")):
    name = path.stem.removesuffix(f"-against-{baseline}")
    if rows := {r["id"]: r for r in read_records(path) if r["id"] in asked}:
      judgements.setdefault(path.parent.name, {})[name] = rows
  # The judges of the last call first, in their order: the first one decides.
  named = [n.strip() for n in config["eval"]["judges"].split(",")]
  first = [
    config["judge"]["model"].replace("/", "-") if n == "llm" else Path(n).name.split(".")[0] for n in named
  ]
  place = lambda judge: next((i for i, n in enumerate(first) if judge == n or judge[:-7] == n), len(first))
  judgements = {j: judgements[j] for j in sorted(judgements, key=place)}
  return Run(config, responses, timed, judgements, baseline, about["machines"], about["versions"])


def quality(run: Run, judge: str, system: str, difficulty: dict[str, float] | None) -> dict[str, float]:
  """Win rate against the baseline, plain and length-controlled, in per cent; standard errors beside."""
  rows = run.judgements[judge][system]
  texts = [{r["id"]: r["text"] for r in run.responses[n]} for n in (system, run.baseline)]
  ids = [i for i in rows if all(i in t for t in texts)]
  preference = np.array([rows[i]["preference"] for i in ids])
  lengths = [np.array([float(len(t[i])) for i in ids]) for t in texts]
  out = {"judged": len(ids), "win_rate": 100 * float(preference.mean()) if len(ids) else math.nan}
  if len(ids) >= 3:
    if difficulty is not None and (lost := [i for i in ids if i not in difficulty]):
      raise EvalError(f"eval.difficulty says nothing of prompt {lost[0]!r} and {len(lost) - 1} others")
    gamma = None if difficulty is None else np.array([difficulty[i] for i in ids])
    fit = length_controlled(preference, lengths[1], lengths[0], gamma, resamples=200)
    out |= {
      "win_rate_error": fit.win_rate_error,
      "length_controlled": fit.length_controlled,
      "length_controlled_error": fit.length_controlled_error,
    }
  return out


def summarise_run(run: Run) -> dict:
  """All figures of a run, for JSON."""
  path = run.config["eval"].get("difficulty")
  difficulty = {str(r["id"]): float(r["difficulty"]) for r in read_jsonl(path)} if path else None
  systems = {}
  for name in run.systems:
    entry: dict = {}
    for kind, rows in (("responses", run.responses), ("timed", run.timed)):
      if name not in rows:
        continue
      against = rows.get(run.baseline, []) if name != run.baseline else []
      entry[kind] = summarise(rows[name], against)
      entry[f"{kind}_by_category"] = grouped(rows[name], against, lambda r: r.get("category") or "all")
      entry[f"{kind}_by_length"] = grouped(rows[name], against, length_class)
    entry["quality"] = {
      judge: quality(run, judge, name, difficulty) for judge, found in run.judgements.items() if name in found
    }
    systems[name] = entry
  return {
    "baseline": run.baseline,
    "model": run.config["model"]["source"],
    "dtype": run.config["decode"]["dtype"],
    "prompts": len(run.responses.get(run.baseline, next(iter(run.responses.values())))),
    "timed": max(map(len, run.timed.values()), default=0),
    "version": ", ".join(run.versions),
    "machine": " and ".join(run.machines),
    "systems": systems,
  }


# The table: (heading, part of a system's entry, key, form).

_PER_CENT = lambda v: f"{100 * v:.0f} %"
_TIMES = lambda v: f"{v:.2f}"
_RATE = lambda v: f"{v:.1f} %"
COLUMNS = (
  ("prompts answered", "responses", "prompts", lambda v: f"{v:.0f}"),
  ("answers with promises or points", "responses", "promise_share", _PER_CENT),
  ("theoretical speedup", "responses", "theoretical_speedup", _TIMES),
  ("the same, answers with promises", "responses", "theoretical_speedup_with_promises", _TIMES),
  ("baseline's tokens over the longest path", "responses", "theoretical_against_baseline", _TIMES),
  ("parallelism", "responses", "parallelism", _TIMES),
  ("tokens that are no text (tags, outlines)", "responses", "tag_overhead", _PER_CENT),
  ("promised lengths: median error", "responses", "length_error", _PER_CENT),
  ("ill-formed answers", "responses", "malformed_share", _PER_CENT),
  ("answers that promise a topic twice", "responses", "topic_twice_share", _PER_CENT),
  ("answers that loop", "responses", "loop_share", _PER_CENT),
  ("answers cut off", "responses", "cut_share", _PER_CENT),
  ("tokens of the text", "responses", "text_tokens", lambda v: f"{v:.0f}"),
  ("prompts by the clock", "timed", "prompts", lambda v: f"{v:.0f}"),
  ("wall-clock speedup", "timed", "wall_clock_speedup", _TIMES),
  ("95 % interval", "timed", "interval", str),
  ("for the same number of tokens", "timed", "same_text_speedup", _TIMES),
  ("efficiency (clock over theory)", "timed", "efficiency", _PER_CENT),
  ("prompts slower than the baseline", "timed", "slower_share", _PER_CENT),
  ("tokens a second", "timed", "tokens_a_second", lambda v: f"{v:.1f}"),
)


def table(summary: dict) -> list[list[str]]:
  """Rows of text: the heading first, then a figure a row and a system a column."""
  systems = summary["systems"]
  rows = [["", *systems]]
  for heading, part, key, form in COLUMNS:
    row = [heading]
    for entry in systems.values():
      figures = dict(entry.get(part, {}))
      if "wall_clock_low" in figures:
        figures["interval"] = f"{figures['wall_clock_low']:.2f} to {figures['wall_clock_high']:.2f}"
      row.append(form(figures[key]) if key in figures else "–")
    if any(cell != "–" for cell in row[1:]):
      rows.append(row)
  for judge in dict.fromkeys(j for entry in systems.values() for j in entry["quality"]):
    counts = [entry["quality"].get(judge, {}).get("judged") for entry in systems.values()]
    rows.append([f"answers judged ({judge})", *("–" if n is None else str(n) for n in counts)])
    for heading, key in (
      (f"win rate ({judge})", "win_rate"),
      (f"length-controlled win rate ({judge})", "length_controlled"),
    ):
      cells = [entry["quality"].get(judge, {}) for entry in systems.values()]
      rows.append(
        [
          heading,
          *(
            f"{_RATE(c[key])} ± {c[key + '_error']:.1f}"
            if key + "_error" in c
            else _RATE(c[key])
            if key in c
            else "–"
            for c in cells
          ),
        ]
      )
  return rows


def group_tables(summary: dict) -> dict[str, list[list[str]]]:
  """Speed-ups by category and by length: the heading, then a group a row and a system a column.

  By the clock, with 95 % intervals, where there are timings; else theoretical.
  """
  systems = {n: e for n, e in summary["systems"].items() if n != summary["baseline"]}
  timed = any("wall_clock_speedup" in e.get("timed", {}) for e in systems.values())
  part, what = ("timed", "wall-clock speedup") if timed else ("responses", "theoretical speedup")

  def cell(f: dict) -> str:
    if not timed:
      return f"{f['theoretical_speedup']:.2f} ({f['prompts']})" if "theoretical_speedup" in f else "–"
    if "wall_clock_speedup" not in f:
      return "–"
    return f"{f['wall_clock_speedup']:.2f}, {f['wall_clock_low']:.2f} to {f['wall_clock_high']:.2f} ({f['prompts']})"

  tables = {}
  for heading, kind in (("By category", "category"), ("By length of the answer", "length")):
    found = {n: e.get(f"{part}_by_{kind}", {}) for n, e in systems.items()}
    groups = sorted({g for f in found.values() for g in f}, key=natural)
    rows = [["", *systems], *([g, *(cell(f.get(g, {})) for f in found.values())] for g in groups)]
    tables[f"{heading}: {what} (prompts)"] = rows
  return tables


def markdown(summary: dict) -> str:
  """The table, with commit and machine."""
  rows = table(summary)
  line = lambda cells: "| " + " | ".join(cells) + " |"
  lines = [line(rows[0]), line(["---"] * len(rows[0])), *(line(r) for r in rows[1:])]
  timed = f"; {summary['timed']} of them by the clock ({summary['dtype']})" if summary["timed"] else ""
  groups = "".join(
    f"\n{heading}\n\n" + "\n".join([line(g[0]), line(["---"] * len(g[0])), *(line(r) for r in g[1:])]) + "\n"
    for heading, g in group_tables(summary).items()
  )
  note = f"\n{said}\n" if (said := judge_note(summary)) else ""
  return (
    f"{summary['model']}, {summary['prompts']} prompts{timed}, against {summary['baseline']}; {summary['machine']}; "
    f"pasta-jax {summary['version']}\n\n" + "\n".join(lines) + "\n" + note + groups
  )


def speedups(run: Run, name: str) -> list[tuple[dict, float]]:
  """(record, speed-up) of a system's prompts: by the clock where there are timings, else theoretical."""
  if by_clock(run):
    base = {r["id"]: r for r in run.timed[run.baseline]}
    return [(r, base[r["id"]]["seconds"] / r["seconds"]) for r in run.timed.get(name, []) if r["id"] in base]
  return [(r, r["theoretical_speedup"]) for r in run.responses.get(name, [])]


def by_clock(run: Run) -> bool:
  return len(run.timed) > 1 and run.baseline in run.timed


def draw(run: Run, summary: dict) -> dict[str, plots.Figure]:
  """The run's plots by name."""
  palette = plots.colours(run.systems)
  what = "wall-clock speedup" if by_clock(run) else "theoretical speedup"
  # Against the baseline's answer, as the clock and the paper's theoretical speedup have it: a shorter answer
  # is faster.
  part, key = (
    ("timed", "wall_clock_speedup") if by_clock(run) else ("responses", "theoretical_against_baseline")
  )
  others = [n for n in run.systems if n != run.baseline and speedups(run, n)]
  figures = {}
  for judge in run.judgements:
    points = {}
    for name, entry in summary["systems"].items():
      rate = entry["quality"].get(judge, {})
      if key in entry.get(part, {}) and "win_rate" in rate:
        f = entry[part]
        interval = (
          (f["wall_clock_low"], f["wall_clock_high"]) if "wall_clock_low" in f and part == "timed" else None
        )
        points[name] = (f[key], rate["win_rate"], interval)
    if points:
      points[run.baseline] = (1.0, 50.0, None)
      speed = what if by_clock(run) else "baseline's tokens over the longest path"
      figures[f"speed_quality_{judge}"] = plots.pareto(
        points, speed=speed, judge=judge, palette=palette, baseline=run.baseline, paper=by_clock(run)
      )
  if others:
    figures["speedups"] = plots.distribution(
      {n: [s for _, s in speedups(run, n)] for n in others}, speed=what, palette=palette
    )
    for grouping, group in (("category", lambda r: r.get("category") or "all"), ("length", length_class)):
      values = {}
      for n in others:
        members: dict[str, list[float]] = {}
        for row, s in speedups(run, n):
          members.setdefault(group(row), []).append(s)
        values[n] = {g: geometric_mean(members[g]) for g in sorted(members, key=natural)}
      figures[f"speedups_by_{grouping}"] = plots.groups(values, speed=what, palette=palette)
  return figures


def write(workdir: Path) -> dict:
  """Writes everything into the run's folder, prints the table, and returns the summary."""
  run = read_run(workdir)
  summary = summarise_run(run)
  (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
  (workdir / "report.md").write_text(markdown(summary))
  alpaca_eval(workdir, run)
  (workdir / "figures").mkdir(exist_ok=True)
  drawn = {}
  for name, figure in draw(run, summary).items():
    plots.save(figure, workdir / "figures" / name)
    drawn[name] = plots.svg(figure)
  ranked = {n: sorted(speedups(run, n), key=lambda pair: -pair[1]) for n in run.systems}
  page.write(
    workdir / "report.html",
    run,
    summary,
    table(summary),
    drawn,
    ranked,
    group_tables(summary),
    verdict(run, summary),
    judge_note(summary),
  )
  show(summary)
  return summary


def alpaca_eval(workdir: Path, run: Run) -> None:
  """`alpaca_eval/SYSTEM.json`, as AlpacaEval's tools want it."""
  folder = workdir / "alpaca_eval"
  folder.mkdir(exist_ok=True)
  for name, rows in run.responses.items():
    outputs = [
      {"dataset": r.get("category", ""), "instruction": r["prompt"], "output": r["text"], "generator": name}
      for r in rows
    ]
    (folder / f"{name}.json").write_text(json.dumps(outputs, indent=1, ensure_ascii=False))


_LOCAL_JUDGE = (
  "The local judge weighs how likely each answer is under the baseline model, and plain faults (loops, cut-off "
  "answers, lengths that the prompt forbids). It sees whether a text hangs together; it does not see whether it is "
  "true or useful, and it leans towards the baseline's own answers."
)


def judge_note(summary: dict) -> str:
  """What must be said of the judges' figures; "" where nothing must."""
  return _LOCAL_JUDGE if any("local" in e["quality"] for e in summary["systems"].values()) else ""


def show(summary: dict) -> None:
  """Prints the table in the terminal."""
  rows = table(summary)
  shown = rich.table.Table(
    title=f"{summary['prompts']} prompts" + (f", {summary['timed']} by the clock" if summary["timed"] else "")
  )
  for k, name in enumerate(rows[0]):
    shown.add_column(name, justify="right" if k else "left")
  for row in rows[1:]:
    shown.add_row(*row)
  console = rich.console.Console()
  console.print(shown)
  if note := judge_note(summary):
    console.print(note)


def verdict(run: Run, summary: dict) -> list[tuple[str, float | None, float, bool]]:
  """What `eval.min_quality` and `eval.min_speedup` ask of the first system: (what, reached, wanted, whether
  it is met).

  What was not measured is not met.
  """
  e = run.config["eval"]
  names = [s.strip() for s in e["systems"].split(",") if s.strip() and s.strip() != run.baseline]
  entry: dict = summary["systems"].get(names[0], {}) if names else {}
  judge = next(iter(entry.get("quality", {})), "not judged")
  rate = entry.get("quality", {}).get(judge, {})
  found = (
    ()
    if not names
    else (
      (f"win rate of {names[0]}, % ({judge})", rate.get("win_rate"), e["min_quality"]),
      (
        f"wall-clock speedup of {names[0]}",
        entry.get("timed", {}).get("wall_clock_speedup"),
        e["min_speedup"],
      ),
    )
  )
  return [
    (what, value, wanted, value is not None and value >= wanted) for what, value, wanted in found if wanted
  ]
