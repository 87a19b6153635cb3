"""Writes a run's report: `summary.json`, `report.md`, `report.html`, plots, and files for AlpacaEval's tools.

    python main.py --mode=report --workdir=runs/eval

It reads what `evaluate.run` left in the folder and loads no weights but the tokenizer's. It can be run at any
time, on the systems, timings and judgements that exist so far.
"""

from pathlib import Path

from pasta_jax.evaluate.report import page, plots, tables
from pasta_jax.evaluate.report.figures import draw, speeds
from pasta_jax.evaluate.report.run_record import Run, read_run
from pasta_jax.evaluate.report.separators import counted
from pasta_jax.evaluate.report.summary import summarise_run, thresholds
from pasta_jax.utils.files import write_atomic, write_json_atomic
from pasta_jax.utils.json_io import to_json
from pasta_jax.utils.locks import locked


def write_report(workdir: Path) -> dict:
  """Writes everything into the run's folder, prints the table, and returns the summary."""
  run = counted(read_run(workdir))
  summary = summarise_run(run)
  with locked(workdir / "report.lock"):  # the run may go on beside it
    _write(run, summary, workdir)
  tables.show(summary)
  return summary


def _write(run: Run, summary: dict, workdir: Path) -> None:
  write_json_atomic(workdir / "summary.json", summary)
  write_atomic(workdir / "report.md", tables.markdown(summary))
  write_alpaca_eval(workdir / "alpaca_eval", run)
  (workdir / "figures").mkdir(exist_ok=True)
  svgs = {}
  for name, figure in draw(run, summary).items():
    plots.save(figure, workdir / "figures" / name)
    svgs[name] = plots.svg(figure)
  ranked = {n: sorted(speeds(run, n), key=lambda pair: -pair[1]) for n in run.systems}
  page.write_page(workdir / "report.html", run, summary, svgs, ranked, thresholds(run, summary))


def write_alpaca_eval(folder: Path, run: Run) -> None:
  """`folder/SYSTEM.json` in the form that AlpacaEval's tools read."""
  folder.mkdir(exist_ok=True)
  for name, rows in run.responses.items():
    outputs = [
      {"dataset": r.get("category") or "", "instruction": r["prompt"], "output": r["text"], "generator": name}
      for r in rows
    ]
    write_atomic(folder / f"{name}.json", to_json(outputs, indent=1))
