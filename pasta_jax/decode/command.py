"""`--mode=decode`: answers one prompt with a live view, or a file of prompts into a file of responses."""

import dataclasses
import hashlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from pasta_jax.decode.generator import DecodeError, Model, Response, adapter_digest, decode_settings
from pasta_jax.decode.precision import resolve
from pasta_jax.decode.scheduler import precompile
from pasta_jax.decode.views.live import LiveView, figures_table
from pasta_jax.utils import distributed
from pasta_jax.utils.json_io import to_json
from pasta_jax.utils.jsonl import read_jsonl, to_jsonl, write_jsonl
from pasta_jax.utils.progress import progress_bar
from pasta_jax.utils.records import settings_beside
from pasta_jax.utils.shared_records import SharedRecords
from pasta_jax.utils.terminal import as_text
from pasta_jax.utils.text import printable


def decode_prompt(config, prompt: str, *, timeline: str | None = None) -> Response:
  """Answers one prompt. The answer goes to stdout; progress and figures go to the terminal, otherwise to
  stderr.

  With `decode.compare` the same weights answer once more without promises, and the figures include the
  measured speed-up per token. `timeline` names an .html or .svg file to draw the response in.
  """
  if not prompt.strip():
    raise DecodeError("the prompt is empty")
  if timeline is not None:
    if Path(timeline).suffix not in (".html", ".svg"):
      raise DecodeError(f"--timeline={timeline}: the name must end in .html or .svg")
    _check_writable("timeline", timeline)
  d = config.decode
  model = Model(config)
  tokens = model.encode(prompt, model.speed)
  modes = [d.parallel] + ([False] if d.compare and d.parallel else [])
  _compile(model, len(tokens), modes)
  terminal = sys.stdout.isatty()
  if terminal and d.live:
    response = _generate_live(model, prompt, d.parallel)
  else:
    response = model.generate(prompt, parallel=d.parallel, speed=model.speed)
  print(printable(response.text) if terminal else response.text, flush=True)
  speedup = None
  console = Console(stderr=not terminal)
  if len(modes) > 1:
    with console.status("the same weights, one token at a time …"):
      sequential = model.generate(prompt, parallel=False, speed=model.speed)
    shown, shown_before = response.record["text_tokens"], sequential.record["text_tokens"]
    speedup = sequential.seconds / max(shown_before, 1) * shown / response.seconds
  programs = response.dtype, response.kernels
  console.print(figures_table(response.trace, response.seconds, speedup, programs))
  if timeline is not None:
    response.timeline(timeline)
    console.print(as_text(f"timeline written to {timeline}"), soft_wrap=True)
  return response


def _generate_live(model: Model, prompt: str, parallel: bool) -> Response:
  """The response, shown in the terminal while it is written; its seconds do not include drawing."""
  drawing = 0.0
  started = time.perf_counter()
  with LiveView(model.vocabulary) as view:

    def on_step(trace):
      nonlocal drawing
      at = time.perf_counter()
      view.update(trace, at - started - drawing)
      drawing += time.perf_counter() - at

    response = model.generate(prompt, parallel=parallel, speed=model.speed, on_step=on_step, every=8)
  return dataclasses.replace(response, seconds=response.seconds - drawing)


def _check_writable(flag: str, name: str) -> Path:
  """The path of a file that is written at the end; raises DecodeError before any work if that would fail."""
  path = Path(name)
  if not path.parent.is_dir():
    raise DecodeError(f"--{flag}={name}: there is no folder {path.parent}")
  if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
    raise DecodeError(f"--{flag}={name} cannot be written")
  return path


def _compile(model: Model, prompt_length: int, modes: list[bool]) -> None:
  """Compiles what the prompt may need, with a progress bar: later runs find it in the cache."""
  bar, task = progress_bar("compiling (cached for later runs)", 1)
  with bar:
    for parallel in modes:
      show = lambda done, total: bar.update(task, completed=done, total=total)
      precompile(model.interpreter(parallel), prompt_length, model.sampling, on_progress=show)


