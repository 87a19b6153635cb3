"""`--mode=eval`: systems answer the prompts of a benchmark, are timed, judged and reported. Resumable.

    workdir/responses/SYSTEM.jsonl    responses in batches: for quality and theoretical figures
    workdir/timed/SYSTEM.jsonl        timed responses, one at a time, systems interleaved prompt by prompt
    workdir/judgements/…              preferences (`judges.judging`)
    workdir/report.html, report.md, summary.json, figures/, alpaca_eval/      (`report.write`)

Every file of rows has its settings beside it. A run that was stopped continues where it was, and a system
that is added later joins the earlier ones.

Several processes share out the answers (`utils.shared_records`) and what a judge needs a device for
(`judges.judging`). The first one does the rest: it times answers, so that nothing runs beside a clock on the same
host, calls endpoints and writes the report.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np

from pasta_jax.config import with_changes
from pasta_jax.data.prompts import PromptTurn, conversation, read_prompts
from pasta_jax.decode.generator import DecodeError, Model
from pasta_jax.decode.precision import resolve
from pasta_jax.decode.settings import padded_length
from pasta_jax.evaluate.errors import EvalError
from pasta_jax.evaluate.identity import settings_of
from pasta_jax.evaluate.judges.judge import Judge
from pasta_jax.evaluate.judges.judging import judge_run
from pasta_jax.evaluate.judges.registry import judges_of
from pasta_jax.evaluate.provenance import provenance
from pasta_jax.evaluate.report.run_record import read_run
from pasta_jax.evaluate.report.summary import thresholds
from pasta_jax.evaluate.report.write import write_report
from pasta_jax.evaluate.systems.registry import load_system
from pasta_jax.evaluate.systems.system import System
from pasta_jax.evaluate.vary import varied
from pasta_jax.utils import distributed
from pasta_jax.utils.environment import machine, version
from pasta_jax.utils.files import write_atomic, write_json_atomic
from pasta_jax.utils.json_io import read_json
from pasta_jax.utils.progress import progress_bar
from pasta_jax.utils.records import Records
from pasta_jax.utils.shared_records import SharedRecords
from pasta_jax.utils.typed import checked


def evaluate(config, workdir: Path) -> dict:
  """Runs `config.eval` in `workdir`, which it locks, and returns the summary that it writes there
  (`report.summary`). Every process of several calls this; those after the first return {}."""
  with distributed.as_one():
    config, variants = varied(config)
    config = resolve(config, "decode", workdir / "config.json")
    e = config.eval
    names = list(dict.fromkeys([*e.systems, e.baseline]))
    requests, timed = select_requests(e)
    judges = judges_of(config)
    with distributed.writing_in(workdir):
      return _evaluate(config, workdir, names, requests, timed, judges, variants)


def _evaluate(
  config,
  workdir: Path,
  names: list[str],
  requests: list[PromptTurn],
  timed: list[PromptTurn],
  judges: Sequence[Judge],
  variants: Mapping[str, dict[str, str]],
) -> dict:
  machines = distributed.gathered(machine())

  def begin() -> None:
    for folder, with_clock in (("responses", False), *([("timed", True)] if timed else [])):
      for name in names:  # finds rows that do not fit before any work
        path = workdir / folder / f"{name}.jsonl"
        Records(path, settings_of(config, name, timed=with_clock)).missing(requests)
    about = {n: provenance(config, n) | variants.get(n, {}) for n in names}
    write_atomic(workdir / "config.json", config.to_json(indent=2))
    _write_run(workdir / "run.json", requests, judges, about, machines)

  distributed.from_first(begin)
  answer(config, workdir, names, requests)
  if timed:
    distributed.from_first(lambda: time_systems(config, workdir, names, timed))
  judge_run(workdir, names, config.eval.baseline, requests, judges, config.judge)
  return write_report(workdir) if distributed.is_first() else {}


def select_requests(e) -> tuple[list[PromptTurn], list[PromptTurn]]:
  """(requests to answer, requests among them to time) of `config.eval`.

  The timed ones are those of the file `timed_prompts`, or else the first ones; at most `timed` of them, and
  first turns only, since later turns give every system another prompt. With both `limit` and `timed_prompts`,
  the limited prompts are chosen from that file.
  """
  requests = read_prompts(e.prompts, categories=e.categories)
  to_time = requests
  if e.timed_prompts:
    wanted = {(r.id, r.prompt) for r in read_prompts(e.timed_prompts)}
    to_time = [r for r in requests if (r.id, r.prompt) in wanted]
    if not to_time:
      raise EvalError(f"eval.timed_prompts={e.timed_prompts} names no prompt of {e.prompts}")
  if e.limit:
    among = {r.id for r in to_time} if e.timed_prompts else None
    requests = read_prompts(e.prompts, limit=e.limit, categories=e.categories, among=among)
    to_time = [r for r in requests if among is None or r.id in among]
  to_time = [r for r in to_time if not r.earlier]
  return requests, to_time if e.timed < 0 else to_time[: e.timed]


def _write_run(
  path: Path,
  requests: Sequence[PromptTurn],
  judges: Sequence[Judge],
  systems: dict[str, dict[str, str]],
  machines: Sequence[str],
) -> None:
  """Writes what the report is about: this call's requests and judges, all systems (`provenance`), machines and
  versions so far."""
  found = read_json(path) if path.exists() else {}
  known = checked(dict[str, dict[str, str]], found.get("systems", {}), str(path))
  before = checked(dict[str, list[str]], {k: found.get(k, []) for k in ("machines", "versions")}, str(path))
  now = {
    "requests": [r.id for r in requests],
    "judges": [j.name for j in judges],
    "machines": list(dict.fromkeys([*before["machines"], *machines])),
    "versions": list(dict.fromkeys([*before["versions"], version()])),
    "systems": known | systems,
  }
  write_json_atomic(path, now)


def _row(request: PromptTurn, name: str, record: dict) -> dict:
  return {"id": request.id, "prompt": request.prompt, "category": request.category, "system": name, **record}


def answer(config, workdir: Path, names: list[str], requests: list[PromptTurn]) -> None:
  """Answers all requests with each system, in batches; a turn is answered after the turns before it."""
  models: dict[tuple[str, str], Model] = {}
  for at, name in enumerate(names):
    needed = {config.systems[n].adapter for n in names[at:]}
    models = {key: m for key, m in models.items() if key[0] in needed}  # keeps memory free of the others
    records = SharedRecords(workdir / "responses" / f"{name}.jsonl", settings_of(config, name, timed=False))
    work = partial(_answer, config, name, models, records)
    # A conversation's turns follow each other in one process.
    records.make(records.missing(requests), work, together=lambda r: (*r.earlier, r)[0].id)


def _answer(
  config,
  name: str,
  models: dict[tuple[str, str], Model],
  records: Records,
  requests: Sequence[PromptTurn],
  add: Callable[[dict], None],
) -> None:
  """Answers requests with one system; `records` has the answers to turns before them."""
  system = load_system(config, name, models, timed=False)
  bar, task = progress_bar(name, len(records.rows) + len(requests), len(records.rows))
  with bar:
    for turn in range(max(len(r.earlier) for r in requests) + 1):
      now = [r for r in requests if len(r.earlier) == turn]
      texts = {i: row["text"] for i, row in records.rows.items()}

      def on_finish(i: int, record: dict, *, now=now):
        add(_row(now[i], name, record))
        bar.advance(task)

      conversations = [conversation(r, texts) for r in now]
      for r, c in zip(now, conversations):  # reports what cannot be answered before any work
        try:
          system.check(c)
        except DecodeError as error:
          raise EvalError(f"prompt {r.id!r}: {error}") from None
      system.answer(conversations, on_finish)


def time_systems(config, workdir: Path, names: list[str], requests: list[PromptTurn]) -> None:
  """Times responses one at a time: every shape is compiled before, and systems take turns at each prompt.

  If one system has not answered a prompt, all answer it again, so that compared times were measured together.
  The order is random, so that a run that is stopped has timed a fair sample.
  """
  records = {
    name: Records(workdir / "timed" / f"{name}.jsonl", settings_of(config, name, timed=True))
    for name in names
  }
  missing = {r.id for name in names for r in records[name].missing(requests)}
  todo = [r for r in requests if r.id in missing]
  if not todo:
    return
  todo = [todo[i] for i in np.random.default_rng(0).permutation(len(todo))]
  models: dict[tuple[str, str], Model] = {}
  systems: dict[str, System] = {name: load_system(config, name, models, timed=True) for name in names}
  bar, task = progress_bar("compiling", len(systems))
  with bar:
    for system in systems.values():
      lengths = sorted({padded_length(len(system.encode(conversation(r, {})))) for r in todo})
      system.precompile(lengths, lambda text: bar.update(task, note=text))
      bar.advance(task)
  repeats = config.eval.repeats or (1 if jax.default_backend() == "cpu" else 2)
  bar, task = progress_bar("timing", len(requests), len(requests) - len(todo))
  with bar:
    for request in todo:
      rows = {}
      for name, system in systems.items():
        for _ in range(repeats):  # the last one counts
          record = system.answer_timed(conversation(request, {}))
        rows[name] = _row(request, name, record)
        bar.update(task, note=f"{name} {record['seconds']:.1f} s")
      for name, row in rows.items():
        records[name].add(row)
      bar.advance(task)


def pilot(config, workdir: Path) -> bool:
  """`evaluate`, and whether the first system reaches `eval.min_quality` and `eval.min_speedup`, the same answer in all
  processes.

  Times every prompt unless `eval.timed` says how many. Raises EvalError if neither threshold is given.
  """
  e = config.eval
  if not [n for n in e.systems if n != e.baseline]:
    raise EvalError(
      f"eval.systems={','.join(e.systems)} names no system to compare with the baseline {e.baseline!r}"
    )
  if not e.min_quality and not e.min_speedup:
    raise EvalError(
      "say what the pilot must reach: --config.eval.min_quality=45 (what the first judge prefers, %) and "
      "--config.eval.min_speedup=1.2 (realised speedup)"
    )
  if e.min_speedup and not e.timed:
    config = with_changes(config, {"eval.timed": -1})
  if e.min_quality and not e.judges:
    raise EvalError("eval.min_quality needs a judge: --config.eval.judges=local")
  with distributed.as_one():
    summary = evaluate(config, workdir)
    return distributed.from_first(lambda: _meets(workdir, summary))


def _meets(workdir: Path, summary: dict) -> bool:
  """Whether a run reaches its thresholds; prints each."""
  demands = thresholds(read_run(workdir), summary)
  for t in demands:
    reached = "not measured" if t.value is None else f"{t.value:.2f}"
    print(f"{t.what}: {reached}, wanted {t.wanted:g}: {'met' if t.is_met else 'NOT MET'}")
  return all(t.is_met for t in demands)
