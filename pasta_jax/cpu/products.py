"""The matrix products of decoding on CPU: few rows of bfloat16 with a matrix in bfloat16 or int8.

The matrix is read once, in the order in which it lies in memory and at the speed of memory. Threads share its columns,
in tiles; the sums of a tile stay in the cache of its core. A row's sums are those of the same numbers in the same order
whatever rows are beside it, so its result has the same bits.
"""

from collections.abc import Callable, Sequence

from numba import njit

from pasta_jax.cpu import handler as H
from pasta_jax.cpu.memory import (
  allocate,
  fill,
  free,
  load,
  load_bfloat,
  load_int32,
  store,
  store_float,
  symbol,
  text,
)
from pasta_jax.cpu.panels import GELU, PANEL, ROWS, SILU, multiply, put, put_gated
from pasta_jax.cpu.vectors import BFLOAT16, INT8, PAIRS

NAME, GATED = "pasta_jax_cpu_product", "pasta_jax_cpu_gated_product"
TASK = "pasta_jax_cpu_product_task"
_BLOCK = 16  # rows of the matrix that are read together
_GROUP = 32  # rows of x whose sums are in the cache together
_TILE = 12 * PANEL  # columns at most
_FORM, _X, _MATRIX, _SCALE, _OUT, _ROWS, _IN, _WIDTH, _COLUMNS, _PARTS, _ACTIVATION = (
  H.JOB + 8 * i for i in range(11)
)


def _adder(form: int, sizes: Sequence[int]) -> Callable:
  """`panels.multiply` for any number of rows, by programs for these numbers of them, the largest first."""
  most, rest = sizes[0], _adder(form, sizes[1:]) if len(sizes) > 1 else None

  @njit
  def add(rows, x, x_stride, matrix, stride, sums, count):
    while rows >= most:
      multiply(most, form, x, x_stride, matrix, stride, sums, count)
      rows, x, sums = rows - most, x + most * x_stride, sums + 4 * PANEL * most
    if rest is not None:
      rest(rows, x, x_stride, matrix, stride, sums, count)

  return add


add_bfloat16, add_int8 = (_adder(form, ROWS) for form in (BFLOAT16, INT8))


@njit
def _put(job, form, parts, sums, apart, row, column):
  """Writes one row of a panel; the sums of a second part are `apart` bytes behind the first."""
  width, out, scale = load(job + _WIDTH), load(job + _OUT), load(job + _SCALE) + 4 * column
  if parts == 1:
    where = out + 4 * (row * width + column)
    if form == INT8:
      put(INT8, sums, scale, where)
    else:
      put(BFLOAT16, sums, scale, where)
    return
  where, up = out + 2 * (row * width + column), scale + 4 * width
  if form == INT8:
    if load(job + _ACTIVATION) == GELU:
      put_gated(INT8, GELU, sums, sums + apart, scale, up, where)
    else:
      put_gated(INT8, SILU, sums, sums + apart, scale, up, where)
  elif load(job + _ACTIVATION) == GELU:
    put_gated(BFLOAT16, GELU, sums, sums + apart, scale, up, where)
  else:
    put_gated(BFLOAT16, SILU, sums, sums + apart, scale, up, where)