def decode_file(config, prompts_file: str, output: str | None) -> None:
  """Answers every prompt of a JSON-lines file (fields "prompt" and, optionally, "id" and others).

  Writes one JSON object for each row, in the order of the rows, to `output` or to stdout: the row's fields
  and those of `decode.record`. Stdout gets a row as soon as it and those before it are finished. `output` is
  replaced as a whole at the end; until then what is finished is in `output`.partial, from which the same
  command continues. Several processes, which all call this, need an `output`.
  """
  with distributed.as_one():
    _decode_file(config, prompts_file, output)


def _decode_file(config, prompts_file: str, output: str | None) -> None:
  rows = read_jsonl(prompts_file)
  for number, row in enumerate(rows, 1):
    if not isinstance(row.get("prompt"), str):
      raise DecodeError(f'{prompts_file}: row {number} has no text under "prompt"')
  target = None if output is None else _check_writable("output", output)
  if not rows:
    raise DecodeError(f"{prompts_file} has no prompts")
  if target is None:
    _answer(config, prompts_file, rows, range(len(rows)), _in_order(rows))
    return
  partial = target.with_name(target.name + ".partial")
  with distributed.writing_in(target.parent, target.name + ".lock"):
    config = resolve(config, "decode", settings_beside(partial))
    records = SharedRecords(partial, _settings(config, rows), f"delete {partial} to begin anew")

    def work(some: Sequence[int], add: Callable[[dict], None]) -> None:
      _answer(config, prompts_file, rows, some, lambda i, record: add({"id": str(i), "record": record}))

    records.make([i for i in range(len(rows)) if str(i) not in records.rows], work)
    if distributed.is_first():
      write_jsonl(target, ({**row, **records.rows[str(i)]["record"]} for i, row in enumerate(rows)))
      partial.unlink()
      settings_beside(partial).unlink()


def _settings(config, rows: Sequence[dict]) -> dict:
  """What the responses to the rows depend on."""
  return {
    "source": config.model.source,
    "adapter's sha256": adapter_digest(config.model.adapter),
    "prompts' digest": hashlib.sha256(to_json([r["prompt"] for r in rows]).encode()).hexdigest()[:16],
    "decode.parallel": config.decode.parallel,
    "decode.speed": config.decode.speed,
    **decode_settings(config, config.model.adapter, parallel=config.decode.parallel),
  }


def _in_order(rows: Sequence[dict]) -> Callable[[int, dict], None]:
  """Takes the record of row i, in any order, and writes them to stdout in the order of the rows."""
  waiting: dict[int, dict] = {}
  written = 0

  def write(i: int, record: dict) -> None:
    nonlocal written
    waiting[i] = record
    while written in waiting:
      sys.stdout.write(to_jsonl([{**rows[written], **waiting.pop(written)}]))
      sys.stdout.flush()
      written += 1

  return write


def _answer(
  config,
  prompts_file: str,
  rows: Sequence[dict],
  todo: Sequence[int],
  on_finish: Callable[[int, dict], None],
) -> None:
  """Calls `on_finish(i, record)` for each row in `todo`, as they finish. Raises DecodeError, before any is
  decoded, for a row that cannot be."""
  d, model = config.decode, Model(config)
  for i in todo:
    try:
      model.encode(rows[i]["prompt"], model.speed)
    except DecodeError as error:
      raise DecodeError(f"{prompts_file}, row {i + 1}: {error}") from None
  bar, task = progress_bar("decoding", len(rows), len(rows) - len(todo))

  def finished(i: int, response: Response) -> None:
    on_finish(todo[i], response.record)
    bar.advance(task)

  with bar:
    model.generate_batch(
      [rows[i]["prompt"] for i in todo],
      parallel=d.parallel,
      speed=model.speed,
      batch_size=min(d.batch_size, len(todo)),
      on_finish=finished,
    )
