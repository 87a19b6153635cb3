"""Time of a decode step on this machine: `python -m pasta_jax.evaluate.benchmark`.

Medians of interleaved measurements in one run: the memory bandwidth that a plain sum reaches; a step of sequential
decoding; a step of parallel decoding with 1, 2, 4, 8, 16 live branches, and with pools of several sizes; several
requests in one batch, one token each; the prefill of a prompt; and on the same weights, if installed, `transformers`
one token at a time, and llama.cpp in several precisions: one sequence, eight that share their beginning, and the
prefill. With `--against=live` (docs/language.md section 3.1) or `--against=invariant` (`decode.invariant`) each step is
measured next to one of that kind. The floor of a step is the weights' bytes over that bandwidth. The ratio to one
branch flatters a slow single-branch step, so absolute times are given too. Tables: `evaluate.step_tables`.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
from absl import app, flags, logging
from flax import nnx

from pasta_jax.config.sections import KERNELS, formats
from pasta_jax.decode import sight
from pasta_jax.decode.interpreter import UNBOUNDED, Interpreter, capacity_of
from pasta_jax.decode.sampling import as_arrays
from pasta_jax.decode.settings import (
  Limits,
  SamplingConfig,
  StepFeatures,
  attention_by,
  narrowest,
  specialise,
)
from pasta_jax.decode.state import State, grow
from pasta_jax.decode.threads import RUNNING
from pasta_jax.evaluate.other_programs import (
  LlamaCpp,
  gguf_of,
  hardware,
  llama_cpp_prefill_timer,
  llama_cpp_step_timer,
  llama_cpp_version,
  require_llama_cpp,
  transformers_timer,
)
from pasta_jax.evaluate.step_tables import LLAMA_CPP, MAIN_BRANCHES, MAIN_POOL, PROMPT, show
from pasta_jax.lang.automaton import ORDINARY
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.model.products import resolve_kernels
from pasta_jax.weights import build
from pasta_jax.weights.adapter import Adapter
from pasta_jax.weights.checkpoint import Checkpoint, load_checkpoint
from pasta_jax.weights.gguf_copy import KINDS, gguf_file

FLAGS = flags.FLAGS  # defined by `define_flags`, so that importing this module defines none
PREFILL_POOL = 1024  # entries
LLAMA_CPP_KINDS, SEQUENCES = ("BF16", "Q8_0", "Q4_1"), (1, 8)  # of llama.cpp
# Steps that are measured next to the ordinary ones: what those are called then, and features.
AGAINST: dict[str, tuple[str, dict[str, Any]]] = {
  "live": ("promise", {"visibility": "live"}),
  "invariant": ("ordinary", {"invariant": True}),
}
SAMPLING, NO_REPEAT = SamplingConfig(repetition_penalty=1.1), 16  # the defaults of decoding


def busy_state(interpreter: Interpreter, branches: int, capacity: int) -> State:
  """A state with `branches` running threads, each of which sees half of a pool of `capacity` entries."""
  state = interpreter.prefill([1] * 16)
  if capacity > capacity_of(state):
    sights = sight.grown(interpreter.features.live, state.sight, capacity - capacity_of(state))
    state = grow(state, capacity, sights)
  t = state.threads
  live = jnp.arange(t.status.shape[0]) < branches
  seen = sight.main_thread(interpreter.features.live, capacity, jnp.int32(capacity // 2), t.status.shape[0])
  table = state.table.update(
    status=jnp.where(live, RUNNING, t.status),
    token=jnp.full_like(t.token, 100),
    kind=jnp.full_like(t.kind, ORDINARY),
    index=jnp.full_like(t.index, 5),
    position=jnp.full_like(t.position, capacity // 2),
  )
  return state.replace(
    table=table,
    sight=jnp.broadcast_to(seen, state.sight.shape),
    used=jnp.int32(capacity // 2),
    prompt=jnp.int32(capacity // 2),
    runnable=jnp.int32(branches),
    n_threads=jnp.int32(branches),
  )


def step_timer(
  checkpoint: Checkpoint,
  vocabulary: Vocabulary,
  dtype: str,
  branches: int,
  capacity: int,
  *,
  sequential: bool = False,
  **features: Any,
) -> Callable[[], float]:
  """A function that runs some decode steps and returns the seconds per step.

  `sequential`: ordinary decoding, with the main thread only and no guard. `features` are further ones of the step.
  """
  width = max(
    branches, narrowest(formats(dtype)[0], jax.default_backend(), resolve_kernels(FLAGS.kernels, dtype))
  )
  limits = Limits(
    max_new_tokens=10**6,
    max_threads=1 if sequential else 24,
    branch_widths=(width,),
    kv_buckets=(256, capacity) if capacity > 256 else (capacity,),
  )
  # The tags' rows are zeros, so that no tag is ever the most likely token: every branch stays alive.
  it = Interpreter(
    _model(checkpoint, dtype),
    vocabulary,
    limits,
    StepFeatures(
      promises=not sequential,
      guard=not sequential,
      no_repeat=NO_REPEAT,
      **{"attention": _attention(dtype), **features},
    ),
  )
  return segment_timer(it, branches, capacity, min(FLAGS.steps, capacity // 2 // width - 1))


def segment_timer(it: Interpreter, branches: int, capacity: int, steps: int) -> Callable[[], float]:
  """A function that runs a segment of `steps` steps with `branches` live branches, as wide as the interpreter's widest
  step, and returns the seconds per step."""
  width, features, numbers = (
    it.limits.branch_widths[-1],
    specialise(it.features, SAMPLING),
    as_arrays(SAMPLING),
  )
  start = busy_state(it, branches, capacity)

  def measure() -> float:
    state = jax.block_until_ready(jax.tree.map(jnp.copy, start))
    started = time.perf_counter()
    after, scalars = it.segment(state, numbers, steps, width=width, features=features)
    jax.device_get(scalars)
    seconds = time.perf_counter() - started
    return seconds / max(int(after.steps), 1)

  measure()  # compiles
  return measure


def batch_timer(
  checkpoint: Checkpoint, vocabulary: Vocabulary, dtype: str, requests: int, capacity: int, **features: Any
) -> Callable[[], float]:
  """A function that decodes some tokens of several requests in a batch and returns the seconds per step."""
  model = _model(checkpoint, dtype)
  width = 1
  limits = Limits(
    max_new_tokens=FLAGS.steps, max_threads=1, branch_widths=(width,), kv_buckets=(256, capacity)
  )
  plain = StepFeatures(
    promises=False, guard=False, no_repeat=NO_REPEAT, **{"attention": _attention(dtype), **features}
  )
  it = Interpreter(model, vocabulary, limits, plain)
  compiled, numbers = specialise(it.features, SAMPLING), as_arrays(SAMPLING)
  one = busy_state(it, 1, capacity)
  batch = jax.tree.map(lambda x: jnp.stack([x] * requests), numbers)

  def measure() -> float:
    states = jax.block_until_ready(jax.tree.map(lambda x: jnp.stack([x] * requests), one))
    started = time.perf_counter()
    after, finish = it.batch_segment(states, batch, requests, UNBOUNDED, width=width, features=compiled)
    jax.block_until_ready(finish)
    return (time.perf_counter() - started) / int(after.steps.max())

  measure()  # compiles
  return measure


_MODELS: dict[str, Any] = {}


def _model(checkpoint: Checkpoint, dtype: str):
  """The model prepared for decoding, with tags that are never the most likely token; one per precision."""
  if dtype not in _MODELS:
    tags = np.zeros((6, checkpoint.config.d_model), np.float32)
    adapter = Adapter(1.0, {}, tags, None if checkpoint.config.tie_embeddings else tags.T)
    products, weights = formats(dtype)
    _MODELS[dtype] = build.for_decoding(
      checkpoint.config, checkpoint.params, adapter, jnp.dtype(products), weights=weights,
      product=resolve_kernels(FLAGS.kernels, dtype),
    )  # fmt: skip
  return _MODELS[dtype]


def _attention(dtype: str) -> str:
  return attention_by("auto", resolve_kernels(FLAGS.kernels, dtype))


def bandwidth_timer(megabytes: int = 512) -> Callable[[], float]:
  """A function that returns the bytes per second of a sum over a large array."""
  x = jnp.ones((megabytes << 18,), jnp.float32)
  total = jax.jit(jnp.sum)
  total(x).block_until_ready()

  def measure() -> float:
    started = time.perf_counter()
    total(x).block_until_ready()
    return x.nbytes / (time.perf_counter() - started)

  return measure


def prefill_timer(checkpoint: Checkpoint, vocabulary: Vocabulary, dtype: str) -> Callable[[], float]:
  """A function that returns the seconds of the prefill of a prompt of PROMPT tokens, in a pool of PREFILL_POOL."""
  limits = Limits(max_new_tokens=1, max_threads=1, branch_widths=(1,), kv_buckets=(PREFILL_POOL,))
  plain = StepFeatures(promises=False, guard=False, no_repeat=NO_REPEAT, attention=_attention(dtype))
  it = Interpreter(_model(checkpoint, dtype), vocabulary, limits, plain)

  def measure() -> float:
    started = time.perf_counter()
    jax.block_until_ready(it.prefill([1] * PROMPT))
    return time.perf_counter() - started

  measure()  # compiles
  return measure


def llama_cpp_timers(source: Path, kind: str) -> dict[tuple, Callable[[], float]]:
  """By key (`step_tables`): llama.cpp's steps and its prefill, on the weights of a GGUF file in another `kind`."""
  most = max(SEQUENCES)
  context = max(PREFILL_POOL, MAIN_POOL // 2 + most * FLAGS.steps)
  with tempfile.TemporaryDirectory() as folder:  # the file stays open
    model = LlamaCpp(gguf_file(source, kind, Path(folder)), context=context, sequences=most)
  timers: dict[tuple, Callable[[], float]] = {
    (LLAMA_CPP, kind, n): llama_cpp_step_timer(model, n, MAIN_POOL // 2, FLAGS.steps) for n in SEQUENCES
  }
  return {**timers, (LLAMA_CPP, kind, "prefill"): llama_cpp_prefill_timer(model, PROMPT)}


def kinds_of_llama_cpp() -> tuple[Path | None, list[str]]:
  """(the GGUF file, kinds) to measure llama.cpp with; no kinds where it is not installed, the model is no GGUF file, or
  --others says no, unless kinds are asked for. Raises ValueError, one line, for kinds that cannot be measured."""
  if (kinds := FLAGS.llama_cpp) is None and not (FLAGS.others and llama_cpp_version()):
    return None, []
  source = gguf_of(FLAGS.model)
  if kinds is None:
    return source, list(LLAMA_CPP_KINDS) if source else []
  if not kinds:
    return None, []
  require_llama_cpp()
  if unknown := [kind for kind in kinds if kind not in KINDS]:
    raise ValueError(f"--llama_cpp takes {', '.join(KINDS)}, not {unknown[0]!r}")
  if source is None:
    raise ValueError(f"--llama_cpp needs a model from a GGUF file, which {FLAGS.model} is not")
  return source, kinds


def floor_of(dtype: str, bandwidth: float) -> float:
  """Seconds to read the weights of a dtype once."""
  model = _MODELS[dtype]
  weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(model)))
  table_bytes = model.embed.embedding.size * model.dtype.itemsize
  return (weights - table_bytes) / bandwidth  # the embedding is a lookup, which reads few rows


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)  # the writer of GGUF files tells what it does
  if FLAGS.cost and (
    len(set(FLAGS.branches)) < 2 or len(set(FLAGS.pools)) < 2
  ):  # before minutes of measuring
    sys.exit("error: --cost needs at least two numbers of --branches and two sizes of --pools")
  console = rich.console.Console()
  checkpoint = load_checkpoint(FLAGS.model)
  vocabulary = checkpoint.vocabulary
  branches, pools, requests = ([int(n) for n in f] for f in (FLAGS.branches, FLAGS.pools, FLAGS.requests))
  against, (plain, features) = FLAGS.against, AGAINST.get(FLAGS.against, ("", {}))
  try:
    gguf, kinds = kinds_of_llama_cpp()
    for dtype in FLAGS.dtypes:
      resolve_kernels(FLAGS.kernels, dtype)
  except ValueError as error:
    sys.exit(f"error: {error}")
  timers: dict[tuple, Callable[[], float]] = {("bandwidth",): bandwidth_timer()}
  with console.status("compiling …"):
    for dtype in FLAGS.dtypes:
      timers["sequential", dtype] = step_timer(checkpoint, vocabulary, dtype, 1, MAIN_POOL, sequential=True)
      for b, p in dict.fromkeys(
        [*((b, MAIN_POOL) for b in branches), *((MAIN_BRANCHES, p) for p in (MAIN_POOL, *pools))]
      ):
        timers[dtype, b, p] = step_timer(checkpoint, vocabulary, dtype, b, p)
        if against:
          timers[against, dtype, b, p] = step_timer(checkpoint, vocabulary, dtype, b, p, **features)
      for r in requests:
        timers["requests", dtype, r] = batch_timer(checkpoint, vocabulary, dtype, r, MAIN_POOL)
        if against == "invariant":  # these requests make no promises, whose visibility could differ
          timers[against, "requests", dtype, r] = batch_timer(
            checkpoint, vocabulary, dtype, r, MAIN_POOL, **features
          )
      timers["prefill", dtype] = prefill_timer(checkpoint, vocabulary, dtype)
      if FLAGS.others and (other := transformers_timer(checkpoint, dtype, MAIN_POOL // 2, FLAGS.steps)):
        timers["transformers", dtype] = other
    for kind in kinds:
      assert gguf is not None
      timers |= llama_cpp_timers(gguf, kind)
  taken: dict[tuple, list[float]] = {key: [] for key in timers}
  with console.status("measuring …"):
    for _ in range(FLAGS.rounds):
      for key, measure in timers.items():
        taken[key].append(measure())
  # Of neighbours in time: what else the machine does changes both.
  for key in [key for key in taken if key[0] == against]:
    taken[f"{against} to {plain}", *key[1:]] = [a / b for a, b in zip(taken[key], taken[key[1:]])]
  median = {key: statistics.median(values) for key, values in taken.items()}
  if FLAGS.json:
    with open(FLAGS.json, "w", encoding="utf-8") as file:
      json.dump({" ".join(map(str, k)): v for k, v in median.items()}, file, indent=2)
  if FLAGS.cost:
    cost = step_cost(median, FLAGS.dtypes[-1])
    with open(FLAGS.cost, "w", encoding="utf-8") as file:
      json.dump(cost, file, indent=2)
    console.print("step cost, seconds: " + ", ".join(f"{k} {v:.3g}" for k, v in cost.items()))
  bandwidth = median["bandwidth",]
  console.print(f"{hardware()}; bandwidth {bandwidth / 1e9:.1f} GB/s", highlight=False)
  floors = {dtype: floor_of(dtype, bandwidth) for dtype in FLAGS.dtypes}
  show(console, median, floors, (against, plain) if against else None)


def step_cost(median: dict[tuple, float], dtype: str) -> dict[str, float]:
  """`base`, `row` and `entry` of a parallel step (`preference.score.StepCost`), fitted to relative errors.

  A measured step has half of its pool's entries in use.
  """
  points = [(key[1], key[2] / 2, seconds) for key, seconds in median.items() if key[0] == dtype]
  rows = np.array([[1 / s, b / s, used / s] for b, used, s in points])
  base, row, entry = np.maximum(np.linalg.lstsq(rows, np.ones(len(points)), rcond=None)[0], 0.0)
  return {"base": float(base), "row": float(row), "entry": float(entry)}


def define_flags() -> None:
  flags.DEFINE_string("model", "smollm2-135m-instruct", "name, GGUF file or Hugging Face folder")
  flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "precisions, as of decode.dtype")
  flags.DEFINE_enum("kernels", "auto", list(KERNELS), "as decode.kernels")
  flags.DEFINE_list("branches", ["1", "2", "4", "8", "16"], "branches in a step")
  flags.DEFINE_list("pools", ["256", "512", "1024", "2048", "4096"], "pool entries")
  flags.DEFINE_list("requests", ["8", "24"], "requests in a batch")
  flags.DEFINE_enum("against", None, list(AGAINST), "measure each step against this one too")
  flags.DEFINE_boolean("others", True, "measure transformers and llama.cpp too, where installed")
  flags.DEFINE_list("llama_cpp", None, f"precisions of llama.cpp; unless given, {','.join(LLAMA_CPP_KINDS)}")
  flags.DEFINE_integer("steps", 16, "decode steps in a measurement")
  flags.DEFINE_integer("rounds", 5, "measurements; medians are reported")
  flags.DEFINE_string("json", None, "write the figures to this file too")
  flags.DEFINE_string(
    "cost", None, "write the step cost of the last of --dtypes to this file (preference.cost)"
  )


if __name__ == "__main__":
  define_flags()
  app.run(main)