@njit
def _tile(job, tile, sums, whole):
  """Computes the columns of one tile. There is room for the sums of a group of rows and, unless `PAIRS`, for the rows
  in float32."""
  form, rows, n, width = load(job + _FORM), load(job + _ROWS), load(job + _IN), load(job + _WIDTH)
  columns, parts = load(job + _COLUMNS), load(job + _PARTS)
  first, last = tile * columns, min((tile + 1) * columns, width)
  size = 1 if form == INT8 else 2
  stride = size * width * parts
  panels = -(-(last - first) // PANEL)
  for start in range(0, rows, _GROUP):
    group = min(_GROUP, rows - start)
    apart = 4 * panels * group * PANEL
    fill(sums, parts * apart)
    x, x_stride = load(job + _X) + 2 * start * n, 2 * n
    if not PAIRS:
      for i in range(group * n):
        store_float(whole + 4 * i, load_bfloat(x + 2 * i))
      x, x_stride = whole, 4 * n
    for row in range(0, n, _BLOCK):
      count = min(_BLOCK, n - row)
      at = x + row * (2 if PAIRS else 4)
      for part in range(parts):
        for p in range(panels):
          # The last panel of the matrix may overlap the one before it: both give the same numbers there.
          column = min(first + p * PANEL, width - PANEL) + part * width
          where = load(job + _MATRIX) + row * stride + column * size
          place = sums + part * apart + 4 * p * group * PANEL
          if form == INT8:
            add_int8(group, at, x_stride, where, stride, place, count)
          else:
            add_bfloat16(group, at, x_stride, where, stride, place, count)
    for p in range(panels):
      for r in range(group):
        place = sums + 4 * (p * group + r) * PANEL
        _put(job, form, parts, place, apart, start + r, min(first + p * PANEL, width - PANEL))


@njit
def run_tiles(job):
  """Computes tiles until none is left."""
  tile = H.next_tile(job)
  if tile < 0:
    return
  group = min(load(job + _ROWS), _GROUP)
  room = 4 * group * load(job + _PARTS) * (load(job + _COLUMNS) + PANEL)
  sums = allocate(room + (0 if PAIRS else 4 * group * load(job + _IN)))
  while tile >= 0:
    _tile(job, tile, sums, sums + room)
    H.tile_done(job)
    tile = H.next_tile(job)
  free(sums)


@njit
def task(job):
  """For a thread of XLA's pool."""
  run_tiles(job)
  H.leave(job)


@njit
def _run(frame, parts):
  """x [rows, in] times matrix [in, …], which has `parts` parts."""
  x, matrix, scale, out = H.argument(frame, 0), H.argument(frame, 1), H.argument(frame, 2), H.result(frame, 0)
  rows, n = H.dim(x, 0), H.dim(x, 1)
  form = INT8 if H.dtype(matrix) == H.INT8 else BFLOAT16
  every = H.size(matrix) // max(H.dim(matrix, 0), 1)  # columns of all parts
  width = every // parts
  if H.dtype(x) != H.BF16 or (form == BFLOAT16 and H.dtype(matrix) != H.BF16):
    return H.error(frame, text("a product on CPU has operands of other dtypes"))
  if H.dtype(out) != (H.F32 if parts == 1 else H.BF16):
    return H.error(frame, text("a product on CPU has a result of another dtype"))
  if H.dim(matrix, 0) != n or n % 2 != 0 or width < PANEL or H.size(out) != rows * width:
    return H.error(frame, text("a product on CPU has operands of other shapes"))
  if parts == 2 and (H.dtype(H.argument(frame, 3)) != H.INT32 or H.size(H.argument(frame, 3)) != 1):
    return H.error(frame, text("a gated product on CPU needs the number of its activation"))
  if form == INT8 and (H.dtype(scale) != H.F32 or H.size(scale) != every):
    return H.error(frame, text("a product on CPU needs a scale for each column of a matrix in 8 bits"))
  threads = H.threads(frame)
  # As many tiles as threads, or a multiple of it, of whole panels.
  tiles = threads * (-(-width * parts // (threads * _TILE)))
  columns = PANEL * (-(-width // (tiles * PANEL)))
  tiles = -(-width // columns)
  job = H.new_job(tiles, 11 * 8)
  store(job + _FORM, form)
  store(job + _X, H.data(x))
  store(job + _MATRIX, H.data(matrix))
  store(job + _SCALE, H.data(scale))
  store(job + _OUT, H.data(out))
  store(job + _ROWS, rows)
  store(job + _IN, n)
  store(job + _WIDTH, width)
  store(job + _COLUMNS, columns)
  store(job + _PARTS, parts)
  store(job + _ACTIVATION, load_int32(H.data(H.argument(frame, 3))) if parts == 2 else SILU)
  H.share(frame, job, symbol(TASK), min(threads, tiles) - 1)
  run_tiles(job)
  H.wait(job)
  H.leave(job)
  return 0


@njit
def product(frame):
  """The handler: x [rows, in], matrix [in, …] and scales [… or 0], to [rows, …] float32."""
  return 0 if H.introduces(frame) else _run(frame, 1)


@njit
def gated(frame):
  """The handler: x [rows, in], matrix [in, 2, F], scales [2, F or 0] and the activation, int32 [1], to the activation
  of the first part times the second, [rows, F] bfloat16."""
  return 0 if H.introduces(frame) else _run(frame, 2)
