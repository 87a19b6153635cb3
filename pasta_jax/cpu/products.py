"""The matrix products of decoding on CPU: few rows of bfloat16 with a matrix in bfloat16 or int8.

The matrix is read once, in the order in which it lies in memory and at the speed of memory. Threads share its columns,
in tiles; the sums of a tile stay in the cache of its core. A row's sums are those of the same numbers in the same order
whatever rows are beside it, so its result has the same bits.
"""


from numba import njit

from pasta_jax.cpu import handler as H
from pasta_jax.cpu.memory import (
  allocate,
  free,
  load,
  load_bfloat,
  store,
  store_float,
  symbol,
  text,
)
from pasta_jax.cpu.vectors import BFLOAT16, INT8, PAIRS, PANEL, multiply, put

NAME = "pasta_jax_cpu_product"
TASK = "pasta_jax_cpu_product_task"
_BLOCK = 16  # rows of the matrix that are read together
_GROUP = 32  # rows of x whose sums are in the cache together
_TILE = 12 * PANEL  # columns at most
_FORM, _X, _MATRIX, _SCALE, _OUT, _ROWS, _IN, _WIDTH, _TILE_AT = (H.JOB + 8 * i for i in range(9))


@njit
def add_rows(rows, form, x, x_stride, matrix, stride, sums, count):
  """`vectors.multiply` for any number of rows."""
  while rows > 0:
    if form == INT8:
      if rows >= 8:
        multiply(8, INT8, x, x_stride, matrix, stride, sums, count)
      elif rows >= 4:
        multiply(4, INT8, x, x_stride, matrix, stride, sums, count)
      elif rows >= 2:
        multiply(2, INT8, x, x_stride, matrix, stride, sums, count)
      else:
        multiply(1, INT8, x, x_stride, matrix, stride, sums, count)
    elif rows >= 8:
      multiply(8, BFLOAT16, x, x_stride, matrix, stride, sums, count)
    elif rows >= 4:
      multiply(4, BFLOAT16, x, x_stride, matrix, stride, sums, count)
    elif rows >= 2:
      multiply(2, BFLOAT16, x, x_stride, matrix, stride, sums, count)
    else:
      multiply(1, BFLOAT16, x, x_stride, matrix, stride, sums, count)
    done = 8 if rows >= 8 else 4 if rows >= 4 else 2 if rows >= 2 else 1
    rows, x, sums = rows - done, x + done * x_stride, sums + 4 * PANEL * done


@njit
def _tile(job, tile, x, x_stride, sums):
  """Computes the columns of one tile."""
  form, rows, n, width = load(job + _FORM), load(job + _ROWS), load(job + _IN), load(job + _WIDTH)
  columns = load(job + _TILE_AT)
  first, last = tile * columns, min((tile + 1) * columns, width)
  size = 1 if form == INT8 else 2
  stride = size * width
  panels = -(-(last - first) // PANEL)
  for start in range(0, rows, _GROUP):
    group = min(_GROUP, rows - start)
    for i in range(panels * group * PANEL):
      store_float(sums + 4 * i, 0.0)
    for row in range(0, n, _BLOCK):
      count = min(_BLOCK, n - row)
      for p in range(panels):
        # The last panel of the matrix may overlap the one before it: both give the same numbers there.
        column = min(first + p * PANEL, width - PANEL)
        where = load(job + _MATRIX) + row * stride + column * size
        at = x + start * x_stride + row * (2 if PAIRS else 4)
        add_rows(group, form, at, x_stride, where, stride, sums + 4 * p * group * PANEL, count)
    for p in range(panels):
      column = min(first + p * PANEL, width - PANEL)
      for r in range(group):
        where = load(job + _OUT) + 4 * ((start + r) * width + column)
        scale = load(job + _SCALE) + 4 * column
        if form == INT8:
          put(INT8, sums + 4 * (p * group + r) * PANEL, scale, where)
        else:
          put(BFLOAT16, sums + 4 * (p * group + r) * PANEL, scale, where)


@njit
def run_tiles(job):
  """Computes tiles until none is left."""
  tile = H.next_tile(job)
  if tile < 0:
    return
  rows, n = load(job + _ROWS), load(job + _IN)
  x, x_stride = load(job + _X), 2 * n
  room = 4 * (min(rows, _GROUP) * (_TILE + PANEL))
  sums = allocate(room + (0 if PAIRS else 4 * rows * n))
  if not PAIRS:  # in float32, and once for all tiles
    whole = sums + room
    for i in range(rows * n):
      store_float(whole + 4 * i, load_bfloat(x + 2 * i))
    x, x_stride = whole, 4 * n
  while tile >= 0:
    _tile(job, tile, x, x_stride, sums)
    H.tile_done(job)
    tile = H.next_tile(job)
  free(sums)


@njit
def task(job):
  """For a thread of XLA's pool."""
  run_tiles(job)
  H.leave(job)


@njit
def product(frame):
  """The handler: x [rows, in], matrix [in, …] and scales [… or 0], to [rows, …]."""
  if H.introduces(frame):
    return 0
  x, matrix, scale, out = H.argument(frame, 0), H.argument(frame, 1), H.argument(frame, 2), H.result(frame, 0)
  rows, n = H.dim(x, 0), H.dim(x, 1)
  form = INT8 if H.dtype(matrix) == H.INT8 else BFLOAT16
  width = H.size(matrix) // max(H.dim(matrix, 0), 1)
  if H.dtype(x) != H.BF16 or (form == BFLOAT16 and H.dtype(matrix) != H.BF16) or H.dtype(out) != H.F32:
    return H.error(frame, text("a product on CPU has operands of other dtypes"))
  if H.dim(matrix, 0) != n or n % 2 != 0 or width < PANEL or H.size(out) != rows * width:
    return H.error(frame, text("a product on CPU has operands of other shapes"))
  if form == INT8 and (H.dtype(scale) != H.F32 or H.size(scale) != width):
    return H.error(frame, text("a product on CPU needs a scale for each column of a matrix in 8 bits"))
  threads = H.threads(frame)
  # As many tiles as threads, or a multiple of it, of whole panels.
  tiles = threads * (-(-width // (threads * _TILE)))
  columns = PANEL * (-(-width // (tiles * PANEL)))
  tiles = -(-width // columns)
  job = H.new_job(tiles, 9 * 8)
  store(job + _FORM, form)
  store(job + _X, H.data(x))
  store(job + _MATRIX, H.data(matrix))
  store(job + _SCALE, H.data(scale))
  store(job + _OUT, H.data(out))
  store(job + _ROWS, rows)
  store(job + _IN, n)
  store(job + _WIDTH, width)
  store(job + _TILE_AT, columns)
  H.share(frame, job, symbol("pasta_jax_cpu_product_task"), min(threads, tiles) - 1)
  run_tiles(job)
  H.wait(job)
  H.leave(job)
  return 0
