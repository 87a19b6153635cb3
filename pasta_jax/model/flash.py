"""Flash attention (Dao 2023) where keys are hidden from intervals of queries: Pallas kernels for TPU and GPU.

Time and memory go by the tiles in which anything is seen (`model.tiles`): an empty one is neither fetched nor
computed, a full one not masked. Three sweeps share one driver: context and log-sum-exp; cotangent of queries;
of keys and values. On TPU what a tile meets is the grid's last axis, and sums stay in VMEM; on GPU a program
loops over it.

Letters: B rows, N query heads, K key-value heads, G = N / K, T tokens, H width of a head, n tiles in a row, R
columns of `keys`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from pasta_jax.model import tiles
from pasta_jax.model.config import ModelConfig
from pasta_jax.model.transformer import Local

_LANES = 128


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is fixed when a kernel is compiled."""

  platform: str  # tpu or gpu
  size: int  # tokens of a tile
  softcap: float
  windowed: bool
  interpret: bool = False


class Tables(NamedTuple):
  """What the rows of a batch let be seen; made once for all layers. Every array has the axis B first.

  Schedules are those of layers without a window, and of local ones, which are the same where there is none.
  """

  keys: (
    jax.Array
  )  # [B, 1, T, R] int32: starts and stops of a key's intervals, and, with windows, its position
  queries: jax.Array  # [B, 1, 1, T] int32 positions
  by_query: tuple[tiles.Schedule, tiles.Schedule]
  by_key: tuple[tiles.Schedule, tiles.Schedule]


def tile_size(platform: str, length: int, width: int) -> int:
  """Tokens of a tile: whole lanes on TPU, large ones in long rows; what registers hold on GPU, by a head's
  width."""
  if platform == "gpu":
    return 64 if width <= 128 else 32
  return next((size for size in (_LANES, 2 * _LANES) if length <= 8 * size), 4 * _LANES)


def make_tables(masked_intervals: jax.Array, positions: jax.Array, window: int, size: int) -> Tables:
  """Tables of rows with `masked_intervals` [B, T, L, 2] and `positions` [B, T], T filled up to whole tiles: no query
  sees what is added."""
  rows, length = positions.shape
  padding = -length % size
  masked_intervals = jnp.pad(masked_intervals, ((0, 0), (0, padding), (0, 0), (0, 0)))
  positions = jnp.pad(positions, ((0, 0), (0, padding)))
  columns = masked_intervals.reshape(rows, 1, length + padding, -1)
  if window:
    columns = jnp.concatenate([columns, positions[:, None, :, None]], axis=-1)
  kinds = tuple(
    tiles.tile_kinds(masked_intervals, positions, w, size) for w in ((0, window) if window else (0,))
  )
  by_query = tuple(tiles.schedule(k) for k in kinds)
  by_key = tuple(tiles.schedule(k.swapaxes(1, 2)) for k in kinds)
  return Tables(columns, positions[:, None, None], (by_query[0], by_query[-1]), (by_key[0], by_key[-1]))


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  local: Local,
  tables: Tables,
  *,
  settings: Settings,
  config: ModelConfig,
) -> jax.Array:
  """q [B, T, K, G, H], k and v [B, T, K, H] of one dtype -> context [B, T, K, G, H] float32."""
  rows, length, heads, groups, width = q.shape
  padding = tables.queries.shape[-1] - length
  filled = (
    1 << (width - 1).bit_length() if settings.platform == "gpu" else width
  )  # Triton's shapes are powers of two
  fill = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, filled - width)))
  q = fill(q.transpose(0, 2, 3, 1, 4).reshape(rows, heads * groups, length, width))
  k, v = (fill(x.transpose(0, 2, 1, 3)) for x in (k, v))
  by_query, by_key = (
    jax.tree.map(partial(jnp.where, local), theirs, ours) if settings.windowed else ours
    for ours, theirs in (tables.by_query, tables.by_key)
  )
  window = jnp.where(local, config.window, tiles.FAR).astype(jnp.int32).reshape(1)
  context = _flash(settings, q, k, v, tables.keys, tables.queries, by_query, by_key, window)
  context = context[..., :length, :width].reshape(rows, heads, groups, length, width)
  return context.transpose(0, 3, 1, 2, 4)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(settings, q, k, v, keys, queries, by_query, by_key, window):
  """q [B, N, T, H], k and v [B, K, T, H] -> [B, N, T, H] float32."""
  return _forward(settings, q, k, v, keys, queries, by_query, by_key, window)[0]


