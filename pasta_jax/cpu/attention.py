"""Attention of decode steps on CPU: a pool in bfloat16 is read once for all branches of a step, up to the last entry
that one of them sees.

The pool is taken in chunks of fixed size. Each chunk gives every row (branch and group) of a key-value head a peak, a
sum and a context; the chunks' are then combined in their order, so that a row's result has the same bits whatever
branches are beside it, however large the pool and however many threads there are.

Letters are those of `decode.attention`: B requests, each with a pool; W branches of a pool; K, G, H, P; R = W x G rows.
"""

import math

from numba import njit

from pasta_jax.cpu import handler as H
from pasta_jax.cpu.memory import (
  add_atomic,
  allocate,
  fill,
  free,
  load,
  load_bfloat,
  load_float,
  load_int16,
  prefetch,
  store,
  store_float,
  store_int16,
  symbol,
  text,
)
from pasta_jax.cpu.panels import PANEL, put
from pasta_jax.cpu.products import add_bfloat16
from pasta_jax.cpu.rows import LOWEST, begin, dot, highest, mix, round_to, weigh
from pasta_jax.cpu.vectors import BFLOAT16, PAIRS

NAME = "pasta_jax_cpu_attention"
TASK = "pasta_jax_cpu_attention_task"
CHUNK = 128  # entries
_BLOCK = 16  # rows of keys that are read together
_LINE = 64  # bytes
_X = 2 if PAIRS else 4  # bytes of a number of x in `panels.multiply`
_KEYS, _VALUES, _MASK, _QUERIES, _KEY, _VALUE, _OUT, _CAP, _PARTS, _LEFT = (H.JOB + 8 * i for i in range(10))
_WIDTH, _HEADS, _GROUPS, _SIZE, _ENTRIES = (H.JOB + 80 + 8 * i for i in range(5))
_ROOM = 15 * 8


@njit
def _capped(x, cap):
  return cap * math.tanh(x / cap) if cap != 0 else x


