"""`--mode=eval`: systems over a prompts file; one JSON line a response, resumable, and a summary.

A system is an adapter and a way of decoding it: "pasta" (in parallel), "sequential" (the same weights, no
promises), "baseline" (Baseline-SFT) and "base" (the model as it is). With `timed`, responses are decoded one at a
time, systems interleaved prompt by prompt, compilation kept out by warming every shape first; otherwise they are
decoded many at a time and only theoretical figures are reported.
"""

import json
from pathlib import Path

import rich.console
import rich.table

from pasta_jax.data.examples import read_jsonl
from pasta_jax.decode.batch import BatchDecoder
from pasta_jax.decode.generate import Generator
from pasta_jax.decode.record import describe
from pasta_jax.evaluate.measures import summarise
from pasta_jax.progress import progress_bar

# name: (adapter, or None for the config's; decoded in parallel)
SYSTEMS: dict[str, tuple[str | None, bool]] = {
    "pasta": (None, True), "sequential": (None, False), "baseline": ("baseline", False), "base": ("", False)}


class EvalError(ValueError):
  """A request that cannot be evaluated."""


class Records:
  """Responses of one system, in `workdir/<system>.jsonl`; those already there are not made again."""

  def __init__(self, workdir: Path, system: str):
    self._path = workdir / f"{system}.jsonl"
    self.rows = {r["id"]: r for r in read_jsonl(self._path)} if self._path.exists() else {}

  def add(self, row: dict) -> None:
    self.rows[row["id"]] = row
    with open(self._path, "a") as file:
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
  return rows[:limit] if limit else rows


def evaluate(config, workdir: Path) -> dict[str, dict[str, float]]:
  """Runs `config.eval` in `workdir`; returns and writes (`summary.json`) each system's figures."""
  e = config.eval
  names = [s.strip() for s in e.systems.split(",") if s.strip()]
  if unknown := [s for s in names if s not in SYSTEMS]:
    raise EvalError(f"unknown system {unknown[0]!r}: eval.systems may name {', '.join(SYSTEMS)}")
  prompts = read_prompts(e.prompts, e.limit)
  workdir.mkdir(parents=True, exist_ok=True)
  settings = json.loads(config.to_json_best_effort())
  (workdir / "config.json").write_text(json.dumps(settings, indent=2))
  records = {name: Records(workdir, name) for name in names}
  generators: dict[str | None, Generator] = {}
  for name in names:
    adapter = SYSTEMS[name][0]
    if adapter not in generators:
      generators[adapter] = Generator(config, adapter=adapter)
  loaded = {name: generators[SYSTEMS[name][0]] for name in names}
  (_timed if e.timed else _batched)(loaded, prompts, records, e)
  return report(workdir, names, [p["id"] for p in prompts])


def _timed(loaded: dict[str, Generator], prompts: list[dict], records: dict[str, Records], e) -> None:
  """One response at a time, systems interleaved."""
  todo = [p for p in prompts if any(p["id"] not in r.rows for r in records.values())]
  if not todo:
    return
  lengths = sorted({_padded(len(loaded[name].encode(p["prompt"]))) for name in loaded for p in todo})
  bar, task = progress_bar("compiling", len(lengths) * len(loaded))
  with bar:
    for name, generator in loaded.items():
      for length in lengths:
        generator.interpreter(SYSTEMS[name][1]).warm_up(length, generator.sampling)
        bar.advance(task)
  bar, task = progress_bar("decoding", len(todo))
  with bar:
    for p in todo:
      for name, generator in loaded.items():
        if p["id"] in records[name].rows:
          continue
        for _ in range(max(e.repeats, 1)):  # the last one counts
          response = generator.respond(p["prompt"], parallel=SYSTEMS[name][1])
        row = {**p, **describe(response.trace, generator.vocabulary), "seconds": response.seconds}
        records[name].add(row)
        bar.update(task, note=f"{name} {response.trace.cost.longest_path} steps")
      bar.advance(task)


def _padded(length: int) -> int:
  """The prompt length that stands for all that share its compiled shapes."""
  from pasta_jax.decode.interpreter import PROMPT_BUCKETS
  return next(b for b in (*PROMPT_BUCKETS, length) if b >= length)


def _batched(loaded: dict[str, Generator], prompts: list[dict], records: dict[str, Records], e) -> None:
  """Many responses at a time; nothing is timed."""
  for name, generator in loaded.items():
    todo = [p for p in prompts if p["id"] not in records[name].rows]
    if not todo:
      continue
    parallel = SYSTEMS[name][1]
    decoder = BatchDecoder(generator.interpreter(parallel), requests=min(e.requests, len(todo)),
                           width=e.width if parallel else 1)
    bar, task = progress_bar(name, len(prompts), len(prompts) - len(todo))

    def done(i, trace, todo=todo, name=name, generator=generator, bar=bar, task=task):
      records[name].add({**todo[i], **describe(trace, generator.vocabulary)})
      bar.advance(task)

    with bar:
      decoder.run([generator.encode(p["prompt"]) for p in todo], generator.sampling, done=done)


def report(workdir: Path, names: list[str], ids: list[str]) -> dict[str, dict[str, float]]:
  """Figures of each system, written to `summary.json` and printed as a table."""
  rows = {name: [r for i in ids if (r := Records(workdir, name).rows.get(i))] for name in names}
  baseline = rows.get("sequential") or rows.get("baseline")
  figures = {name: summarise(rows[name], baseline if rows[name] is not baseline else None) for name in names}
  (workdir / "summary.json").write_text(json.dumps(figures, indent=2) + "\n")
  table = rich.table.Table(title=f"{len(ids)} prompts")
  table.add_column("figure")
  for name in names:
    table.add_column(name, justify="right")
  keys = dict.fromkeys(k for f in figures.values() for k in f)
  for key in keys:
    table.add_row(key.replace("_", " "), *(_shown(key, figures[name].get(key)) for name in names))
  rich.console.Console().print(table)
  return figures


def _shown(key: str, value: float | None) -> str:
  if value is None or value != value:
    return "–"
  if key.endswith(("share", "overhead", "error", "efficiency")):
    return f"{100 * value:.1f} %"
  return f"{value:.0f}" if key in ("prompts", "text_tokens") else f"{value:.2f}"
