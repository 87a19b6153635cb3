"""New entries of the pools, written in place."""

from numba import njit

from pasta_jax.cpu import handler as H
from pasta_jax.cpu.memory import load, load_int16, load_int32, store, store_int16, symbol, text

NAME = "pasta_jax_cpu_append"
TASK = "pasta_jax_cpu_append_task"
_POOLS, _USED = H.JOB, H.JOB + 8
_PLACES = H.JOB + 16  # of every pool: its data, its rows' data
_REQUESTS, _WIDTH, _HEADS, _SIZE, _ENTRIES = 0, 1, 2, 3, 4  # numbers behind the places


@njit
def _number(job, i):
  return load(job + _PLACES + 16 * load(job + _POOLS) + 8 * i)


@njit
def run_tiles(job):
  """Writes the rows of pools, a tile each, until none is left."""
  pools, used = load(job + _POOLS), load(job + _USED)
  requests, width, heads = _number(job, _REQUESTS), _number(job, _WIDTH), _number(job, _HEADS)
  size, entries = _number(job, _SIZE), _number(job, _ENTRIES)
  tile = H.next_tile(job)
  while tile >= 0:
    pool, rows = load(job + _PLACES + 16 * tile), load(job + _PLACES + 16 * tile + 8)
    keys = tile < pools // 2
    for request in range(requests):
      first = load_int32(used + 4 * request)
      for w in range(width):
        for head in range(heads):
          row = rows + 2 * ((request * width + w) * heads + head) * size
          place = pool + 2 * (request * heads + head) * size * entries
          for n in range(size):
            at = n * entries + first + w if keys else (first + w) * size + n
            store_int16(place + 2 * at, load_int16(row + 2 * n))
    H.tile_done(job)
    tile = H.next_tile(job)


@njit
def task(job):
  """For a thread of XLA's pool."""
  run_tiles(job)
  H.leave(job)


@njit
def append(frame):
  """The handler: keys [..., K, H, P] of every layer, values [..., K, P, H] of every layer, as many rows
  [..., W, K, H], how many entries are in use [...], anything, to the pools, which are the first arguments. The leading
  axis, if there is one, is that of requests."""
  if H.introduces(frame):
    return 0
  pools = H.results(frame)
  keys, rows, used = H.argument(frame, 0), H.argument(frame, pools), H.argument(frame, 2 * pools)
  lead = H.rank(keys) - 3
  requests = H.dim(keys, 0) if lead == 1 else 1
  heads, size, entries = H.dim(keys, lead), H.dim(keys, lead + 1), H.dim(keys, lead + 2)
  width = H.dim(rows, lead)
  for i in range(pools):
    pool, rows = H.result(frame, i), H.argument(frame, pools + i)
    if H.data(pool) != H.data(H.argument(frame, i)):
      return H.error(frame, text("XLA has copied a pool that should be written in place"))
    if H.dtype(pool) != H.BF16 or H.dtype(rows) != H.BF16:
      return H.error(frame, text("new entries on CPU have another dtype than bfloat16"))
    if H.size(pool) != requests * heads * size * entries or H.size(rows) != requests * width * heads * size:
      return H.error(frame, text("new entries on CPU have another shape than their pool"))
  if H.dtype(used) != H.INT32 or H.size(used) != requests:
    return H.error(frame, text("new entries on CPU need the number of entries in use of every request"))
  for request in range(requests):
    first = load_int32(H.data(used) + 4 * request)
    if first < 0 or first + width > entries:
      return H.error(frame, text("new entries on CPU do not fit their pool"))
  job = H.new_job(pools, 16 + 16 * pools + 5 * 8)
  store(job + _POOLS, pools)
  store(job + _USED, H.data(used))
  for i in range(pools):
    store(job + _PLACES + 16 * i, H.data(H.result(frame, i)))
    store(job + _PLACES + 16 * i + 8, H.data(H.argument(frame, pools + i)))
  numbers = job + _PLACES + 16 * pools
  store(numbers + 8 * _REQUESTS, requests)
  store(numbers + 8 * _WIDTH, width)
  store(numbers + 8 * _HEADS, heads)
  store(numbers + 8 * _SIZE, size)
  store(numbers + 8 * _ENTRIES, entries)
  H.share(frame, job, symbol(TASK), H.threads(frame) - 1)
  run_tiles(job)
  H.wait(job)
  H.leave(job)
  return 0