def _forward(settings: Settings, q, k, v, keys, queries, by_query, by_key, window):
  width = q.shape[-1]

  def step(carry, at, meets, full, window, fixed, moving):
    q, queries = fixed
    k, v_t, keys = moving
    scores, _ = _scores(settings, q, k, queries, keys, at, meets, full, window)
    return tiles.forward_step(carry, scores, v_t())

  context, lse = _sweep(
    settings,
    step,
    partial(tiles.forward_start, settings.size, width),
    tiles.forward_end,
    fixed=[_Operand(q), _Operand(queries, across=True)],
    moving=[
      _Operand(k, of_keys=True),
      _Operand(_turned(v), of_keys=True, across=True),
      _Operand(keys, of_keys=True),
    ],
    outputs=[_Output(width, across=True), _Output(1, across=True)],
    heads=q.shape[1],
    inner=1,
    groups=q.shape[1] // k.shape[1],
    schedule=by_query,
    window=window,
  )
  context, lse = checkpoint_name(_turned(context), "attention"), checkpoint_name(lse, "attention")
  return context, (q, k, v, keys, queries, by_query, by_key, window, context, lse)


def _backward(settings: Settings, saved, d_context):
  q, k, v, keys, queries, by_query, by_key, window, context, lse = saved
  width, groups, size = q.shape[-1], q.shape[1] // k.shape[1], settings.size
  d_context = d_context.astype(q.dtype)
  delta = jnp.sum(context * d_context.astype(jnp.float32), axis=-1)[:, :, None]
  of_queries = [
    _Operand(q),
    _Operand(d_context),
    _Operand(lse, across=True),
    _Operand(delta, across=True),
    _Operand(queries, across=True),
  ]
  of_keys = [_Operand(x, of_keys=True) for x in (k, v, keys)]

  def weights(q, d_context, lse, delta, queries, k, v, keys, at_query, at_key, full, window):
    scores, raw = _scores(settings, q, k, queries, keys, at_query, at_key, full, window)
    return tiles.backward(scores, raw, v(), d_context(), lse(), delta(), settings.softcap)

  def query_step(carry, at, meets, full, window, fixed, moving):
    *of_keys, k_t = moving
    _, d_scores = weights(*fixed, *of_keys, at, meets, full, window)
    return (carry[0] + tiles.dot(k_t(), d_scores.astype(k_t().dtype)),)

  def key_step(carry, at, meets, full, window, fixed, moving):
    w, d_scores = weights(*moving, *fixed, meets, at, full, window)
    q, d_context = moving[0](), moving[1]()
    return carry[0] + tiles.dot(d_scores.astype(q.dtype), q), carry[1] + tiles.dot(
      w.astype(q.dtype), d_context
    )

  zeros = lambda *shapes: tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
  (d_q,) = _sweep(
    settings,
    query_step,
    partial(zeros, (width, size)),
    lambda carry: carry,
    fixed=of_queries,
    moving=[*of_keys, _Operand(_turned(k), of_keys=True, across=True)],
    outputs=[_Output(width, across=True)],
    heads=q.shape[1],
    inner=1,
    groups=groups,
    schedule=by_query,
    window=window,
  )
  d_k, d_v = _sweep(
    settings,
    key_step,
    partial(zeros, (size, width), (size, width)),
    lambda carry: carry,
    fixed=of_keys,
    moving=of_queries,
    outputs=[_Output(width), _Output(width)],
    heads=k.shape[1],
    inner=groups,
    groups=groups,
    schedule=by_key,
    window=window,
  )
  return (
    _turned(d_q).astype(q.dtype),
    d_k.astype(k.dtype),
    d_v.astype(v.dtype),
    *jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), (keys, queries, by_query, by_key, window)),
  )


_flash.defvjp(_forward, _backward)


def _turned(x: jax.Array) -> jax.Array:
  return jnp.swapaxes(x, -1, -2)


def _scores(settings: Settings, q, k, queries, keys, at_query, at_key, full, window):
  """`tiles.tile_scores` of what a sweep's step is given."""
  levels = keys.ref.shape[-1] // 2
  near = settings.windowed
  return tiles.tile_scores(
    q(),
    k(),
    tiles.Queries(at_query, queries() if near else None),
    tiles.Keys(
      at_key,
      [(keys.column(2 * i), keys.column(2 * i + 1)) for i in range(levels)],
      keys.column(2 * levels) if near else None,
    ),
    full,
    window,
    settings.softcap,
  )


