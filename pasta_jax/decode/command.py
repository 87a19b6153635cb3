"""`--mode=decode`: one prompt with a live view, or a file of prompts to a file of responses."""

import dataclasses
import os
import sys
import time
from pathlib import Path

from rich.console import Console

from pasta_jax.decode.generator import DecodeError, Model, Response
from pasta_jax.decode.record import to_record
from pasta_jax.decode.scheduler import Scheduler
from pasta_jax.decode.views.live import LiveView, figures_table
from pasta_jax.decode.views.timeline import timeline_html, timeline_svg
from pasta_jax.utils.files import write_atomic
from pasta_jax.utils.jsonl import read_jsonl, to_jsonl
from pasta_jax.utils.progress import progress_bar


def decode_prompt(config, prompt: str, *, timeline: str | None = None) -> Response:
  """Answers one prompt. The answer goes to stdout; progress and figures go to the terminal, or to stderr.

  With `decode.compare` the same weights then answer once more without promises, and the figures say how
  much longer a token took. `timeline` names an .html or .svg file to draw the response in.
  """
  if not prompt.strip():
    raise DecodeError("the prompt is empty")
  if timeline is not None:
    if Path(timeline).suffix not in (".html", ".svg"):
      raise DecodeError(f"--timeline={timeline}: the name must end in .html or .svg")
    _check_writable("timeline", timeline)
  d = config.decode
  generator = Model(config)
  tokens = generator.encode(prompt, generator.speed)
  modes = [d.parallel] + ([False] if d.compare and d.parallel else [])
  _compile(generator, len(tokens), modes)
  terminal = sys.stdout.isatty()
  if terminal and d.live:
    drawing = 0.0
    started = time.perf_counter()
    with LiveView(generator.vocabulary) as view:

      def watch(trace):
        nonlocal drawing
        at = time.perf_counter()
        view.update(trace, at - started - drawing)
        drawing += time.perf_counter() - at

      response = generator.generate(prompt, parallel=d.parallel, speed=generator.speed, watch=watch, every=8)
    response = dataclasses.replace(response, seconds=response.seconds - drawing)  # drawing is no decoding
  else:
    response = generator.generate(prompt, parallel=d.parallel, speed=generator.speed)
  print(response.text, flush=True)
  speedup = None
  console = Console(stderr=not terminal)
  if len(modes) > 1:
    with console.status("the same weights, one token at a time …"):
      baseline = generator.generate(prompt, parallel=False, speed=generator.speed)
    shown = lambda r: to_record(r.trace, generator.vocabulary)["text_tokens"]
    speedup = baseline.seconds / max(shown(baseline), 1) * shown(response) / response.seconds
  console.print(figures_table(response.trace, response.seconds, speedup))
  if timeline is not None:
    draw = timeline_html if timeline.endswith(".html") else timeline_svg
    Path(timeline).write_text(draw(response.trace, generator.vocabulary), "utf-8")
    console.print(f"timeline written to {timeline}")
  return response


def _check_writable(flag: str, name: str) -> Path:
  """The path of a file to be written when all is done; raises DecodeError now if it could not be."""
  path = Path(name)
  if not path.parent.is_dir():
    raise DecodeError(f"--{flag}={name}: there is no folder {path.parent}")
  if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
    raise DecodeError(f"--{flag}={name} cannot be written")
  return path


def _compile(generator: Model, prompt_length: int, modes: list[bool]) -> None:
  """Compiles what the prompt may need, with a bar: the first run takes a while, later ones find it cached."""
  bar, task = progress_bar("compiling (cached for later runs)", 1)
  with bar:
    for parallel in modes:
      note = lambda done, total: bar.update(task, completed=done, total=total)
      generator.interpreter(parallel).precompile(prompt_length, generator.sampling, note=note)


def decode_file(config, prompts_file: str, output: str | None) -> None:
  """Answers every prompt of a JSON-lines file ("prompt", and "id" if there is one).

  Writes one JSON object a response, in the order of the prompts, to `output` (replaced as a whole at the end)
  or to stdout.
  """
  rows = read_jsonl(prompts_file)
  for number, row in enumerate(rows, 1):
    if not isinstance(row.get("prompt"), str):
      raise DecodeError(f'{prompts_file}: row {number} has no text under "prompt"')
  target = None if output is None else _check_writable("output", output)
  if not rows:
    raise DecodeError(f"{prompts_file} holds no prompt")
  d = config.decode
  generator = Model(config)
  prompts = []
  for number, row in enumerate(rows, 1):
    try:
      prompts.append(generator.encode(row["prompt"], generator.speed))
    except DecodeError as error:
      raise DecodeError(f"{prompts_file}, row {number}: {error}") from None
  decoder = Scheduler(
    generator.interpreter(d.parallel),
    batch_size=min(d.batch_size, len(rows)),
    branch_width=min(d.max_branches, 4) if d.parallel else 1,
  )
  bar, task = progress_bar("decoding", len(rows))
  with bar:
    traces = decoder.run(prompts, generator.sampling, done=lambda i, trace: bar.advance(task))
  answers = to_jsonl({**row, **to_record(trace, generator.vocabulary)} for row, trace in zip(rows, traces))
  if target is None:
    sys.stdout.write(answers)
  else:
    write_atomic(target, answers)
