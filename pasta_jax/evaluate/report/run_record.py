"""A run's folder, read back: responses, timings and judgements by system."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from pasta_jax.decode.record import current
from pasta_jax.evaluate.errors import EvalError
from pasta_jax.utils.records import read_records


@dataclasses.dataclass
class Run:
  """The rows of a run's folder that belong to the requests of its last call, with the keys of today."""

  config: dict
  responses: dict[str, list[dict]]  # by system
  timed: dict[str, list[dict]]
  judgements: dict[str, dict[str, dict[str, dict]]]  # judge, system, id -> row with `preference`
  baseline: str
  machines: list[str]
  versions: list[str]

  @property
  def systems(self) -> list[str]:
    return list(dict.fromkeys([*self.responses, *self.timed]))

  @property
  def is_timed(self) -> bool:
    """Whether the baseline was timed, and any other system."""
    return len(self.timed) > 1 and self.baseline in self.timed


def read_run(workdir: Path) -> Run:
  """Reads a folder that `--mode=eval` made. Raises EvalError, one line, if it has no responses."""
  try:
    config = json.loads((workdir / "config.json").read_text())
  except (OSError, ValueError):
    raise EvalError(f"{workdir} has no evaluation: run --mode=eval --workdir={workdir} first") from None
  about = json.loads((workdir / "run.json").read_text())
  requests = set(about["requests"])
  responses, timed = (
    _rows_by_system(workdir / folder, requests, [*config["systems"]]) for folder in ("responses", "timed")
  )
  if not responses:
    raise EvalError(f"{workdir} has no responses: run --mode=eval --workdir={workdir} first")
  baseline = config["eval"]["baseline"]
  judgements: dict[str, dict[str, dict[str, dict]]] = {}
  for path in sorted((workdir / "judgements").glob(f"*/*-against-{baseline}.jsonl")):
    name = path.stem.removesuffix(f"-against-{baseline}")
    if rows := {r["id"]: current(r) for r in read_records(path) if r["id"] in requests}:
      judgements.setdefault(path.parent.name, {})[name] = rows
  order = about["judges"] if "judges" in about else _judges_of_old_run(config, [*judgements])
  # The judges of the last call first, in their order: the first one decides.
  place = lambda judge: order.index(judge) if judge in order else len(order)
  judgements = {j: judgements[j] for j in sorted(judgements, key=place)}
  return Run(config, responses, timed, judgements, baseline, about["machines"], about["versions"])


def _rows_by_system(folder: Path, requests: set[str], order: Sequence[str]) -> dict[str, list[dict]]:
  """The rows of each file that has any of `requests`; systems of the config first, in its order."""
  names = sorted(
    (path.stem for path in folder.glob("*.jsonl")),
    key=lambda n: (order.index(n) if n in order else len(order), n),
  )
  rows = {n: [current(r) for r in read_records(folder / f"{n}.jsonl") if r["id"] in requests] for n in names}
  return {n: of_system for n, of_system in rows.items() if of_system}


def _judges_of_old_run(config: dict, judges: Sequence[str]) -> list[str]:
  """Names of the last call's judges, from the config: `run.json` did not list them before schema 2."""
  names = [n.strip() for n in config["eval"]["judges"].split(",")]
  stems = [
    config["judge"]["model"].replace("/", "-") if n == "llm" else Path(n).name.split(".")[0] for n in names
  ]
  # A judge that reads a file has the first digits of the file's sha256 in its name.
  return [j for stem in stems for j in judges if j == stem or j[:-7] == stem]
