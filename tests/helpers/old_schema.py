"""Files of a run as they were written before schema 2."""

import json
from pathlib import Path

OLD_KEYS = {  # by the key of today
  "theoretical_parallelism": "theoretical_speedup",
  "tokens_per_round": "parallelism",
  "theoretical_parallelism_with_promises": "theoretical_speedup_with_promises",
  "speedup_over_baseline": "theoretical_against_baseline",
  "realised_speedup": "wall_clock_speedup",
  "realised_speedup_low": "wall_clock_low",
  "realised_speedup_high": "wall_clock_high",
  "with_promises_realised_speedup": "with_promises_wall_clock_speedup",
  "with_promises_realised_speedup_low": "with_promises_wall_clock_low",
  "with_promises_realised_speedup_high": "with_promises_wall_clock_high",
  "defects": "faults",
  "defects of samples, share": "faults of samples, share",
  "share with defects": "share with faults",
  "too short": "curt",
  "too long": "runaway",
  "too many promises": "promise storm",
  "all have defects": "none without faults",
  "ref_logp_drop": "lost",
}


def old(value):
  """`value` with the keys of schema 1, at every level."""
  if isinstance(value, dict):
    return {OLD_KEYS.get(k, k): old(v) for k, v in value.items() if k != "schema"}
  return [old(v) for v in value] if isinstance(value, list) else value


def make_old(folder: Path) -> set[str]:
  """Rewrites all rows and reports in a run's folder; returns the keys that were renamed."""
  renamed: set[str] = set()
  for path in [*folder.rglob("*.jsonl"), *folder.rglob("summary.json"), *folder.rglob("round.json")]:
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    rows = [old(json.loads(line)) for line in lines]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    renamed |= {name for name in OLD_KEYS.values() if any(f'"{name}":' in json.dumps(row) for row in rows)}
  for path in folder.rglob("run.json"):
    about = json.loads(path.read_text())
    del about["judges"]
    path.write_text(json.dumps(about))
  return renamed
