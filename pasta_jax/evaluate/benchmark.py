"""Time of a decode step on this machine: `python -m pasta_jax.evaluate.benchmark`.

Medians of interleaved measurements in one run: the memory bandwidth that a plain sum reaches; a step of
sequential decoding; a step of parallel decoding with 1, 2, 4, 8, 16 live branches, and with pools of several
sizes, each under visibility `promise` and next to it under `live` (docs/language.md section 3.1), or, with
`--against=invariant`, under `decode.invariant`; several requests in one batch, one token each; and, if installed,
`transformers` and llama.cpp one token at a time on the same weights. The floor of a step is the weights' bytes over
that bandwidth. The ratio to one branch flatters a slow single-branch step, so absolute times are given too.
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
import rich.table
from absl import app, flags
from flax import nnx

from pasta_jax.config.sections import KERNELS, formats
from pasta_jax.decode import sight
from pasta_jax.decode.interpreter import UNBOUNDED, Interpreter, capacity_of
from pasta_jax.decode.sampling import as_arrays
from pasta_jax.decode.settings import Limits, SamplingConfig, StepFeatures, narrowest, specialise
from pasta_jax.decode.state import State, grow
from pasta_jax.decode.threads import RUNNING
from pasta_jax.lang.automaton import ORDINARY
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.model.products import resolve_kernels
from pasta_jax.weights import build
from pasta_jax.weights.adapter import Adapter
from pasta_jax.weights.checkpoint import Checkpoint, load_checkpoint
from pasta_jax.weights.hf_folder import save_hf_folder

FLAGS = flags.FLAGS  # defined by `define_flags`, so that importing this module defines none
MAIN_POOL, MAIN_BRANCHES = 512, 1
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
  width = max(branches, narrowest(formats(dtype)[0], jax.default_backend(), resolve_kernels(FLAGS.kernels)))
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
      **{"attention": _attention(), **features},
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
    promises=False, guard=False, no_repeat=NO_REPEAT, **{"attention": _attention(), **features}
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
      product=resolve_kernels(FLAGS.kernels),
    )  # fmt: skip
  return _MODELS[dtype]


def _attention() -> str:
  return "numba" if resolve_kernels(FLAGS.kernels) == "numba" else "auto"


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


def transformers_timer(checkpoint: Checkpoint, dtype: str) -> Callable[[], float] | None:
  """Seconds per token of `transformers`' eager decoding with its cache; None if it is not installed, or not in that
  dtype."""
  if formats(dtype)[1]:
    return None
  try:
    import torch
    import transformers
  except ImportError:
    return None
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "model"
    save_hf_folder(path, checkpoint.config, checkpoint.params, checkpoint.tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
  prompt = torch.ones((1, MAIN_POOL // 2), dtype=torch.long)

  @torch.inference_mode()
  def measure() -> float:
    out = model(prompt, use_cache=True)
    cache, token = out.past_key_values, prompt[:, :1]
    started = time.perf_counter()
    for _ in range(FLAGS.steps):
      out = model(token, past_key_values=cache, use_cache=True)
      cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    return (time.perf_counter() - started) / FLAGS.steps

  measure()
  return measure


def llama_cpp_timer() -> Callable[[], float] | None:
  """Seconds per token of llama.cpp on the GGUF file (Q4_1); None if llama-cpp-python is not installed."""
  try:
    import llama_cpp
  except ImportError:
    return None
  from pasta_jax.weights.download import named_weights

  model = llama_cpp.Llama(
    str(named_weights("smollm2-135m-instruct")), n_ctx=MAIN_POOL, logits_all=False, verbose=False
  )

  def measure() -> float:
    model.reset()
    model.eval([1] * (MAIN_POOL // 2))
    started = time.perf_counter()
    for _ in range(FLAGS.steps):
      model.eval([100])
    return (time.perf_counter() - started) / FLAGS.steps

  measure()
  return measure


def main(argv: list[str]) -> None:
  del argv
  if FLAGS.cost and (
    len(set(FLAGS.branches)) < 2 or len(set(FLAGS.pools)) < 2
  ):  # before minutes of measuring
    sys.exit("error: --cost needs at least two numbers of --branches and two sizes of --pools")
  console = rich.console.Console()
  checkpoint = load_checkpoint(FLAGS.model)
  vocabulary = checkpoint.vocabulary
  branches, pools, requests = ([int(n) for n in f] for f in (FLAGS.branches, FLAGS.pools, FLAGS.requests))
  against, (plain, features) = FLAGS.against, AGAINST[FLAGS.against]
  timers: dict[tuple, Callable[[], float]] = {("bandwidth",): bandwidth_timer()}
  with console.status("compiling …"):
    for dtype in FLAGS.dtypes:
      timers["sequential", dtype] = step_timer(checkpoint, vocabulary, dtype, 1, MAIN_POOL, sequential=True)
      for b, p in dict.fromkeys(
        [*((b, MAIN_POOL) for b in branches), *((MAIN_BRANCHES, p) for p in (MAIN_POOL, *pools))]
      ):
        timers[dtype, b, p] = step_timer(checkpoint, vocabulary, dtype, b, p)
        timers[against, dtype, b, p] = step_timer(checkpoint, vocabulary, dtype, b, p, **features)
      for r in requests:
        timers["requests", dtype, r] = batch_timer(checkpoint, vocabulary, dtype, r, MAIN_POOL)
        if against == "invariant":  # these requests make no promises, whose visibility could differ
          timers[against, "requests", dtype, r] = batch_timer(
            checkpoint, vocabulary, dtype, r, MAIN_POOL, **features
          )
      if FLAGS.others and (other := transformers_timer(checkpoint, dtype)):
        timers["transformers", dtype] = other
    if FLAGS.others and (other := llama_cpp_timer()):
      timers["llama.cpp", "Q4_1"] = other
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
  show(console, median, branches, pools, requests)


def step_cost(median: dict[tuple, float], dtype: str) -> dict[str, float]:
  """`base`, `row` and `entry` of a parallel step (`preference.score.StepCost`), fitted to relative errors.

  A measured step has half of its pool's entries in use.
  """
  points = [(key[1], key[2] / 2, seconds) for key, seconds in median.items() if key[0] == dtype]
  rows = np.array([[1 / s, b / s, used / s] for b, used, s in points])
  base, row, entry = np.maximum(np.linalg.lstsq(rows, np.ones(len(points)), rcond=None)[0], 0.0)
  return {"base": float(base), "row": float(row), "entry": float(entry)}


def show(
  console: rich.console.Console,
  median: dict[tuple, float],
  branches: list[int],
  pools: list[int],
  requests: list[int],
) -> None:
  """Prints the tables."""
  bandwidth = median["bandwidth",]
  console.print(f"{jax.devices()[0].device_kind}, bandwidth {bandwidth / 1e9:.1f} GB/s")
  for dtype in FLAGS.dtypes:
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(_MODELS[dtype])))
    table_bytes = _MODELS[dtype].embed.embedding.size * _MODELS[dtype].dtype.itemsize
    floor = (weights - table_bytes) / bandwidth  # the embedding is a lookup, which reads few rows
    one = median[dtype, MAIN_BRANCHES, MAIN_POOL]
    against, ratio = FLAGS.against, f"{FLAGS.against} to {AGAINST[FLAGS.against][0]}"
    compared = lambda *key, against=against, ratio=ratio: (
      (f"{1e3 * median[against, *key]:.1f}", f"{median[ratio, *key]:.2f}") if (ratio, *key) in median else ()
    )
    table = rich.table.Table(title=f"{dtype}: floor of a step {1e3 * floor:.1f} ms")
    for name in (
      "step",
      "ms",
      "share of the floor",
      "to one branch",
      "tokens/s",
      f"{against}, ms",
      ratio,
    ):
      table.add_column(name, justify="left" if name == "step" else "right")
    for b in branches:
      t = median[dtype, b, MAIN_POOL]
      table.add_row(
        f"{b} branch{'es' if b > 1 else ''}, pool {MAIN_POOL}",
        f"{1e3 * t:.1f}",
        f"{100 * floor / t:.0f} %",
        f"{t / one:.2f}",
        f"{b / t:.0f}",
        *compared(dtype, b, MAIN_POOL),
      )
    for p in pools:
      if p == MAIN_POOL and MAIN_BRANCHES in branches:
        continue
      t = median[dtype, MAIN_BRANCHES, p]
      table.add_row(
        f"{MAIN_BRANCHES} branch, pool {p}",
        f"{1e3 * t:.1f}",
        f"{100 * floor / t:.0f} %",
        f"{t / one:.2f}",
        f"{1 / t:.0f}",
        *compared(dtype, MAIN_BRANCHES, p),
      )
    for r in requests:
      t = median["requests", dtype, r]
      table.add_row(
        f"{r} requests, pool {MAIN_POOL} each",
        f"{1e3 * t:.1f}",
        "",
        f"{t / one:.2f}",
        f"{r / t:.0f}",
        *compared("requests", dtype, r),
      )
    for other in (("sequential", dtype), ("transformers", dtype), ("llama.cpp", "Q4_1")):
      if other in median:
        t = median[other]
        table.add_row(
          " ".join(other), f"{1e3 * t:.1f}", f"{100 * floor / t:.0f} %", f"{t / one:.2f}", f"{1 / t:.0f}"
        )
    console.print(table)


def define_flags() -> None:
  flags.DEFINE_string("model", "smollm2-135m-instruct", "name, GGUF file or Hugging Face folder")
  flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "precisions, as of decode.dtype")
  flags.DEFINE_enum("kernels", "auto", list(KERNELS), "as decode.kernels")
  flags.DEFINE_list("branches", ["1", "2", "4", "8", "16"], "branches in a step")
  flags.DEFINE_list("pools", ["256", "512", "1024", "2048", "4096"], "pool entries")
  flags.DEFINE_list("requests", ["8", "24"], "requests in a batch")
  flags.DEFINE_enum("against", "live", list(AGAINST), "what each step is measured against")
  flags.DEFINE_boolean("others", True, "measure transformers and llama.cpp too, where installed")
  flags.DEFINE_integer("steps", 16, "decode steps in a measurement")
  flags.DEFINE_integer("rounds", 5, "measurements; medians are reported")
  flags.DEFINE_string("json", None, "write the figures to this file too")
  flags.DEFINE_string(
    "cost", None, "write the step cost of the last of --dtypes to this file (preference.cost)"
  )


if __name__ == "__main__":
  define_flags()
  app.run(main)
