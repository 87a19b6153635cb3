"""`dtype=auto`: the precision in which this machine multiplies fastest, measured once and kept in the cache folder.

On GPU and TPU it is bfloat16. On CPU it is what takes less time, of bfloat16 and float32:

decode  products of a decode step, one after another, of one branch and of eight, with matrices that lie in memory: the
        sum of both times
train   one product of many rows, with its backward pass

`resolve` puts the answer into a mode's settings before anything else reads them: whatever a run writes names it.
"""

import contextlib
import hashlib
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pasta_jax.config import Config, with_changes
from pasta_jax.config.sections import AUTO, DTYPES
from pasta_jax.cpu import programs
from pasta_jax.decode.settings import narrowest
from pasta_jax.model.products import PRODUCTS, matmul, resolve_kernels
from pasta_jax.model.sharding import local_mesh
from pasta_jax.utils import distributed
from pasta_jax.utils.environment import cache_folder, cores, processor
from pasta_jax.utils.files import write_json_atomic
from pasta_jax.utils.json_io import flat, read_json
from pasta_jax.utils.typed import checked

ON_ACCELERATORS = "bfloat16"
_WIDTH, _HIDDEN = 576, 1536  # of SmolLM2-135M: its largest matrix in decoding is [576, 2, 1536]
_MATRICES = 24  # 85 MB in bfloat16: more than most caches keep
_BRANCHES = (1, 8)
_TOKENS = 768  # rows of training's product
_REPEATS = 3


def resolve(config: Config, section: str, before: Path | None = None) -> Config:
  """The settings, with a precision in place of `auto` in a section that has a `dtype`.

  `before` is the file of settings that an earlier run leaves, config.json or one beside its rows: a run that is resumed
  keeps its precision. Every process of several calls this; the first one's answer counts. Raises ValueError as
  `resolve_kernels` and `local_mesh`.
  """
  if getattr(config, section).dtype != AUTO:
    return config
  chosen = distributed.from_first(lambda: _of_run(before, section) or choose(config, section))
  return with_changes(config, {f"{section}.dtype": chosen})


def on_accelerators(config: Config) -> Config:
  """The settings for a TPU or GPU that need not be here."""
  sections = [s for s in ("decode", "train", "preference") if getattr(config, s).dtype == AUTO]
  return with_changes(config, {f"{s}.dtype": ON_ACCELERATORS for s in sections})


def _of_run(settings: Path | None, section: str) -> str | None:
  """What the earlier run had, as far as `auto` may choose it; None if there was none."""
  try:
    found = flat(read_json(settings)).get(f"{section}.dtype") if settings else None
  except (OSError, ValueError):
    return None
  return found if found in DTYPES else None


def choose(config: Config, section: str) -> str:
  """What `auto` in a section stands for on this machine. Raises ValueError as `resolve`."""
  if section != "decode":
    return fastest("train")
  mesh = local_mesh(vars(config.mesh))
  return fastest("decode", resolve_kernels(config.decode.kernels, "bfloat16", mesh))


def fastest(task: str, kernels: str = "xla") -> str:
  """The precision of a task, "decode" (by these kernels of `model.products`) or "train": "bfloat16" or "float32"."""
  if jax.default_backend() != "cpu":
    return ON_ACCELERATORS
  path, key = cache_folder() / "precision.json", _key(task, kernels)
  known = _measured(path)
  if set(DTYPES) <= known.get(key, {}).keys():
    seconds = known[key]
  else:
    seconds = measure(task, kernels)
    with contextlib.suppress(OSError):
      path.parent.mkdir(parents=True, exist_ok=True)
      write_json_atomic(path, known | {key: seconds}, shared=True)
  return "bfloat16" if seconds["bfloat16"] <= seconds["float32"] else "float32"


def _measured(path: Path) -> dict[str, dict[str, float]]:
  """Seconds by dtype of everything that was measured before; {} if the file cannot be read or has other content."""
  try:
    return checked(dict[str, dict[str, float]], read_json(path), str(path))
  except (OSError, ValueError):
    return {}


def _key(task: str, kernels: str) -> str:
  """Names everything that a measurement depends on."""
  name, features = processor()
  optimised = not jax.config.read("jax_disable_most_optimizations")
  ours = programs.sources() if kernels == "numba" else ""
  compiled = f"{features}; {os.environ.get('XLA_FLAGS', '')}; {optimised}; {ours}"
  digest = hashlib.sha256(compiled.encode()).hexdigest()[:12]
  return f"{task}, {kernels}, {name}, {cores()} cores, jax {jax.__version__}, {digest}"


def measure(task: str, kernels: str, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
  """Seconds by dtype: of each program the median of runs that alternate, after one that compiles it; their sum where a
  dtype has several."""
  programs = {dtype: _decoding(dtype, kernels) if task == "decode" else _training(dtype) for dtype in DTYPES}
  runs = [(dtype, i, run) for dtype, of_dtype in programs.items() for i, run in enumerate(of_dtype)]
  taken: dict[tuple[str, int], list[float]] = {(dtype, i): [] for dtype, i, _ in runs}
  for _, _, run in runs:
    jax.block_until_ready(run())
  for _ in range(_REPEATS):
    for dtype, i, run in runs:
      started = clock()
      jax.block_until_ready(run())
      taken[dtype, i].append(clock() - started)
  return {
    dtype: sum(statistics.median(taken[dtype, i]) for i in range(len(programs[dtype]))) for dtype in DTYPES
  }


def _decoding(dtype: str, kernels: str) -> list[Callable[[], Any]]:
  """Products of a decode step, for each number of branches."""
  product = PRODUCTS[kernels]
  matrix = _random((_WIDTH, 2, _HIDDEN), dtype)
  matrices = [jnp.copy(matrix) for _ in range(_MATRICES)]

  @jax.jit
  def step(x, matrices):
    for matrix in matrices:  # each reads what the one before it wrote, as layers do
      y = jax.vmap(partial(product, kernel=matrix, scale=None))(x)
      x = y[:, 0, :_WIDTH].astype(dtype)
    return x

  rows = [max(n, narrowest(dtype, "cpu", kernels)) for n in _BRANCHES]
  return [partial(step, jnp.ones((n, _WIDTH), dtype), matrices) for n in rows]


def _training(dtype: str) -> list[Callable[[], Any]]:
  """A product of many rows, forward and backward."""

  @jax.jit
  def product(x, y):
    out, backward = jax.vjp(matmul, x, y)
    return backward(out)

  return [partial(product, _random((_TOKENS, _WIDTH), dtype), _random((_WIDTH, 2 * _HIDDEN), dtype))]


def _random(shape: tuple[int, ...], dtype: str) -> jax.Array:
  """Numbers whose products over `_WIDTH` stay as large as they are."""
  return jnp.array(np.random.default_rng(0).normal(size=shape, scale=_WIDTH**-0.5), dtype)