class _Operand(NamedTuple):
  """An array [B, heads, T, X], or [B, heads, X, T] if tokens go `across`; of one head if it is every
  head's."""

  array: jax.Array
  of_keys: bool = False
  across: bool = False


class _Output(NamedTuple):
  """[B, heads, T, width], or [B, heads, width, T], float32."""

  width: int
  across: bool = False


class _Tile:
  """A tile of an operand inside a kernel: `()` reads it, `column(i)` one column [size, 1]."""

  def __init__(self, ref, size: int, at=None, head=None, across: bool = False, lanes: bool = True):
    self.ref, self._size, self._across, self._lanes = ref, size, across, lanes
    self._at = None if at is None else pl.ds(at, size)
    self._head = () if head is None else (head,)

  def __call__(self) -> jax.Array:
    if self._at is None:
      return self.ref[...]
    return self.ref[(*self._head, *((slice(None), self._at) if self._across else (self._at, slice(None))))]

  def column(self, i: int) -> jax.Array:
    if self._lanes:  # TPU: vectors have two axes
      return self.ref[:, i : i + 1]
    return self.ref[(*self._head, pl.ds(0, self._size) if self._at is None else self._at, i)][:, None]


Step = Callable[..., tuple]


def _sweep(
  settings: Settings,
  step: Step,
  start: Callable[[], tuple],
  end: Callable[[tuple], tuple],
  *,
  fixed: Sequence[_Operand],
  moving: Sequence[_Operand],
  outputs: Sequence[_Output],
  heads: int,
  inner: int,
  groups: int,
  schedule: tiles.Schedule,
  window: jax.Array,
) -> list[jax.Array]:
  """For each row, each of `heads` and each tile of `fixed`: `step` over the tiles of `moving` that it meets,
  in `inner` heads one after another, from `start()`; `end` makes the outputs of the last carry.

  `step(carry, at, meets, full, window, fixed, moving)` gets the tiles' first indices, and tiles to read.
  """
  size = settings.size
  rows, n = schedule.visits.shape
  shape = lambda o: (rows, heads, o.width, n * size) if o.across else (rows, heads, n * size, o.width)
  shapes = [jax.ShapeDtypeStruct(shape(o), jnp.float32) for o in outputs]
  run = _on_tpu if settings.platform == "tpu" else _on_gpu
  return run(
    settings,
    step,
    start,
    end,
    fixed,
    moving,
    outputs,
    shapes,
    (rows, heads, n, inner),
    groups,
    schedule,
    window,
  )


def _head(operand: _Operand, h, g, inner: int, groups: int):
  """Which head of an operand the head `h` of a sweep reads, at the `g`-th of its inner ones."""
  if operand.array.shape[1] == 1:
    return 0
  if operand.of_keys:
    return h if inner > 1 or groups == 1 else jax.lax.div(h, groups)
  return h * inner + g


