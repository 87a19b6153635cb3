"""The compiled handlers of this package, known to XLA, and whether they work on this machine."""

import functools
import hashlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np


@functools.cache
def unusable() -> str:
  """Why the kernels cannot be used here, in one line; "" if they can. The first call compiles them, or loads them from
  numba's cache, and compares their results with NumPy's."""
  try:
    import numba  # noqa: F401
  except ModuleNotFoundError:
    return "numba is not installed (pip install numba)"
  except Exception as error:  # with another NumPy than it knows, for example
    return f"numba cannot be imported: {str(error).splitlines()[0]}"
  from pasta_jax.cpu import handler

  if reason := handler.mismatch():
    return reason
  try:
    _register()
    return _check()
  except Exception as error:  # LLVM and XLA say no in many ways
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"they cannot be compiled or run here: {next((s for s in lines if 'Error' in s), lines[0])}"


def require() -> None:
  """Makes the kernels known to XLA. Raises RuntimeError, one line, if they cannot be used."""
  if reason := unusable():
    raise RuntimeError(f"the kernels for CPU cannot be used: {reason}")


def sources() -> str:
  """A name for what is compiled: the text of this package, jaxlib and numba. numba's cache would not notice a change in
  another file."""
  here = Path(__file__).parent
  text = b"".join(p.read_bytes() for p in sorted(here.glob("*.py")))
  return f"{hashlib.sha256(text).hexdigest()}, jaxlib {version('jaxlib')}, numba {version('numba')}"


def _compiled(signature: Any) -> Callable:
  """Makes a function a C function, which numba keeps in its cache unless there is no folder that can be written."""
  from numba import cfunc

  def compiled(function: Callable) -> Any:
    try:
      return cfunc(signature, cache=True)(function)
    except RuntimeError:
      return cfunc(signature)(function)

  return compiled


@functools.cache
def _register() -> None:
  from llvmlite import binding
  from numba import types

  from pasta_jax.cpu import attention, norms, pool, products

  # What a function closes over is a part of its name in the cache, and must be the same in the next process: text is,
  # another compiled function is not, so that these are written out.
  name = sources()
  is_task, is_handler = _compiled(types.void(types.int64)), _compiled(types.int64(types.int64))

  @is_task
  def product_task(job):
    products.task(job) if name else None

  @is_task
  def attention_task(job):
    attention.task(job) if name else None

  @is_task
  def append_task(job):
    pool.task(job) if name else None

  # Before the handlers, which name them, are compiled or loaded.
  binding.add_symbol(products.TASK, product_task.address)
  binding.add_symbol(attention.TASK, attention_task.address)
  binding.add_symbol(pool.TASK, append_task.address)

  @is_handler
  def product(frame):
    return products.product(frame) if name else 0

  @is_handler
  def gated(frame):
    return products.gated(frame) if name else 0

  @is_handler
  def attend(frame):
    return attention.attention(frame) if name else 0

  @is_handler
  def append(frame):
    return pool.append(frame) if name else 0

  @is_handler
  def norm(frame):
    return norms.norm(frame) if name else 0

  handlers = {
    products.NAME: product, products.GATED: gated, attention.NAME: attend, pool.NAME: append, norms.NAME: norm,
  }  # fmt: skip
  _kept.extend((product_task, attention_task, append_task, *handlers.values()))
  for target, handler in handlers.items():
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler.ctypes), platform="cpu")


_kept: list = []  # compiled code lives as long as its objects


def _check() -> str:
  """Compares one call of each kernel and format with NumPy."""
  from pasta_jax.cpu.calls import ACTIVATIONS, append, attend, gated, multiply, normalise

  rng, where = np.random.default_rng(0), jax.local_devices(backend="cpu")[0]
  normal = lambda *shape: np.asarray(rng.normal(size=shape), ml_dtypes.bfloat16)
  wide = lambda x: np.asarray(x, np.float64)
  # float32 sums, or results that are rounded to bfloat16.
  differ = lambda a, b, bound: not np.abs(wide(a) - b).max() <= bound * np.abs(b).max()
  x, none = normal(11, 48), np.zeros(0, np.float32)
  with jax.default_device(where), jax.ensure_compile_time_eval():  # at once, also while a program is traced
    matrix = normal(48, 200)
    if differ(multiply(x, matrix, none), wide(x) @ wide(matrix), 1e-4):
      return "their product in bfloat16 is not NumPy's"
    matrix = rng.integers(-127, 128, (48, 200)).astype(np.int8)
    scale = rng.uniform(0.5, 1, 200).astype(np.float32)
    if differ(multiply(x, matrix, scale), wide(x) @ wide(matrix) * scale, 1e-4):
      return "their product in int8 is not NumPy's"
    gate, up = np.split(wide(x) @ wide(matrix) * scale / 256, 2, axis=1)
    halves, silu = scale.reshape(2, 100) / 256, np.full(1, ACTIVATIONS["silu"], np.int32)
    if differ(gated(x, matrix.reshape(48, 2, 100), halves, silu), gate / (1 + np.exp(-gate)) * up, 1e-2):
      return "their gated product is not NumPy's"
    rows, ones = wide(x).astype(np.float32), np.ones(48, np.float32)
    expected = rows / np.sqrt(np.mean(rows**2, axis=1, keepdims=True) + 0.5)
    if differ(normalise(rows, ones, np.full(1, 0.5, np.float32)), expected, 1e-2):
      return "their normalisation is not NumPy's"
    keys, values, q = normal(1, 1, 64, 320), normal(1, 1, 320, 64), normal(1, 1, 1, 2, 64)
    k, v, mask = normal(1, 1, 1, 64), normal(1, 1, 1, 64), rng.random((1, 1, 320)) < 0.5
    q = np.asarray(wide(q) / 8, ml_dtypes.bfloat16)
    scores = wide(q)[0, 0, 0] @ np.concatenate([wide(keys)[0, 0], wide(k)[0, 0].T], axis=1)
    weights = np.exp(scores - scores.max()) * np.append(mask[0, 0], True)
    context = (
      weights @ np.concatenate([wide(values)[0, 0], wide(v)[0, 0]]) / weights.sum(axis=1, keepdims=True)
    )
    if differ(attend(keys, values, mask, q, k, v, 0.0)[0, 0, 0], context, 1e-2):
      return "their attention is not NumPy's"
    new = normal(5, 1, 64)
    pools = append(
      [jnp.asarray(keys[0]), jnp.asarray(values[0])], [new, new], np.int32(9), np.zeros(5, np.int32)
    )
    keys[0, :, :, 9:14], values[0, :, 9:14] = new.transpose(1, 2, 0), new.transpose(1, 0, 2)
    if not all(np.array_equal(wide(a), wide(b)) for a, b in zip(pools, (keys[0], values[0]))):
      return "they write new entries of a pool to other places"
  return ""
