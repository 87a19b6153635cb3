"""Matrices in 8 bits for decoding: symmetric, with one float32 scale for each output channel.

    w[i, o] ≈ scale[o] * q[i, o],  scale[o] = max |w[:, o]| / (the largest number of the format)

int8 is round-to-nearest in -127 to 127, so that |w - scale * q| <= scale / 2. fp8 is float8_e4m3fn, four significant
bits: small weights of a channel have smaller errors than in int8, large ones larger errors.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pasta_jax.weights.arrays import BLOCK, aligned_empty


class Format(NamedTuple):
  """How a matrix is stored."""

  dtype: Any
  largest: float  # finite number


FORMATS = {  # the names are those of `config.sections.WEIGHTS`
  "int8": Format(np.dtype(np.int8), 127.0),
  "fp8": Format(np.dtype(ml_dtypes.float8_e4m3fn), 448.0),
}


def quantise(kernel: np.ndarray, out: np.ndarray) -> np.ndarray:
  """Fills `out` [in, out], of a dtype in FORMATS, from a kernel [in, out]; returns the scales [out] float32.

  It takes little memory of its own: a block of rows at a time is converted.
  """
  name = next(name for name, f in FORMATS.items() if f.dtype == out.dtype)
  step = max(1, BLOCK // max(kernel[0].size, 1))
  blocks = [slice(start, start + step) for start in range(0, len(kernel), step)]
  largest = np.zeros(kernel.shape[1:], np.float32)
  for rows in blocks:
    np.maximum(largest, np.abs(kernel[rows]).max(axis=0), out=largest)
  scale = aligned_empty(largest.shape, np.float32)
  # Not 0 where a channel is: a row of a vocabulary may be.
  np.maximum(largest / np.float32(FORMATS[name].largest), np.finfo(np.float32).tiny, out=scale)
  for rows in blocks:
    scaled = kernel[rows] / scale
    out[rows] = np.rint(scaled) if name == "int8" else scaled
  return scale


def check_weights(weights: str) -> None:
  """Raises ValueError, one line, for a format that is unknown, or whose numbers this machine's XLA cannot convert."""
  if not weights:
    return
  if weights not in FORMATS:
    raise ValueError(f"unknown format of weights {weights!r}: choose one of {', '.join(FORMATS)}")
  every = np.arange(256, dtype=np.uint8).view(FORMATS[weights].dtype)
  try:
    works = np.array_equal(jax.jit(_as_bfloat16)(every), every.astype(np.float32), equal_nan=True)
  except Exception:  # XLA says no in several ways
    works = False
  if not works:
    raise ValueError(
      f"dtype {weights}: XLA on {jax.default_backend()} does not convert {every.dtype}: choose int8 or bfloat16"
    )


def _as_bfloat16(x: jax.Array) -> jax.Array:
  """What a product does with a kernel; float32 holds the result exactly."""
  return x.astype(jnp.bfloat16).astype(jnp.float32)