def _on_tpu(settings, step, start, end, fixed, moving, outputs, shapes, grid, groups, schedule, window):
  """Grid (B, heads, tiles, inner heads, tiles met); the schedule is prefetched: what is not met is not
  fetched."""
  size, (_, _, n, inner) = settings.size, grid
  visit = lambda b, o, s, order, count: order[(b * n + o) * n + jnp.minimum(s, count[b * n + o] - 1)]

  def block(operand: _Operand, moves: bool) -> pl.BlockSpec:
    def index(b, h, o, g, s, order, count, window):
      del window
      head, tile = _head(operand, h, g, inner, groups), visit(b, o, s, order, count) >> 1 if moves else o
      return (b, head, 0, tile) if operand.across else (b, head, tile, 0)

    wide = operand.array.shape[-2 if operand.across else -1]
    return pl.BlockSpec((None, None, *((wide, size) if operand.across else (size, wide))), index)

  def kernel(order, count, window, *refs):
    ours, theirs = refs[: len(fixed)], refs[len(fixed) : len(fixed) + len(moving)]
    out, carry = (
      refs[len(fixed) + len(moving) :][: len(outputs)],
      refs[len(fixed) + len(moving) + len(outputs) :],
    )
    b, o, g, s = (pl.program_id(axis) for axis in (0, 2, 3, 4))

    @pl.when((g == 0) & (s == 0))
    def _():
      for ref, value in zip(carry, start()):
        ref[...] = value

    @pl.when(s < count[b * n + o])
    def _():
      met = visit(b, o, s, order, count)
      new = step(
        tuple(ref[...] for ref in carry),
        o * size,
        (met >> 1) * size,
        (met & 1) == 1,
        window[0],
        [_Tile(ref, size) for ref in ours],
        [_Tile(ref, size) for ref in theirs],
      )
      for ref, value in zip(carry, new):
        ref[...] = value

    @pl.when((g == inner - 1) & (s == pl.num_programs(4) - 1))
    def _():
      for ref, value in zip(out, end(tuple(ref[...] for ref in carry))):
        ref[...] = value

  def out_block(output: _Output) -> pl.BlockSpec:
    if output.across:
      return pl.BlockSpec((None, None, output.width, size), lambda b, h, o, g, s, *_: (b, h, 0, o))
    return pl.BlockSpec((None, None, size, output.width), lambda b, h, o, g, s, *_: (b, h, o, 0))

  carry = [pltpu.VMEM(x.shape, x.dtype) for x in jax.eval_shape(start)]
  call = pl.pallas_call(
    kernel,
    out_shape=shapes,
    interpret=settings.interpret,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(*grid, jnp.max(schedule.visits)),
      in_specs=[*(block(o, False) for o in fixed), *(block(o, True) for o in moving)],
      out_specs=[out_block(o) for o in outputs],
      scratch_shapes=carry,
    ),
    compiler_params=pltpu.CompilerParams(dimension_semantics=(*["parallel"] * 3, "arbitrary", "arbitrary")),
  )
  return call(
    schedule.order.reshape(-1), schedule.visits.reshape(-1), window, *(o.array for o in (*fixed, *moving))
  )


def _on_gpu(settings, step, start, end, fixed, moving, outputs, shapes, grid, groups, schedule, window):
  """Grid (B, heads, tiles); each program loops over what its tile meets."""
  size, (_, _, n, inner) = settings.size, grid

  def block(operand: _Operand, moves: bool) -> pl.BlockSpec:
    _, heads, *last = operand.array.shape
    if not moves:
      shape = (last[0], size) if operand.across else (size, last[1])
      place = lambda b, h, o: (
        b,
        _head(operand, h, 0, inner, groups),
        *((0, o) if operand.across else (o, 0)),
      )
      return pl.BlockSpec((None, None, *shape), place)
    if operand.of_keys or heads == 1:
      return pl.BlockSpec((None, None, *last), lambda b, h, o: (b, _head(operand, h, 0, inner, groups), 0, 0))
    return pl.BlockSpec((None, inner, *last), lambda b, h, o: (b, h, 0, 0))

  def kernel(order, count, window, *refs):
    ours = [_Tile(ref, size, lanes=False) for ref in refs[: len(fixed)]]
    theirs, out = refs[len(fixed) : len(fixed) + len(moving)], refs[len(fixed) + len(moving) :]
    at, far = pl.program_id(2) * size, window[0]

    def over(g: int, carry):
      def body(s, carry):
        met = order[s]
        place = (met >> 1) * size
        tiles_met = [
          _Tile(ref, size, place, g if len(ref.shape) == 3 else None, operand.across, lanes=False)
          for ref, operand in zip(theirs, moving)
        ]
        return step(carry, at, place, (met & 1) == 1, far, ours, tiles_met)

      return jax.lax.fori_loop(0, count[0], body, carry)

    carry = start()
    for g in range(inner):
      carry = over(g, carry)
    for ref, value in zip(out, end(carry)):
      ref[...] = value

  def out_block(output: _Output) -> pl.BlockSpec:
    if output.across:
      return pl.BlockSpec((None, None, output.width, size), lambda b, h, o: (b, h, 0, o))
    return pl.BlockSpec((None, None, size, output.width), lambda b, h, o: (b, h, o, 0))

  by_row = pl.BlockSpec((None, None, n), lambda b, h, o: (b, o, 0))
  call = pl.pallas_call(
    kernel,
    out_shape=shapes,
    grid=grid[:3],
    interpret=settings.interpret,
    in_specs=[
      by_row,
      pl.BlockSpec((None, 1), lambda b, h, o: (b, o)),
      pl.BlockSpec((1,), lambda b, h, o: (0,)),
      *(block(o, False) for o in fixed),
      *(block(o, True) for o in moving),
    ],
    out_specs=[out_block(o) for o in outputs],
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
  )
  return call(schedule.order, schedule.visits, window, *(o.array for o in (*fixed, *moving)))
