"""A run's folder, read back: responses, timings and judgements by system."""

import dataclasses
import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic

from pasta_jax.decode.record import current
from pasta_jax.evaluate.errors import EvalError
from pasta_jax.utils.json_io import read_json
from pasta_jax.utils.records import read_records
from pasta_jax.utils.typed import Parsed, checked


class _Row(Parsed):
  """What the report needs of each row of responses and timings."""

  id: str
  prompt: str
  text: str
  category: str | None = None
  finish_reason: str
  text_tokens: int
  total_tokens: int
  steps: int
  longest_path: int
  peak_parallelism: int
  promises: int
  depth: int
  ill_formed: int
  refused: int
  topic_twice: bool
  loops: bool
  lengths: list[list[int]]
  theoretical_parallelism: float
  tokens_per_round: float
  unseparated: int | None = None
  seconds: float | None = None


_Reading = Annotated[float, pydantic.Field(ge=0, le=1)]  # a preference for the system's answer


class _Judgement(Parsed):
  """What the report needs of each judgement; judges that do not read have no more than the preference."""

  id: str
  preference: _Reading
  orders: Annotated[list[_Reading | None], pydantic.Field(max_length=2)] = []  # the system's first, second
  first: Annotated[int, pydantic.Field(ge=0, le=1)] | None = None  # index of the one that was read first
  repeated: _Reading | None = None


class _Defects(Parsed):
  """What a reader found in one answer."""

  id: str
  defects: list[str]


class SystemAbout(Parsed):
  """What is known of a system beside its settings (`evaluate.provenance`); older runs know nothing."""

  annotator: str | None = None  # of the rows that its adapter was trained on
  teacher: str | None = None  # what chose the pairs of stage two
  forms: str | None = (
    None  # of the language: visibility, promise, number, positions; None: it has no promises
  )
  varied: str | None = None  # the system that this is one setting of (`eval.vary`)
  value: str | None = None  # and the value of that setting


class _About(Parsed):
  """run.json; it did not list judges before schema 2."""

  requests: list[str]
  judges: list[str] | None = None
  machines: list[str]
  versions: list[str]
  systems: dict[str, SystemAbout] = {}


class _Evaluation(Parsed):
  baseline: str
  judges: str
  systems: str
  min_quality: float
  min_speedup: float
  difficulty: str | None = None


class _Settings(Parsed):
  """What the report needs of config.json."""

  eval: _Evaluation
  model: dict[str, Any]
  positions: dict[str, Any]
  decode: dict[str, Any]
  systems: dict[str, Any]


@dataclasses.dataclass
class Run:
  """The rows of a run's folder that belong to the requests of its last call, with the keys of today."""

  config: dict
  responses: dict[str, list[dict]]  # by system
  timed: dict[str, list[dict]]
  judgements: dict[str, dict[str, dict[str, dict]]]  # judge, system, id -> row with `preference`
  defects: dict[str, dict[str, dict[str, list[str]]]]  # reader, system, id -> names of defects
  baseline: str
  machines: list[str]
  versions: list[str]
  about: dict[str, SystemAbout]  # by system

  @property
  def systems(self) -> list[str]:
    return list(dict.fromkeys([*self.responses, *self.timed]))

  @property
  def is_timed(self) -> bool:
    """Whether the baseline was timed, and any other system."""
    return len(self.timed) > 1 and self.baseline in self.timed


def read_run(workdir: Path) -> Run:
  """Reads a folder that `--mode=eval` made. Raises EvalError, one line, if it has no responses.

  Judgements are in judgements/JUDGE/SYSTEM-against-BASELINE.jsonl, defects in judgements/JUDGE/defects/SYSTEM.jsonl.
  """
  if not (workdir / "config.json").is_file():
    raise EvalError(f"{workdir} has no evaluation: run --mode=eval --workdir={workdir} first")
  config, about = _read(workdir / "config.json"), _read(workdir / "run.json")
  settings = _checked(_Settings, config, workdir / "config.json")
  record = _checked(_About, about, workdir / "run.json")
  requests = set(record.requests)
  responses, timed = (
    _rows_by_system(workdir / folder, requests, [*settings.systems]) for folder in ("responses", "timed")
  )
  if not responses:
    raise EvalError(f"{workdir} has no responses: run --mode=eval --workdir={workdir} first")
  baseline = settings.eval.baseline
  judgements: dict[str, dict[str, dict[str, dict]]] = {}
  for path in sorted((workdir / "judgements").glob(f"*/*-against-{glob.escape(baseline)}.jsonl")):
    name = path.stem.removesuffix(f"-against-{baseline}")
    if rows := _rows(path, requests, _Judgement):
      judgements.setdefault(path.parent.name, {})[name] = {r["id"]: r for r in rows}
  defects: dict[str, dict[str, dict[str, list[str]]]] = {}
  for path in sorted((workdir / "judgements").glob("*/defects/*.jsonl")):
    if rows := _rows(path, requests, _Defects):
      defects.setdefault(path.parent.parent.name, {})[path.stem] = {r["id"]: r["defects"] for r in rows}
  order = _judges_of_old_run(config, [*judgements]) if record.judges is None else record.judges
  # The judges of the last call first, in their order: the first one decides.
  place = lambda judge: order.index(judge) if judge in order else len(order)
  judgements = {j: judgements[j] for j in sorted(judgements, key=place)}
  return Run(
    config, responses, timed, judgements, defects, baseline, record.machines, record.versions, record.systems
  )


def _read(path: Path) -> Any:
  try:
    return read_json(path)
  except ValueError as error:
    raise EvalError(str(error)) from None


def _checked(kind: type, value: Any, where: Path | str) -> Any:
  try:
    return checked(kind, value, str(where))
  except ValueError as error:
    raise EvalError(str(error)) from None


def _rows(path: Path, requests: set[str], kind: type[Parsed]) -> list[dict]:
  """The rows of a file that belong to `requests`, each with the fields of `kind`."""
  rows = [current(r) for r in read_records(path) if r["id"] in requests]
  for r in rows:
    _checked(kind, r, f"{path}, row {r['id']}")
  return rows


def _rows_by_system(folder: Path, requests: set[str], order: Sequence[str]) -> dict[str, list[dict]]:
  """The rows of each file that has any of `requests`; systems of the config first, in its order."""
  names = sorted(
    (path.stem for path in folder.glob("*.jsonl")),
    key=lambda n: (order.index(n) if n in order else len(order), n),
  )
  rows = {n: _rows(folder / f"{n}.jsonl", requests, _Row) for n in names}
  return {n: of_system for n, of_system in rows.items() if of_system}


def _judges_of_old_run(config: dict, judges: Sequence[str]) -> list[str]:
  """Names of the last call's judges, from the config: `run.json` did not list them before schema 2."""
  names = [n.strip() for n in config["eval"]["judges"].split(",")]
  stems = [
    config["judge"]["model"].replace("/", "-") if n == "llm" else Path(n).name.split(".")[0] for n in names
  ]
  # A judge that reads a file has the first digits of the file's sha256 in its name.
  return [j for stem in stems for j in judges if j == stem or j[:-7] == stem]
