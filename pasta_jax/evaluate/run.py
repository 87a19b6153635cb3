"""`--mode=eval`: systems over the prompts of a benchmark, by the clock as well, judged, and reported. Resumable.

    workdir/responses/SYSTEM.jsonl    answers of all prompts, many at a time: for quality and theoretical figures
    workdir/timed/SYSTEM.jsonl        answers one at a time by the clock, systems interleaved prompt by prompt
    workdir/judgements/…              preferences (`evaluate.judge`)
    workdir/report.html, report.md, summary.json, figures/, alpaca_eval/      (`evaluate.report`)

Every file of rows has its settings beside it; a run that was stopped goes on, and a system that is added later joins
those that are there.
"""

import hashlib
from pathlib import Path

import jax

from pasta_jax.decode.generate import Generator, adapter_path
from pasta_jax.decode.interpreter import padded_length
from pasta_jax.evaluate import judging, report
from pasta_jax.evaluate.prompts import EvalError, Request, conversation, read_prompts
from pasta_jax.evaluate.records import Records
from pasta_jax.evaluate.systems import System, entry_of, load_system
from pasta_jax.progress import progress_bar

_FREE = ("live", "compare", "requests", "parallel", "slots")  # fields of decode that no response depends on


def evaluate(config, workdir: Path) -> dict:
  """Runs `config.eval` in `workdir` and returns the summary that it writes there (`evaluate.report.summarise_run`)."""
  e = config.eval
  names = list(dict.fromkeys(s.strip() for s in [*e.systems.split(","), e.baseline] if s.strip()))
  for name in names:
    entry_of(config, name)
  for field in ("requests", "width"):
    if e[field] < 1:
      raise EvalError(f"eval.{field} must be 1 or more, not {e[field]}")
  requests = read_prompts(e.prompts, limit=e.limit, categories=e.categories)
  timed = _to_time(e, requests)
  judges = judging.judges_of(config)
  for folder, with_clock in (("responses", False), ("timed", True)):  # before minutes of work
    for name in names:
      Records(workdir / folder / f"{name}.jsonl", settings_of(config, name, timed=with_clock)).missing(requests)
  (workdir / "config.json").write_text(config.to_json_best_effort(indent=2))
  answer(config, workdir, names, requests)
  if timed:
    time_systems(config, workdir, names, timed)
  judging.judge(config, workdir, names, requests, judges)
  return report.write(workdir)


def _to_time(e, requests: list[Request]) -> list[Request]:
  """The prompts to be timed: those that `timed_prompts` names, else the first ones; `timed` of them."""
  if e.timed < -1:
    raise EvalError(f"eval.timed must be a number of prompts, or -1 for all, not {e.timed}")
  chosen = requests
  if e.timed_prompts:
    ids = {r.id for r in read_prompts(e.timed_prompts)}
    chosen = [r for r in requests if r.id in ids]
    if e.timed and not chosen:
      raise EvalError(f"eval.timed_prompts={e.timed_prompts} names no prompt of {e.prompts}")
  chosen = [r for r in chosen if not r.earlier]  # first turns: every system gets the same prompt
  return chosen if e.timed < 0 else chosen[: e.timed]


def settings_of(config, name: str, *, timed: bool) -> dict:
  """What a system's responses depend on, flat."""
  entry, e = config.systems[name], config.eval
  path = adapter_path(entry.adapter)
  out = {
    "source": config.model.source,
    "adapter": entry.adapter,
    "decode": entry.decode,
    "adapter's sha256": hashlib.sha256(path.read_bytes()).hexdigest() if path and path.is_file() else None,
  }
  out |= {f"positions.{k}": v for k, v in config.positions.items()}
  out |= {f"decode.{k}": v for k, v in config.decode.items() if k not in _FREE}
  out["decode.dtype"] = config.decode.dtype if timed else e.dtype
  if entry.decode == "skeleton":
    out |= {f"skeleton.{k}": v for k, v in config.skeleton.items()}
  if timed:
    out |= {"repeats": e.repeats}
  return out


def _row(request: Request, name: str, record: dict) -> dict:
  return {"id": request.id, "prompt": request.prompt, "category": request.category, "system": name, **record}


def answer(config, workdir: Path, names: list[str], requests: list[Request]) -> None:
  """Answers all requests with each system, many at a time; later turns behind the earlier ones."""
  generators: dict[tuple[str, str], Generator] = {}
  for name in names:
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

        system.many([conversation(r, texts) for r in now], done)


def time_systems(config, workdir: Path, names: list[str], requests: list[Request]) -> None:
  """Answers the requests one at a time by the clock: every shape compiled before, systems interleaved."""
  records = {
    name: Records(workdir / "timed" / f"{name}.jsonl", settings_of(config, name, timed=True)) for name in names
  }
  missing = {name: {r.id for r in records[name].missing(requests)} for name in names}
  todo = [r for r in requests if any(r.id in m for m in missing.values())]
  if not todo:
    return
  generators: dict[tuple[str, str], Generator] = {}
  systems: dict[str, System] = {name: load_system(config, name, generators, timed=True) for name in names}
  bar, task = progress_bar("compiling", len(systems))
  with bar:
    for system in systems.values():
      lengths = sorted({padded_length(len(system.generator.encode(r.prompt))) for r in todo})
      system.warm_up(lengths, lambda text: bar.update(task, note=text))
      bar.advance(task)
  repeats = config.eval.repeats or (1 if jax.default_backend() == "cpu" else 2)
  bar, task = progress_bar("by the clock", len(requests), len(requests) - len(todo))
  with bar:
    for request in todo:
      for name, system in systems.items():
        if request.id not in missing[name]:
          continue
        for _ in range(repeats):  # the last one counts
          record = system.one(conversation(request, {}))
        records[name].add(_row(request, name, record))
        bar.update(task, note=f"{name} {record['seconds']:.1f} s")
      bar.advance(task)


def pilot(config, workdir: Path) -> bool:
  """`evaluate` for a decision: whether the first system reaches `eval.min_quality` and `eval.min_speedup`.

  Raises EvalError if neither is given. Times every prompt unless `eval.timed` says how many.
  """
  e = config.eval
  if not e.min_quality and not e.min_speedup:
    raise EvalError(
      "say what the pilot must reach: --config.eval.min_quality=45 (win rate, %) and "
      "--config.eval.min_speedup=1.2 (by the clock)"
    )
  if e.min_speedup and not e.timed:
    e.timed = -1
  if e.min_quality and not e.judges:
    raise EvalError("eval.min_quality needs a judge: --config.eval.judges=local")
  evaluate(config, workdir)
  run = report.read_run(workdir)
  checks = report.verdict(run, report.summarise_run(run))
  for what, value, wanted, met in checks:
    print(
      f"{what}: {'not measured' if value is None else f'{value:.2f}'}, wanted {wanted:g}: {'met' if met else 'NOT MET'}"
    )
  return all(met for *_, met in checks)
