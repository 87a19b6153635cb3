"""Tokens a second that a reader sees: PASTA against llama.cpp with the weights of Baseline-SFT, answer by answer.

    python -m pasta_jax.evaluate.against_llama_cpp --prompts=data/seed.jsonl --limit=40

For each prompt, one after the other, the adapter `--adapter` answers in parallel, with the settings of
`config.decode`, and llama.cpp answers greedily, one token at a time, with the adapter `--baseline` merged into
the same weights. Both get the same tokens of the prompt in its chat form and use all cores. Times are of
prefill and decoding, up to the end of the answer or `--max_new_tokens` tokens.

Both penalise repetition by `decode.repetition_penalty`, with the whole answer as memory: ours words of four letters or
more, llama.cpp every token. Ours also bans n-grams that were written before (`decode.no_repeat`), llama.cpp does not.

Needs llama-cpp-python and an idle machine: threads of llama.cpp wait for each other, and any other work delays all of
them. `--json=FILE` writes the figures and the rows.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rich.box
import rich.console
import rich.table
from absl import app, flags, logging

from pasta_jax.config import Config, with_changes
from pasta_jax.config.sections import DTYPES, KERNELS, WEIGHTS
from pasta_jax.data.prompts import PromptTurn, read_prompts
from pasta_jax.decode.generator import Model, adapter_path
from pasta_jax.decode.record import count_text_tokens
from pasta_jax.decode.scheduler import precompile
from pasta_jax.decode.settings import padded_length
from pasta_jax.evaluate.metrics.measures import bootstrap_interval, geometric_mean
from pasta_jax.evaluate.metrics.wins import resamples
from pasta_jax.evaluate.other_programs import LlamaCpp, gguf_of, hardware, require_llama_cpp
from pasta_jax.evaluate.systems.system import check_length
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.utils.environment import cache_folder, use_compilation_cache
from pasta_jax.utils.files import write_json_atomic
from pasta_jax.utils.progress import progress_bar
from pasta_jax.utils.text import one_line
from pasta_jax.weights.adapter import Merged, read_adapter
from pasta_jax.weights.checkpoint import load_checkpoint
from pasta_jax.weights.gguf_copy import KINDS, gguf_file

MATCHING = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}  # llama.cpp's kind, by `decode.dtype`
OURS, THEIRS = "pasta-jax", "llama.cpp"


def merged(config: Config, baseline: str) -> Merged:
  """The config's weights with the adapter `baseline`, without rows of tags: it does not write any, and the vocabulary
  stays that of the weights. Raises AdapterError, one line, as `read_adapter`."""
  checkpoint, path, adapter = load_checkpoint(config.model.source), adapter_path(baseline), None
  if path is not None:
    adapter = read_adapter(path, checkpoint.config)._replace(tags=None, head_tags=None)
  return Merged(checkpoint.config, checkpoint.params, adapter)


def llama_cpp_with(config: Config, baseline: str, kind: str) -> LlamaCpp:
  """llama.cpp with the `merged` weights in the precision `kind`. Raises ValueError, one line, for weights that are no
  GGUF file, and as `merged` and `gguf_file`."""
  if (source := gguf_of(config.model.source)) is None:
    raise ValueError(f"llama.cpp needs a model from a GGUF file, which {config.model.source} is not")
  with tempfile.TemporaryDirectory() as folder:  # llama.cpp keeps the file open
    path = gguf_file(source, kind, Path(folder), merged(config, baseline))
    return LlamaCpp(path, context=config.decode.kv_capacity)


def shown(written: Sequence[int], vocabulary: Vocabulary) -> int:
  """The text tokens of an answer of llama.cpp, counted as those of a response (`decode.record`): tokens of its text as
  plain text, whatever tokens wrote it, and the end token."""
  ended = written[-1] in vocabulary.tags.eos
  written = written[: len(written) - ended]
  text = b"".join(map(vocabulary.tokenizer.token_bytes, written)).decode(errors="replace")
  tokens = vocabulary.tokenizer.encode(text) if "\ufffd" not in text else written
  return count_text_tokens(tokens, "stop" if ended else "length")


class Pair:
  """Both programs, which answer the same prompts."""

  def __init__(self, config: Config, baseline: str, kind: str):
    """Raises ValueError, one line, as `Model` and `llama_cpp_with`."""
    self.theirs = llama_cpp_with(config, baseline, kind)
    self.model = Model(config)

  def precompile(self, prompts: Sequence[PromptTurn]) -> None:
    """Compiles what these prompts need, and lets llama.cpp write a few tokens."""
    encoded = [self.model.encode(p.prompt) for p in prompts]
    for tokens in encoded:
      check_length(self.model, len(tokens))
    for length in sorted({padded_length(len(tokens)) for tokens in encoded}):
      precompile(self.model.interpreter(True), length, self.model.sampling)
    self._theirs(encoded[0], 8)

  def row(self, prompt: PromptTurn, *, theirs_first: bool) -> dict:
    """`text_tokens` (the end token included) and `seconds` of both answers to a prompt, by program."""
    tokens = self.model.encode(prompt.prompt)
    answers = {OURS: lambda: self._ours(prompt.prompt), THEIRS: lambda: self._theirs(tokens)}
    order = (THEIRS, OURS) if theirs_first else (OURS, THEIRS)
    return {"id": prompt.id, **{name: answers[name]() for name in order}}

  def _ours(self, prompt: str) -> dict[str, float]:
    response = self.model.generate(prompt)
    return {"text_tokens": response.record["text_tokens"], "seconds": response.seconds}

  def _theirs(self, prompt: Sequence[int], most: int = 0) -> dict[str, float]:
    model = self.model
    most, ends = most or model.limits.max_new_tokens, model.vocabulary.tags.eos
    started = time.perf_counter()
    tokens = self.theirs.generate(prompt, most, ends, model.sampling.repetition_penalty)
    seconds = time.perf_counter() - started
    return {"text_tokens": shown(tokens, model.vocabulary), "seconds": seconds}


def figures(rows: Sequence[dict]) -> dict[str, dict[str, float]]:
  """Of each program, and the ratios of ours to theirs, with 95 % bootstrap intervals over prompts."""
  columns = {
    name: (np.array([r[name]["text_tokens"] for r in rows]), np.array([r[name]["seconds"] for r in rows]))
    for name in (OURS, THEIRS)
  }
  found = {
    name: {
      "text_tokens": int(tokens.sum()),
      "seconds": float(seconds.sum()),
      "tokens_per_second": float(tokens.sum() / seconds.sum()),
      "median_tokens_per_second": float(np.median(tokens / seconds)),
      "median_text_tokens": float(np.median(tokens)),
      "median_seconds": float(np.median(seconds)),
    }
    for name, (tokens, seconds) in columns.items()
  }
  counts = resamples(len(rows))
  ours, theirs = ((counts @ tokens) / (counts @ seconds) for tokens, seconds in columns.values())
  low, high = np.percentile(ours / theirs, [2.5, 97.5])
  speedups = list(columns[THEIRS][1] / columns[OURS][1])
  faster_low, faster_high = bootstrap_interval(speedups)
  return found | {
    "tokens_per_second": {
      "ratio": found[OURS]["tokens_per_second"] / found[THEIRS]["tokens_per_second"],
      "low": float(low),
      "high": float(high),
    },
    "complete_answer": {"ratio": geometric_mean(speedups), "low": faster_low, "high": faster_high},
  }


def show(found: dict[str, dict[str, float]], prompts: int) -> None:
  """Prints the figures; ratios with 95 % intervals."""
  console = rich.console.Console()
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
  for name in (
    f"{prompts} prompts",
    "text\ntokens",
    "seconds",
    "text\ntokens/s",
    "median\ntokens/s",
    "median\ns",
  ):
    table.add_column(name, justify="right" if table.columns else "left", no_wrap=True)
  for name in (OURS, THEIRS):
    f = found[name]
    table.add_row(
      name, f"{f['text_tokens']}", f"{f['seconds']:.1f}", f"{f['tokens_per_second']:.1f}",
      f"{f['median_tokens_per_second']:.1f}", f"{f['median_seconds']:.2f}",
    )  # fmt: skip
  console.print(table)
  for key, what in (
    ("tokens_per_second", "text tokens/s"),
    ("complete_answer", "speed of complete answers"),
  ):
    f = found[key]
    console.print(
      f"{what}: {f['ratio']:.2f} times llama.cpp's, 95 % interval {f['low']:.2f} to {f['high']:.2f}"
    )


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)  # the writer of GGUF files tells what it does
  values = flags.FLAGS
  try:
    require_llama_cpp()
    kind = values.kind or MATCHING.get(values.dtype, "")
    if not kind:
      raise ValueError(f"llama.cpp has nothing like {values.dtype}: name a precision of it by --kind")
    names = ("dtype", "kernels", "max_new_tokens")
    settings = {f"decode.{name}": values[name].value for name in names}
    config = with_changes(Config(), {"model.adapter": values.adapter, **settings})
    prompts = [p for p in read_prompts(values.prompts) if not p.earlier][: values.limit or None]
    if not prompts:
      raise ValueError(f"{values.prompts} has no prompt of one turn")
    use_compilation_cache(cache_folder() / "compiled")
    pair = Pair(config, values.baseline, kind)
    console = rich.console.Console(stderr=True)
    with console.status("compiling …"):
      pair.precompile(prompts)
    rows, (bar, task) = [], progress_bar("answering", len(prompts))
    with bar:
      for i, prompt in enumerate(prompts):
        rows.append(pair.row(prompt, theirs_first=i % 2 == 1))
        bar.advance(task)
    found, machine = figures(rows), hardware()
    if values.json:
      about = {"machine": machine, "dtype": values.dtype, "kernels": pair.model.kernels, "kind": kind}
      about |= {"adapter": values.adapter, "baseline": values.baseline}
      write_json_atomic(Path(values.json), {**about, "figures": found, "rows": rows})
  except (ValueError, OSError, RuntimeError) as error:
    sys.exit(f"error: {one_line(str(error))}")
  print(f"{machine}\n{values.dtype}, kernels {pair.model.kernels}; llama.cpp {kind}")
  show(found, len(rows))


def define_flags() -> None:
  flags.DEFINE_string("prompts", None, "a file of prompts (docs/evaluation.md)", required=True)
  flags.DEFINE_integer("limit", 40, "prompts, spread evenly over the file; 0: all", lower_bound=0)
  flags.DEFINE_enum("dtype", "bfloat16", [*DTYPES, *WEIGHTS], "as decode.dtype")
  flags.DEFINE_enum("kernels", "auto", list(KERNELS), "as decode.kernels")
  flags.DEFINE_enum(
    "kind", None, list(KINDS), "precision of llama.cpp; unless given, that which matches --dtype"
  )
  flags.DEFINE_integer("max_new_tokens", 512, "as decode.max_new_tokens", lower_bound=1)
  flags.DEFINE_string("adapter", "pasta", "as model.adapter, of ours")
  flags.DEFINE_string("baseline", "baseline", "the adapter that is merged for llama.cpp")
  flags.DEFINE_string("json", None, "write figures and rows to this file too")


if __name__ == "__main__":
  define_flags()
  app.run(main)
