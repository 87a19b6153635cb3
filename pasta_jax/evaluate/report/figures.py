"""Which plots a run gets, and with which figures."""

from pasta_jax.evaluate.metrics.measures import geometric_mean, length_class, natural
from pasta_jax.evaluate.report import plots, speed_quality
from pasta_jax.evaluate.report.readings import rate_name, reads
from pasta_jax.evaluate.report.run_record import Run

TIMED = ("realised_speedup", "realised_speedup_low", "realised_speedup_high")


def speed_name(run: Run) -> str:
  """What measures speed in plots and on the page: the realised speedup if there are timings."""
  return "realised speedup" if run.is_timed else "theoretical parallelism"


def speeds(run: Run, name: str) -> list[tuple[dict, float]]:
  """(row, its `speed_name`) of each prompt of a system."""
  if run.is_timed:
    seconds = {r["id"]: r["seconds"] for r in run.timed[run.baseline]}
    return [(r, seconds[r["id"]] / r["seconds"]) for r in run.timed.get(name, []) if r["id"] in seconds]
  return [(r, r["theoretical_parallelism"]) for r in run.responses.get(name, [])]


def draw(run: Run, summary: dict) -> dict[str, plots.Figure]:
  """The run's plots by name."""
  palette, fronts = plots.colours(run.systems), _fronts(run)
  speed = speed_name(run)
  by_system = {n: pairs for n in run.systems if n != run.baseline and (pairs := speeds(run, n))}
  figures = {}
  for judge in run.judgements:
    if points := _speed_and_quality(run, summary, judge):
      figures[f"speed_quality_{judge}"] = speed_quality.draw(
        points,
        rate=rate_name(judge),
        palette=_of_fronts(palette, fronts),
        fronts=[f for front in fronts if (f := {n: label for n, label in front.items() if n in points})],
        baseline=run.baseline,
        with_paper=reads(
          judge
        ),  # the form that a likelihood checks is no quality to compare with the paper's
      )
    if by_parts := summary["judges"][judge].get("parts"):
      figures[f"parts_{judge}"] = plots.parts(
        by_parts, rate=rate_name(judge), palette=palette, baseline=run.baseline
      )
  lengths = {n: [p for r in rows for p in r["lengths"]] for n, rows in run.responses.items()}
  if lengths := {n: pairs for n, pairs in lengths.items() if pairs}:
    figures["calibration"] = plots.calibration(lengths, palette=palette)
  if by_system:
    figures["speedups"] = plots.distribution(
      {n: [s for _, s in pairs] for n, pairs in by_system.items()}, speed=speed, palette=palette
    )
    for grouping, group in (("category", lambda r: r.get("category") or "all"), ("length", length_class)):
      values = {}
      for n, pairs in by_system.items():
        members: dict[str, list[float]] = {}
        for row, s in pairs:
          members.setdefault(group(row), []).append(s)
        values[n] = {g: geometric_mean(members[g]) for g in sorted(members, key=natural)}
      figures[f"speedups_by_{grouping}"] = plots.groups(values, speed=speed, palette=palette)
  return figures


def _fronts(run: Run) -> list[dict[str, str]]:
  """The systems that are settings of one system (`eval.vary`), in their order, each with its label."""
  fronts: dict[str, dict[str, str]] = {}
  for name in run.systems:
    if (about := run.about.get(name)) and about.varied:
      fronts.setdefault(about.varied, {})[name] = f"{about.varied} {about.value}"
  return [*fronts.values()]


def _of_fronts(palette: dict[str, str], fronts: list[dict[str, str]]) -> dict[str, str]:
  """The palette with one colour for all systems of a front."""
  return palette | {name: palette[next(iter(front))] for front in fronts for name in front}


def _speed_and_quality(run: Run, summary: dict, judge: str) -> dict[str, speed_quality.Point]:
  """The point of each system that the judge compared with the baseline, and that has any speed."""
  points = {}
  for name, entry in summary["systems"].items():
    figures = entry.get("responses", {}) | {k: v for k, v in entry.get("timed", {}).items() if k in TIMED}
    rates = entry["quality"].get(judge, {})
    speeds = {m: figures[m] for m in speed_quality.MEASURES if m in figures}
    if name == run.baseline or not speeds or not rates.get("judged"):
      continue
    between = lambda of, key: (of[f"{key}_low"], of[f"{key}_high"]) if f"{key}_low" in of else None
    intervals = {m: interval for m in speeds if (interval := between(figures, m))}
    points[name] = speed_quality.Point(speeds, intervals, rates["win_rate"], between(rates, "win_rate"))
  return points
