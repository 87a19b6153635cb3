"""`--mode=eval`: systems over the prompts of a benchmark, by the clock as well, judged, and reported.
Resumable.

    workdir/responses/SYSTEM.jsonl    answers of all prompts, many at a time: for quality and theoretical figures
    workdir/timed/SYSTEM.jsonl        answers one at a time by the clock, systems interleaved prompt by prompt
    workdir/judgements/…              preferences (`evaluate.judge`)
    workdir/report.html, report.md, summary.json, figures/, alpaca_eval/      (`evaluate.report`)

Every file of rows has its settings beside it; a run that was stopped goes on, and a system that is added
later joins those that are there.
"""

import json
from pathlib import Path

import jax
import numpy as np

from pasta_jax.config import identity, with_changes
from pasta_jax.data.prompts import PromptTurn, conversation, read_prompts
from pasta_jax.decode.generator import DecodeError, Model, adapter_digest
from pasta_jax.decode.interpreter import padded_length
from pasta_jax.evaluate.errors import EvalError
from pasta_jax.evaluate.judges import judging
from pasta_jax.evaluate.report import report
from pasta_jax.evaluate.systems.registry import System, load_system
from pasta_jax.utils.environment import machine, version
from pasta_jax.utils.progress import progress_bar
from pasta_jax.utils.records import Records


def evaluate(config, workdir: Path) -> dict:
  """Runs `config.eval` in `workdir` and returns the summary that it writes there
  (`evaluate.report.summarise_run`)."""
  e = config.eval
  names = list(dict.fromkeys([*e.systems, e.baseline]))
  requests, timed = _requests(e)
  judges = judging.judges_of(config)
  for folder, with_clock in (
    ("responses", False),
    *([("timed", True)] if timed else []),
  ):  # before minutes of work
    for name in names:
      Records(workdir / folder / f"{name}.jsonl", settings_of(config, name, timed=with_clock)).missing(
        requests
      )
  (workdir / "config.json").write_text(config.to_json(indent=2))
  _note_run(workdir / "run.json", requests)
  answer(config, workdir, names, requests)
  if timed:
    time_systems(config, workdir, names, timed)
  judging.judge(config, workdir, names, requests, judges)
  return report.write(workdir)


def _requests(e) -> tuple[list[PromptTurn], list[PromptTurn]]:
  """(requests to answer, those of them to time): prompts that `timed_prompts` names, else the first; `timed`
  of them.

  Where a limit and a file of prompts to time are given, the limit is taken from the latter.
  """
  requests = read_prompts(e.prompts, categories=e.categories)
  chosen = requests
  if e.timed_prompts:
    named = {(r.id, r.prompt) for r in read_prompts(e.timed_prompts)}
    chosen = [r for r in requests if (r.id, r.prompt) in named]
    if not chosen:
      raise EvalError(f"eval.timed_prompts={e.timed_prompts} names no prompt of {e.prompts}")
  if e.limit:
    among = {r.id for r in chosen} if e.timed_prompts else None
    requests = read_prompts(e.prompts, limit=e.limit, categories=e.categories, among=among)
    chosen = [r for r in requests if among is None or r.id in among]
  chosen = [r for r in chosen if not r.earlier]  # first turns: every system gets the same prompt
  return requests, chosen if e.timed < 0 else chosen[: e.timed]


def _note_run(path: Path, requests: list[PromptTurn]) -> None:
  """Writes what the report is about: the requests of the last call, and every machine and version that took
  part."""
  before = json.loads(path.read_text()) if path.exists() else {}
  now = {
    "requests": [r.id for r in requests],
    "machines": list(dict.fromkeys([*before.get("machines", []), machine()])),
    "versions": list(dict.fromkeys([*before.get("versions", []), version()])),
  }
  path.write_text(json.dumps(now, indent=1) + "\n")


def decode_settings(config, *, parallel: bool) -> dict:
  """The fields of `config.decode` that an answer depends on, with promises (`parallel`) or without."""
  return {f"decode.{k}": v for k, v in identity(config.decode, promises=parallel).items()}


def settings_of(config, name: str, *, timed: bool) -> dict:
  """What a system's responses depend on, flat."""
  entry, e = config.systems[name], config.eval
  out = {
    "source": config.model.source,
    "decode": entry.decode,
    "adapter's sha256": adapter_digest(entry.adapter),  # not its path: a run's folder may be moved
  }
  if entry.decode == "parallel":
    out |= {f"positions.{k}": v for k, v in identity(config.positions).items()}
  out |= decode_settings(config, parallel=entry.decode == "parallel")
  if (speed := config.decode.speed if entry.speed is None else entry.speed) >= 0:
    out["decode.speed"] = speed
  out["decode.dtype"] = config.decode.dtype if timed else e.dtype
  if entry.decode == "skeleton":
    out |= {f"skeleton.{k}": v for k, v in identity(config.skeleton).items()}
  if timed:
    out |= {
      "repeats": e.repeats,
      "decode.max_branches": config.decode.max_branches,
      "machine": machine(),
    }
  return out


