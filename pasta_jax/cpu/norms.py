"""Root-mean-square normalisation of few rows, rounded to the operands of the product behind it."""

from numba import njit

from pasta_jax.cpu import handler as H
from pasta_jax.cpu.memory import load_float, text
from pasta_jax.cpu.rows import normalise
from pasta_jax.cpu.vectors import LANES

NAME = "pasta_jax_cpu_norm"


@njit
def norm(frame):
  """The handler: x [rows, D], scale [D] and epsilon [1], float32, to [rows, D] bfloat16."""
  if H.introduces(frame):
    return 0
  x, scale, epsilon, out = (
    H.argument(frame, 0),
    H.argument(frame, 1),
    H.argument(frame, 2),
    H.result(frame, 0),
  )
  if H.dtype(x) != H.F32 or H.dtype(scale) != H.F32 or H.dtype(epsilon) != H.F32 or H.dtype(out) != H.BF16:
    return H.error(frame, text("a normalisation on CPU has operands of other dtypes"))
  rows, width = H.dim(x, 0), H.dim(x, 1)
  if width % LANES != 0 or H.size(scale) != width or H.size(out) != rows * width:
    return H.error(frame, text("a normalisation on CPU has operands of other shapes"))
  for r in range(rows):
    normalise(
      H.data(x) + 4 * r * width,
      H.data(scale),
      H.data(out) + 2 * r * width,
      width,
      load_float(H.data(epsilon)),
    )
  return 0
