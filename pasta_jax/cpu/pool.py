"""New entries of the pools, written in place."""

from numba import njit

from pasta_jax.cpu import handler as H
from pasta_jax.cpu.memory import load_int16, load_int32, store_int16, text

NAME = "pasta_jax_cpu_append"


@njit
def append(frame):
  """The handler: keys [..., K, H, P] of every layer, values [..., K, P, H] of every layer, as many rows
  [..., W, K, H], how many entries are in use [...], anything, to the pools, which are the first arguments. The leading
  axis, if there is one, is that of requests."""
  if H.introduces(frame):
    return 0
  pools = H.results(frame)
  used = H.argument(frame, 2 * pools)
  for i in range(pools):
    pool, rows = H.result(frame, i), H.argument(frame, pools + i)
    lead = H.rank(pool) - 3
    requests = H.dim(pool, 0) if lead == 1 else 1
    width, heads, size = H.dim(rows, lead), H.dim(rows, lead + 1), H.dim(rows, lead + 2)
    keys = i < pools // 2
    entries = H.dim(pool, lead + (2 if keys else 1))
    if H.data(pool) != H.data(H.argument(frame, i)):
      return H.error(frame, text("XLA has copied a pool that should be written in place"))
    if (
      H.dtype(pool) != H.BF16 or H.dtype(rows) != H.BF16 or H.size(pool) != requests * heads * size * entries
    ):
      return H.error(frame, text("new entries on CPU have another shape or dtype than their pool"))
    for request in range(requests):
      first = load_int32(H.data(used) + 4 * request)
      if first < 0 or first + width > entries:
        return H.error(frame, text("new entries on CPU do not fit their pool"))
      for w in range(width):
        for head in range(heads):
          row = H.data(rows) + 2 * ((request * width + w) * heads + head) * size
          place = H.data(pool) + 2 * (request * heads + head) * size * entries
          for n in range(size):
            at = n * entries + first + w if keys else (first + w) * size + n
            store_int16(place + 2 * at, load_int16(row + 2 * n))
  return 0