def _row(request: PromptTurn, name: str, record: dict) -> dict:
  return {"id": request.id, "prompt": request.prompt, "category": request.category, "system": name, **record}


def answer(config, workdir: Path, names: list[str], requests: list[PromptTurn]) -> None:
  """Answers all requests with each system, many at a time; later turns behind the earlier ones."""
  generators: dict[tuple[str, str], Model] = {}
  for at, name in enumerate(names):
    later = {config.systems[n].adapter for n in names[at:]}
    generators = {
      key: g for key, g in generators.items() if key[0] in later
    }  # a model for each adapter is much
    records = Records(workdir / "responses" / f"{name}.jsonl", settings_of(config, name, timed=False))
    if not (todo := records.missing(requests)):
      continue
    system = load_system(config, name, generators, timed=False)
    bar, task = progress_bar(name, len(requests), len(requests) - len(todo))
    with bar:
      for turn in range(max(len(r.earlier) for r in todo) + 1):
        now = [r for r in todo if len(r.earlier) == turn]
        texts = {i: row["text"] for i, row in records.rows.items()}

        def done(i: int, record: dict, *, now=now, name=name, records=records, bar=bar, task=task) -> None:
          records.add(_row(now[i], name, record))
          bar.advance(task)

        conversations = [conversation(r, texts) for r in now]
        for r, c in zip(now, conversations):  # before any work: what cannot be answered, by its id
          try:
            system.check(c)
          except DecodeError as error:
            raise EvalError(f"prompt {r.id!r}: {error}") from None
        system.many(conversations, done)


def time_systems(config, workdir: Path, names: list[str], requests: list[PromptTurn]) -> None:
  """Answers the requests one at a time by the clock: every shape compiled before, systems interleaved.

  Where one system has not answered a prompt, all answer it again: what is compared was measured side by side.
  The order is drawn, so that a run that is stopped has timed a fair sample.
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
  generators: dict[tuple[str, str], Model] = {}
  systems: dict[str, System] = {name: load_system(config, name, generators, timed=True) for name in names}
  bar, task = progress_bar("compiling", len(systems))
  with bar:
    for system in systems.values():
      lengths = sorted({padded_length(len(system.tokens(conversation(r, {})))) for r in todo})
      system.precompile(lengths, lambda text: bar.update(task, note=text))
      bar.advance(task)
  repeats = config.eval.repeats or (1 if jax.default_backend() == "cpu" else 2)
  bar, task = progress_bar("by the clock", len(requests), len(requests) - len(todo))
  with bar:
    for request in todo:
      rows = {}
      for name, system in systems.items():
        for _ in range(repeats):  # the last one counts
          record = system.one(conversation(request, {}))
        rows[name] = _row(request, name, record)
        bar.update(task, note=f"{name} {record['seconds']:.1f} s")
      for name, row in rows.items():
        records[name].add(row)
      bar.advance(task)


def pilot(config, workdir: Path) -> bool:
  """`evaluate` for a decision: whether the first system reaches `eval.min_quality` and `eval.min_speedup`.

  Raises EvalError if neither is given. Times every prompt unless `eval.timed` says how many.
  """
  e = config.eval
  if not [n for n in e.systems if n != e.baseline]:
    raise EvalError(
      f"eval.systems={','.join(e.systems)} names no system to compare with the baseline {e.baseline!r}"
    )
  if not e.min_quality and not e.min_speedup:
    raise EvalError(
      "say what the pilot must reach: --config.eval.min_quality=45 (win rate, %) and "
      "--config.eval.min_speedup=1.2 (by the clock)"
    )
  if e.min_speedup and not e.timed:
    config = with_changes(config, {"eval.timed": -1})
  if e.min_quality and not e.judges:
    raise EvalError("eval.min_quality needs a judge: --config.eval.judges=local")
  summary = evaluate(config, workdir)
  checks = report.verdict(report.read_run(workdir), summary)
  for what, value, wanted, met in checks:
    print(
      f"{what}: {'not measured' if value is None else f'{value:.2f}'}, wanted {wanted:g}: {'met' if met else 'NOT MET'}"
    )
  return all(met for *_, met in checks)
