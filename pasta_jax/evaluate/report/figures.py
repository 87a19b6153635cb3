"""Which plots a run gets, and with which figures."""

from pasta_jax.evaluate.metrics.measures import geometric_mean, length_class, natural
from pasta_jax.evaluate.report import plots
from pasta_jax.evaluate.report.run_record import Run


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
  palette = plots.colours(run.systems)
  speed = speed_name(run)
  by_system = {n: pairs for n in run.systems if n != run.baseline and (pairs := speeds(run, n))}
  figures = {}
  for judge in run.judgements:
    if points := _speed_and_quality(run, summary, judge):
      figures[f"speed_quality_{judge}"] = plots.pareto(
        points,
        speed="realised speedup" if run.is_timed else "theoretical speedup",
        judge=judge,
        palette=palette,
        baseline=run.baseline,
        paper=run.is_timed,
      )
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


def _speed_and_quality(
  run: Run, summary: dict, judge: str
) -> dict[str, tuple[float, float, tuple[float, float] | None]]:
  """(speedup over the baseline, win rate, 95 % interval of the speedup) by system; {} if none has both.

  Realised speedups if there are timings, else theoretical ones: both count a shorter answer as faster.
  """
  part, key = ("timed", "realised_speedup") if run.is_timed else ("responses", "speedup_over_baseline")
  points = {}
  for name, entry in summary["systems"].items():
    figures, rates = entry.get(part, {}), entry["quality"].get(judge, {})
    if key in figures and "win_rate" in rates:
      interval = (figures[f"{key}_low"], figures[f"{key}_high"]) if f"{key}_low" in figures else None
      points[name] = (figures[key], rates["win_rate"], interval)
  return points | {run.baseline: (1.0, 50.0, None)} if points else {}