@njit
def _seen(mask, entries, width, first, count):
  """Entries of a chunk up to the last one that a branch sees, rounded up to whole panels; 0: none sees any."""
  last = 0
  for w in range(width):
    row = mask + w * entries + first
    i = count - 8
    while i >= last and load(row + i) == 0:
      i -= 8
    last = max(last, i + 8)
  return -(-last // PANEL) * PANEL


@njit
def _chunk(job, place, chunk, space):
  """Peak, sum and context of every row of key-value head `place` (of all requests) over one chunk."""
  heads, groups, size = load(job + _HEADS), load(job + _GROUPS), load(job + _SIZE)
  width, entries = load(job + _WIDTH), load(job + _ENTRIES)
  request, head, rows = place // heads, place % heads, width * groups
  first = chunk * CHUNK
  mask = load(job + _MASK) + request * width * entries
  chunks = -(-entries // CHUNK)
  part = load(job + _PARTS) + 4 * (place * chunks + chunk) * rows * (size + 2)
  count = _seen(mask, entries, width, first, min(CHUNK, entries - first))
  if count == 0:
    for r in range(rows):
      store_float(part + 4 * r * (size + 2), LOWEST)
      store_float(part + 4 * r * (size + 2) + 4, 0.0)
    return
  panels = count // PANEL
  x = space  # queries, then weights
  weights = x + _X * rows * size
  sums = weights + _X * rows * CHUNK
  scores = sums + 4 * rows * CHUNK
  for r in range(rows):
    query = (
      load(job + _QUERIES)
      + 2 * (((request * width + r // groups) * heads + head) * groups + r % groups) * size
    )
    for i in range(size):
      if PAIRS:
        store_int16(x + 2 * (r * size + i), load_int16(query + 2 * i))
      else:
        store_float(x + 4 * (r * size + i), load_bfloat(query + 2 * i))
  keys = load(job + _KEYS) + 2 * (place * size * entries + first)
  fill(sums, 4 * panels * rows * PANEL)
  for i in range(0, size, _BLOCK):
    for p in range(panels):
      where = keys + 2 * (i * entries + p * PANEL)
      add_bfloat16(
        rows,
        x + _X * i,
        _X * size,
        where,
        2 * entries,
        sums + 4 * p * rows * PANEL,
        min(_BLOCK, size - i),
      )
  for p in range(panels):
    for r in range(rows):
      put(BFLOAT16, sums + 4 * (p * rows + r) * PANEL, 0, scores + 4 * (r * CHUNK + p * PANEL))
  cap = load_float(load(job + _CAP))
  for r in range(rows):
    row, see = scores + 4 * r * CHUNK, mask + (r // groups) * entries + first
    if cap != 0:
      for i in range(count):
        store_float(row + 4 * i, _capped(load_float(row + 4 * i), cap))
    peak = highest(row, see, count)
    store_float(part + 4 * r * (size + 2), peak)
    store_float(part + 4 * r * (size + 2) + 4, weigh(row, see, count, peak, weights + _X * r * CHUNK))
  values = load(job + _VALUES) + 2 * (place * entries + first) * size
  for column in range(0, size, PANEL):
    fill(sums, 4 * rows * PANEL)
    add_bfloat16(rows, weights, _X * CHUNK, values + 2 * column, 2 * size, sums, count)
    for r in range(rows):
      put(BFLOAT16, sums + 4 * r * PANEL, 0, part + 4 * (r * (size + 2) + 2 + column))


@njit
def _combine(job, place, context):
  """The context of every row of a key-value head: its chunks and its own token. `context` has room for one, float32."""
  heads, groups, size = load(job + _HEADS), load(job + _GROUPS), load(job + _SIZE)
  width, entries = load(job + _WIDTH), load(job + _ENTRIES)
  request, head, rows = place // heads, place % heads, width * groups
  chunks = -(-entries // CHUNK)
  parts = load(job + _PARTS) + 4 * place * chunks * rows * (size + 2)
  cap = load_float(load(job + _CAP))
  for r in range(rows):
    token = (request * width + r // groups) * heads + head
    row = token * groups + r % groups
    query, key = load(job + _QUERIES) + 2 * row * size, load(job + _KEY) + 2 * token * size
    value, out = load(job + _VALUE) + 2 * token * size, load(job + _OUT) + 2 * row * size
    own = _capped(dot(query, key, size), cap)
    peak = own
    for c in range(chunks):
      peak = max(peak, load_float(parts + 4 * (c * rows + r) * (size + 2)))
    total = math.exp(own - peak)
    begin(value, context, size, total)
    for c in range(chunks):
      part = parts + 4 * (c * rows + r) * (size + 2)
      weight = load_float(part + 4)
      if weight > 0:
        shrink = math.exp(load_float(part) - peak)
        total += shrink * weight
        mix(part + 8, context, size, shrink)
    round_to(context, out, size, 1.0 / total)


@njit
def _fetch(job, tile):
  """Starts to read what a tile needs: rows of keys lie far from each other, where no core looks ahead by itself."""
  heads, size, entries = load(job + _HEADS), load(job + _SIZE), load(job + _ENTRIES)
  chunks = -(-entries // CHUNK)
  place, first = tile // chunks, tile % chunks * CHUNK
  width = load(job + _WIDTH)
  mask = load(job + _MASK) + place // heads * width * entries
  count = _seen(mask, entries, width, first, min(CHUNK, entries - first))
  keys, values = load(job + _KEYS) + 2 * (place * size * entries + first), load(job + _VALUES)
  for i in range(size):
    for at in range(0, 2 * count, _LINE):
      prefetch(keys + 2 * i * entries + at)
  values += 2 * (place * entries + first) * size
  for at in range(0, 2 * count * size, _LINE):
    prefetch(values + at)


@njit
def run_tiles(job):
  """Computes tiles, a chunk of a key-value head each, until none is left."""
  tile = H.next_tile(job)
  if tile < 0:
    return
  rows, size = load(job + _WIDTH) * load(job + _GROUPS), load(job + _SIZE)
  chunks = -(-load(job + _ENTRIES) // CHUNK)
  space = allocate(max(rows * (_X * (size + CHUNK) + 8 * CHUNK), 4 * size))
  _fetch(job, tile)
  while tile >= 0:
    following = H.next_tile(job)
    if following >= 0:
      _fetch(job, following)
    place = tile // chunks
    _chunk(job, place, tile % chunks, space)
    if add_atomic(load(job + _LEFT) + 8 * place, -1) == 1:
      _combine(job, place, space)
    H.tile_done(job)
    tile = following
  free(space)


@njit
def task(job):
  """For a thread of XLA's pool."""
  run_tiles(job)
  H.leave(job)


@njit
def attention(frame):
  """The handler: keys [B, K, H, P], values [B, K, P, H], mask [B, W, P], queries [B, W, K, G, H], key and value of the
  token itself [B, W, K, H] and the soft cap [1], to [B, W, K, G, H] bfloat16."""
  if H.introduces(frame):
    return 0
  keys, values, mask, queries = (
    H.argument(frame, 0),
    H.argument(frame, 1),
    H.argument(frame, 2),
    H.argument(frame, 3),
  )
  key, value, cap, out = H.argument(frame, 4), H.argument(frame, 5), H.argument(frame, 6), H.result(frame, 0)
  for buffer in (keys, values, queries, key, value):
    if H.dtype(buffer) != H.BF16:
      return H.error(frame, text("attention on CPU has operands of other dtypes"))
  if H.dtype(mask) != H.PRED or H.dtype(cap) != H.F32 or H.dtype(out) != H.BF16:
    return H.error(frame, text("attention on CPU has operands of other dtypes"))
  requests, heads, size, entries = H.dim(keys, 0), H.dim(keys, 1), H.dim(keys, 2), H.dim(keys, 3)
  width, groups = H.dim(queries, 1), H.dim(queries, 3)
  tokens = requests * width * heads * size
  if (
    size % PANEL != 0 or entries % PANEL != 0 or H.size(values) != H.size(keys)
    or H.size(mask) != requests * width * entries or H.size(queries) != tokens * groups
    or H.size(out) != tokens * groups or H.size(key) != tokens or H.size(value) != tokens
  ):  # fmt: skip
    return H.error(frame, text("attention on CPU has operands of other shapes"))
  chunks, places = -(-entries // CHUNK), requests * heads
  parts = allocate(4 * places * chunks * width * groups * (size + 2) + 8 * places)
  left = parts + 4 * places * chunks * width * groups * (size + 2)
  for place in range(places):
    store(left + 8 * place, chunks)
  job = H.new_job(places * chunks, _ROOM)
  store(job + _KEYS, H.data(keys))
  store(job + _VALUES, H.data(values))
  store(job + _MASK, H.data(mask))
  store(job + _QUERIES, H.data(queries))
  store(job + _KEY, H.data(key))
  store(job + _VALUE, H.data(value))
  store(job + _OUT, H.data(out))
  store(job + _CAP, H.data(cap))
  store(job + _PARTS, parts)
  store(job + _LEFT, left)
  store(job + _WIDTH, width)
  store(job + _HEADS, heads)
  store(job + _GROUPS, groups)
  store(job + _SIZE, size)
  store(job + _ENTRIES, entries)
  H.share(frame, job, symbol(TASK), min(H.threads(frame), places * chunks) - 1)
  run_tiles(job)
  H.wait(job)
  H.leave(job)
  free(parts)
  return 0
