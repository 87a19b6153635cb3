"""Decode steps of a large model on an accelerator: `python -m pasta_jax.evaluate.accelerator --json=FILE`.

A model of the shape of Gemma 7B with random weights, made on the device; the tags' columns of its head are zeros, so
that every branch stays alive. Medians of interleaved measurements in one run: milliseconds of a step over branches,
sizes of the pool, steps per look, attention programs and weight formats. The floor of a step is the bytes of its
weights and pool over the bandwidth that a plain sum reaches. Wall over theoretical is what a response that fills all
branches would keep of its theoretical speedup: a step of one thread's ordinary decoding over a step of all branches.

`launch/accelerator.sh` runs this with and without command buffers, the checks of the kernels and the training
benchmark, and prints one table of all (`--show=FILE,FILE`).
"""

import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import rich.console
from absl import app, flags
from flax import nnx
from rich.table import Table

from pasta_jax.config.sections import formats
from pasta_jax.decode.ahead import architecture, in_decoding
from pasta_jax.decode.interpreter import Interpreter
from pasta_jax.decode.settings import Limits, StepFeatures, narrowest
from pasta_jax.evaluate.benchmark import bandwidth_timer, segment_timer
from pasta_jax.lang.automaton import ORDINARY
from pasta_jax.model.transformer import set_matmul_precision
from pasta_jax.utils.environment import offer_loops_to_command_buffers
from pasta_jax.utils.files import write_atomic
from pasta_jax.weights import build

FLAGS = flags.FLAGS
WIDTH = 130  # columns of the table in a file
ROWS = narrowest("bfloat16", "gpu", "xla")  # of a step on accelerators, whatever is alive


@dataclasses.dataclass(frozen=True)
class Case:
  """One program that is measured."""

  dtype: str
  branches: int  # 0: ordinary decoding of one thread
  pool: int
  steps_per_look: int = 8
  attention: str = "xla"
  narrow: bool = False  # one row for one thread

  @property
  def width(self) -> int:
    """Rows of its step."""
    return 1 if self.narrow else max(ROWS, self.branches)


def cases(kernel: str, *, tiny: bool) -> Iterator[Case]:
  """Each program once; `kernel` is the kind of attention that this machine has one of, or ""."""
  pool = 256 if tiny else 2048
  yield Case("bfloat16", 0, pool, narrow=True)  # are eight rows as fast as one?
  for branches in (0, 8) if tiny else (0, 1, 2, 4, 8, 16):
    yield Case("bfloat16", branches, pool)
  for other in (512,) if tiny else (512, 4096):
    yield Case("bfloat16", 8, other)
  for look in (1,) if tiny else (1, 32):
    yield Case("bfloat16", 8, pool, look)
  if kernel:
    for other in (pool,) if tiny else (512, pool, 4096):
      yield Case("bfloat16", 8, other, attention=kernel)
  for branches in (0, 8):
    yield Case("int8", branches, pool)


def random_parameters(model, vocabulary) -> Any:
  """Parameters of an abstract model, made on the device: only ordinary tokens are ever the likeliest."""
  _, shapes = nnx.split(model)
  leaves, tree = jax.tree.flatten(shapes)

  @jax.jit
  def make(key):
    def leaf(key, x):
      if jnp.issubdtype(x.dtype, jnp.integer):
        return jax.random.randint(key, x.shape, -127, 128, x.dtype)
      if x.ndim < 2 or x.dtype == jnp.float32:  # norms, and the scales of matrices in 8 bits
        return jnp.full(x.shape, 1.0 if x.ndim < 2 else 3e-4, x.dtype)
      return (jax.random.normal(key, x.shape, jnp.float32) * x.shape[0] ** -0.5).astype(x.dtype)

    keys = jax.random.split(key, len(leaves))
    params = jax.tree.unflatten(tree, [leaf(k, x) for k, x in zip(keys, leaves)])
    ordinary = jnp.asarray(vocabulary.table.classes == ORDINARY)
    head = params["head"]["kernel"]
    head[...] = jnp.where(ordinary, head[...], 0)
    return params

  return make(jax.random.key(0))


