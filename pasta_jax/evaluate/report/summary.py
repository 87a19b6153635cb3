"""All figures of a run (`summary.json`), and whether they reach what a pilot asks for."""

from typing import NamedTuple

from pasta_jax.decode.record import SCHEMA
from pasta_jax.evaluate.metrics import declared
from pasta_jax.evaluate.metrics.length_control import read_difficulty
from pasta_jax.evaluate.metrics.measures import cut_by_text, grouped, length_class, summarise
from pasta_jax.evaluate.report.readings import of_judge, quality, rate_name
from pasta_jax.evaluate.report.run_record import Run


def summarise_run(run: Run) -> dict:
  """The figures of every system, ready for JSON."""
  path = run.config["eval"].get("difficulty")
  difficulty = read_difficulty(path) if path else None
  text_limit, cut_shares = cut_by_text(run.responses)
  systems = {}
  for name in run.systems:
    entry: dict = {}
    for kind, rows in (("responses", run.responses), ("timed", run.timed)):
      if name not in rows:
        continue
      baseline = rows.get(run.baseline, []) if name != run.baseline else []
      entry[kind] = summarise(rows[name], baseline)
      entry[f"{kind}_by_category"] = grouped(rows[name], baseline, lambda r: r.get("category") or "all")
      entry[f"{kind}_by_length"] = grouped(rows[name], baseline, length_class)
    if name in run.responses:
      entry["responses"] |= declared.summarise([r["lengths"] for r in run.responses[name]])
    if name in cut_shares:
      entry["responses"]["cut_by_text_share"] = cut_shares[name]
    entry["quality"] = {
      judge: quality(run, judge, name, difficulty)
      for judge, judged in run.judgements.items()
      if name in judged
    }
    entry["about"] = run.about[name].model_dump(exclude_none=True) if name in run.about else {}
    systems[name] = entry
  return {
    "schema": SCHEMA,
    "baseline": run.baseline,
    "model": run.config["model"]["source"],
    "dtype": run.config["decode"]["dtype"],
    "prompts": len(run.responses.get(run.baseline, next(iter(run.responses.values())))),
    "text_limit": text_limit,
    "timed": max(map(len, run.timed.values()), default=0),
    "version": ", ".join(run.versions),
    "machine": " and ".join(run.machines),
    "systems": systems,
    "judges": {judge: of_judge(run, judge) for judge in {**run.judgements, **run.defects}},
  }


class Threshold(NamedTuple):
  """One demand of a pilot on its first system."""

  what: str
  value: float | None  # None: not measured, which does not meet the threshold
  wanted: float

  @property
  def is_met(self) -> bool:
    return self.value is not None and self.value >= self.wanted


def thresholds(run: Run, summary: dict) -> list[Threshold]:
  """What `eval.min_quality` and `eval.min_speedup` ask of the first system; a demand of 0 is left out."""
  e = run.config["eval"]
  names = [s.strip() for s in e["systems"].split(",") if s.strip() and s.strip() != run.baseline]
  if not names:
    return []
  entry: dict = summary["systems"].get(names[0], {})
  judge = next(iter(entry.get("quality", {})), "not judged")
  win_rate = entry.get("quality", {}).get(judge, {}).get("win_rate")
  speedup = entry.get("timed", {}).get("realised_speedup")
  demands = (
    Threshold(f"{rate_name(judge)} of {names[0]}, %", win_rate, e["min_quality"]),
    Threshold(f"realised speedup of {names[0]}", speedup, e["min_speedup"]),
  )
  return [t for t in demands if t.wanted]
