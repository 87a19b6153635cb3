"""`--mode=eval`: systems over a prompts file; one JSON line a response, resumable, and a summary.

A system is an adapter and a way of decoding it: "pasta" (in parallel), "sequential" (the same weights, no
promises), "baseline" (Baseline-SFT) and "base" (the model as it is). With `timed`, responses are decoded one at a
time, systems interleaved prompt by prompt, compilation kept out by warming every shape first; otherwise they are
decoded many at a time and only theoretical figures are reported.
"""

import collections
import hashlib
import json
import os
from pathlib import Path

import jax
import rich.console
import rich.table

from pasta_jax.data.examples import read_jsonl
from pasta_jax.decode.batch import BatchDecoder
from pasta_jax.decode.generate import Generator, adapter_path
from pasta_jax.decode.interpreter import padded_length
from pasta_jax.decode.record import describe
from pasta_jax.evaluate.measures import summarise
from pasta_jax.progress import progress_bar

SYSTEMS = ("pasta", "sequential", "baseline", "base")


def parallel(system: str) -> bool:
  """Whether a system writes promises; the others decode one token at a time."""
  return system == "pasta"


class EvalError(ValueError):
  """A request that cannot be evaluated."""


class Records:
  """Responses of one system, in `workdir/<system>.jsonl`; those already there are not made again."""

  def __init__(self, workdir: Path, system: str):
    self._path = workdir / f"{system}.jsonl"
    if self._path.exists():  # a run that was killed may have left a line without its end
      written = self._path.read_bytes()
      os.truncate(self._path, written.rfind(b"\n") + 1)
    self.rows = {r["id"]: r for r in read_jsonl(self._path)} if self._path.exists() else {}

  def add(self, row: dict) -> None:
    self.rows[row["id"]] = row
    with open(self._path, "a", encoding="utf-8") as file:
      file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_prompts(path: str, limit: int) -> list[dict]:
  """Rows with `id` and `prompt`; the first `limit` of them, or all for 0."""
  if not path:
    raise EvalError("name a file of JSON lines with \"prompt\": --config.eval.prompts=FILE")
  rows = read_jsonl(path)
  for number, row in enumerate(rows):
    if not isinstance(row.get("prompt"), str):
      raise EvalError(f"{path}: row {number + 1} has no text under \"prompt\"")
    row.setdefault("id", str(number))
  if twice := [i for i, n in collections.Counter(row["id"] for row in rows).items() if n > 1]:
    raise EvalError(f"{path}: two prompts have the id {twice[0]!r}")
  return rows[:limit] if limit else rows


def evaluate(config, workdir: Path) -> dict[str, dict[str, float]]:
  """Runs `config.eval` in `workdir`; returns and writes (`summary.json`) each system's figures."""
  e = config.eval
  names = [s.strip() for s in e.systems.split(",") if s.strip()]
  if unknown := [s for s in names if s not in SYSTEMS]:
    raise EvalError(f"unknown system {unknown[0]!r}: eval.systems may name {', '.join(SYSTEMS)}")
  prompts = read_prompts(e.prompts, e.limit)
  workdir.mkdir(parents=True, exist_ok=True)
  _keep_settings(workdir, config)
  records = {name: Records(workdir, name) for name in names}
  for name, p in ((n, p) for n in names for p in prompts):
    if (row := records[name].rows.get(p["id"])) and row["prompt"] != p["prompt"]:
      raise EvalError(f"{workdir} holds a response to another prompt with the id {p['id']!r}: choose another --workdir")
  adapters = {"baseline": e.baseline_adapter, "base": ""}
  generators: dict[str, Generator] = {}
  for name in names:
    adapter = adapters.get(name, config.model.adapter)
    if adapter not in generators:
      generators[adapter] = Generator(config, adapter=adapter)
  loaded = {name: generators[adapters.get(name, config.model.adapter)] for name in names}
  (_timed if e.timed else _batched)(loaded, prompts, records, e)
  return report(workdir, {name: [records[name].rows[p["id"]] for p in prompts] for name in names})