def step_timer(case: Case, source: str) -> tuple[Callable[[], float], int]:
  """(a function that measures seconds per step, bytes of the weights that a step multiplies by and of its pool)."""
  dtype, weights = formats(case.dtype)
  config, vocabulary = architecture(source)
  model = build.abstract(in_decoding(config), jnp.dtype(dtype), fused=True, weights=weights)
  params = _parameters(case.dtype, model, vocabulary)
  sequential = case.branches == 0
  limits = Limits(
    max_new_tokens=10**6, max_threads=1 if sequential else 24, branch_widths=(case.width,), kv_buckets=(case.pool,),
    steps_per_look=case.steps_per_look,
  )  # fmt: skip
  features = StepFeatures(
    promises=not sequential, guard=not sequential, no_repeat=16, visibility="live", attention=case.attention
  )
  it = Interpreter(model, vocabulary, limits, features)
  it.params = params
  most = (case.pool // 2 - limits.margin) // case.width
  steps = min(FLAGS.steps, most) // case.steps_per_look * case.steps_per_look
  if steps < 1:
    raise ValueError(
      f"a pool of {case.pool} is too small for {case.steps_per_look} steps of {case.width} rows"
    )
  timer = segment_timer(it, max(case.branches, 1), case.pool, steps)
  nbytes = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
  pool = 2 * config.n_layers * config.n_kv_heads * config.head_dim * case.pool * jnp.dtype(dtype).itemsize
  return timer, nbytes(params) - nbytes(params["embed"]) + pool


_PARAMETERS: dict[str, Any] = {}


def _parameters(dtype: str, model, vocabulary) -> Any:
  """Those of one format at a time are kept."""
  if dtype not in _PARAMETERS:
    _PARAMETERS.clear()
    _PARAMETERS[dtype] = random_parameters(model, vocabulary)
  return _PARAMETERS[dtype]


def copies_to_host(measure: Callable[[], float]) -> int | None:
  """Device-to-host copies in a profile of one segment; None where the profile has no accelerator."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      measure()
    found = sorted(Path(folder).rglob("*.xplane.pb"))
    planes = [p for f in found for p in jax.profiler.ProfileData.from_file(str(f)).planes]
  on_device = [p for p in planes if p.name.startswith("/device:")]
  events = [e.name for p in on_device for line in p.lines for e in line.events]
  return sum("MemcpyD2H" in name for name in events) if events else None


def measure_steps(source: str, *, tiny: bool) -> dict[str, Any]:
  """Figures by case, and the device's. Formats are measured one after the other: not all fit the memory."""
  bandwidth = bandwidth_timer(64 if tiny else 2048)
  kernel = {"gpu": "gpu", "tpu": "tpu"}.get(jax.default_backend(), "interpret" if tiny else "")
  found: list[dict[str, Any]] = []
  rates = []
  every = list(cases(kernel, tiny=tiny))
  for dtype in dict.fromkeys(c.dtype for c in every):
    timers = {}
    for case in (c for c in every if c.dtype == dtype):
      print(f"compiling {case} …", file=sys.stderr, flush=True)
      timers[case] = step_timer(case, source)
    seconds: dict[Case, list[float]] = {case: [] for case in timers}
    for _ in range(FLAGS.rounds):
      rates.append(bandwidth())
      for case, (measure, _) in timers.items():
        seconds[case].append(measure())
    for case, (measure, needed) in timers.items():
      row = dataclasses.asdict(case) | {"seconds": statistics.median(seconds[case]), "bytes": needed}
      if case.branches == 8 and case.steps_per_look > 1 and case.attention == "xla":
        row["copies_to_host"] = copies_to_host(measure)
      found.append(row)
  return {
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "model": source,
    "command_buffers": FLAGS.command_buffers,
    "bandwidth": statistics.median(rates),
    "steps": found,
  }


def show(runs: list[dict[str, Any]]) -> None:
  """One table of what this module and `train.benchmark` have written."""
  table = Table("what", "ms", "of bandwidth", "to 8 branches", "wall over theoretical", "copies to host")
  for run in runs:
    if "bandwidth" in run:
      _show_steps(table, run)
      continue
    causal = {(f["length"], f["kind"]): f["seconds"] for f in run["attention"] if f["mask"] == "causal"}
    for f in run["attention"]:
      base = causal[f["length"], f["kind"]]
      name = f"attention, {f['length']:,} tokens, {f['kind']}, {f['mask']}"
      table.add_row(name, f"{1e3 * f['seconds']:.2f}", f"{f['seconds'] / base:.2f} of causal", "", "", "")
    for f in run["steps"]:
      mfu = "" if f["mfu"] is None else f"MFU {100 * f['mfu']:.0f} %"
      table.add_row(f"training step, {f['step']}", f"{1e3 * f['seconds']:.1f}", mfu, "", "", "")
  console = rich.console.Console()
  (console if console.is_terminal else rich.console.Console(width=WIDTH)).print(table)


def _show_steps(table: Table, run: dict[str, Any]) -> None:
  rows, bandwidth = run["steps"], run["bandwidth"]
  usual = lambda r, branches, of: (r["branches"], r["dtype"], r["pool"], r["steps_per_look"], r["attention"]) == (
    branches, of["dtype"], of["pool"], of["steps_per_look"], of["attention"]
  )  # fmt: skip
  how = ", command buffers" if run["command_buffers"] else ""
  table.add_row(f"{run['device']}, jax {run['jax']}{how}: {bandwidth / 1e9:,.0f} GB/s", "", "", "", "", "")
  for r in rows:
    name = f"{r['branches']} of {max(ROWS, r['branches'])} branches"
    if r["branches"] == 0:
      name = "one thread, one row" if r["narrow"] else f"one thread, {ROWS} rows"
    name += f", {r['dtype']}, pool {r['pool']}, {r['steps_per_look']} a look, {r['attention']}"
    eight = next((x["seconds"] for x in rows if usual(x, 8, r)), None)
    one = min((x["seconds"] for x in rows if usual(x, 0, r)), default=None)
    table.add_row(
      name,
      f"{1e3 * r['seconds']:.3f}",
      f"{r['bytes'] / bandwidth / r['seconds']:.2f}",
      f"{r['seconds'] / eight:.2f}" if eight else "",
      f"{one / r['seconds']:.2f}" if one and r["branches"] == 8 else "",
      "" if r.get("copies_to_host") is None else str(r["copies_to_host"]),
    )


def main(argv: list[str]) -> None:
  del argv
  if FLAGS.show:
    show([json.loads(Path(name).read_text()) for name in FLAGS.show])
    return
  if FLAGS.command_buffers:
    offer_loops_to_command_buffers()
  set_matmul_precision("bfloat16")
  run = measure_steps(FLAGS.model, tiny=FLAGS.tiny)
  show([run])
  if FLAGS.json:
    write_atomic(Path(FLAGS.json), json.dumps(run, indent=2))


def define_flags() -> None:
  flags.DEFINE_string(
    "model", "configs/paper/gemma_7b.json", "an architecture: a config.json, or a model's name"
  )
  flags.DEFINE_bool("tiny", False, "a few small programs, to try the script anywhere")
  flags.DEFINE_bool("command_buffers", False, "GPU: offer the loop of steps to CUDA graphs")
  flags.DEFINE_integer("steps", 64, "decode steps in a measurement, at most")
  flags.DEFINE_integer("rounds", 5, "measurements; medians are reported")
  flags.DEFINE_string("json", None, "write the figures to this file too")
  flags.DEFINE_list("show", [], "print the table of these files, and measure nothing")


if __name__ == "__main__":
  define_flags()
  app.run(main)