def _keep_settings(workdir: Path, config) -> None:
  """Writes the config; responses made with other settings are not mixed with those to come."""
  path = workdir / "config.json"
  now = json.loads(config.to_json_best_effort())
  files = {name: adapter_path(name) for name in (config.model.adapter, config.eval.baseline_adapter)}
  now["sha256"] = {name: hashlib.sha256(f.read_bytes()).hexdigest() for name, f in files.items() if f and f.is_file()}
  if path.exists() and any((workdir / f"{name}.jsonl").exists() for name in SYSTEMS):
    before = json.loads(path.read_text())
    free = ("live", "compare", "requests")  # no response depends on these
    fields = [(part, field) for part in ("model", "positions", "decode") for field in now[part] if field not in free]
    fields += [("eval", field) for field in ("baseline_adapter", "timed", "repeats")]
    for part, field in [*fields, *(("sha256", name) for name in now["sha256"])]:
      old, new = before.get(part, {}).get(field), now[part][field]
      if old != new:
        raise EvalError(f"{workdir} holds responses made with {part}.{field}={old!r}, not {new!r}: choose another "
                        "--workdir, or the settings of that run")
  path.write_text(json.dumps(now, indent=2))


def _timed(loaded: dict[str, Generator], prompts: list[dict], records: dict[str, Records], e) -> None:
  """One response at a time, systems interleaved."""
  todo = [p for p in prompts if any(p["id"] not in r.rows for r in records.values())]
  if not todo:
    return
  lengths = sorted({padded_length(len(loaded[name].encode(p["prompt"]))) for name in loaded for p in todo})
  repeats = e.repeats or (1 if jax.default_backend() == "cpu" else 2)
  bar, task = progress_bar("compiling", len(lengths) * len(loaded))
  with bar:
    for name, generator in loaded.items():
      for length in lengths:
        generator.interpreter(parallel(name)).warm_up(length, generator.sampling)
        bar.advance(task)
  bar, task = progress_bar("decoding", len(todo))
  with bar:
    for p in todo:
      for name, generator in loaded.items():
        if p["id"] in records[name].rows:
          continue
        for _ in range(repeats):  # the last one counts
          response = generator.respond(p["prompt"], parallel=parallel(name))
        row = {**p, **describe(response.trace, generator.vocabulary), "seconds": response.seconds}
        records[name].add(row)
        bar.update(task, note=f"{name} {response.trace.cost.longest_path} steps")
      bar.advance(task)


def _batched(loaded: dict[str, Generator], prompts: list[dict], records: dict[str, Records], e) -> None:
  """Many responses at a time; nothing is timed."""
  for name, generator in loaded.items():
    todo = [p for p in prompts if p["id"] not in records[name].rows]
    if not todo:
      continue
    decoder = BatchDecoder(generator.interpreter(parallel(name)), requests=min(e.requests, len(todo)),
                           width=e.width if parallel(name) else 1)
    bar, task = progress_bar(name, len(prompts), len(prompts) - len(todo))

    def done(i, trace, todo=todo, name=name, generator=generator, bar=bar, task=task):
      records[name].add({**todo[i], **describe(trace, generator.vocabulary)})
      bar.advance(task)

    with bar:
      decoder.run([generator.encode(p["prompt"]) for p in todo], generator.sampling, done=done)


def report(workdir: Path, rows: dict[str, list[dict]]) -> dict[str, dict[str, float]]:
  """Figures of each system's records, written to `summary.json` and printed as a table."""
  baseline = rows.get("sequential") or rows.get("baseline")
  figures = {name: summarise(rows[name], baseline if rows[name] is not baseline else None) for name in rows}
  (workdir / "summary.json").write_text(json.dumps(figures, indent=2) + "\n")
  table = rich.table.Table(title=f"{len(next(iter(rows.values())))} prompts")
  table.add_column("figure")
  for name in rows:
    table.add_column(name, justify="right")
  keys = dict.fromkeys(k for f in figures.values() for k in f)
  for key in keys:
    table.add_row(key.replace("_", " "), *(_shown(key, figures[name].get(key)) for name in rows))
  rich.console.Console().print(table)
  return figures


def _shown(key: str, value: float | None) -> str:
  if value is None:
    return "–"
  if key.endswith(("share", "overhead", "error", "efficiency")):
    return f"{100 * value:.1f} %"
  return f"{value:.0f}" if key in ("prompts", "text_tokens") else f"{value:.2f}"
