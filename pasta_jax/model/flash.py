"""Flash attention (Dao 2023) for rows with a mask (`model.masks`): Pallas kernels for TPU and GPU.

Time and memory are proportional to the number of tiles that are not fully masked (`model.tiles`): an empty
tile is neither fetched nor computed, and a full one is not masked. Three sweeps share one driver: context and
log-sum-exp; cotangent of queries; cotangents of keys and values. On TPU the visited tiles are the grid's last
axis, and sums stay in VMEM; on GPU a program loops over them.

Letters: B rows, N query heads, K key-value heads, G = N / K, T tokens, H head width, n tiles in a row, R
columns of `TileTables.keys`.
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
from pasta_jax.model.attention import in_window
from pasta_jax.model.config import ModelConfig
from pasta_jax.model.masks import Intervals, Mask
from pasta_jax.model.transformer import Local

_LANES = 128


@dataclasses.dataclass(frozen=True)
class Settings:
  """Static parameters of a kernel."""

  platform: str  # "tpu" or "gpu"
  size: int  # tokens per tile
  softcap: float
  windowed: bool
  interpret: bool = False
  mask: type[Mask] = Intervals  # the rule of visibility


class TileTables(NamedTuple):
  """Visibility in the rows of a batch; made once for all layers. The first axis of every array is B.

  Schedules come in pairs: of global layers and of local layers. The two are the same in models without a
  window.
  """

  keys: jax.Array  # [B, 1, T, R] int32: the mask's columns, and positions in models with a window
  queries: jax.Array  # [B, 1, Q, T] int32: the mask's rows, and positions
  by_query: tuple[tiles.TileSchedule, tiles.TileSchedule]
  by_key: tuple[tiles.TileSchedule, tiles.TileSchedule]


def tile_size(platform: str, length: int, width: int) -> int:
  """Tokens per tile for rows of `length` tokens and heads of `width`: whole lanes on TPU, more in long rows;
  what fits into registers on GPU."""
  if platform == "gpu":
    return 64 if width <= 128 else 32
  return next((size for size in (_LANES, 2 * _LANES) if length <= 8 * size), 4 * _LANES)


def make_tables(mask: Mask, positions: jax.Array, window: int, size: int) -> TileTables:
  """The tables of rows with `positions` [B, T]. T is padded to whole tiles; no query sees the padding."""
  padding = -positions.shape[1] % size
  mask, positions = mask.padded(padding), jnp.pad(positions, ((0, 0), (0, padding)))
  columns = mask.columns
  if window:
    columns = jnp.concatenate([columns, positions[:, :, None]], axis=-1)
  of_queries = jnp.concatenate([mask.rows, positions[:, None]], axis=1)
  kinds = tuple(tiles.tile_kinds(mask, positions, w, size) for w in ((0, window) if window else (0,)))
  by_query = tuple(tiles.tile_schedule(k) for k in kinds)
  by_key = tuple(tiles.tile_schedule(k.swapaxes(1, 2)) for k in kinds)
  return TileTables(
    columns[:, None], of_queries[:, None], (by_query[0], by_query[-1]), (by_key[0], by_key[-1])
  )


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  local: Local,
  tables: TileTables,
  *,
  settings: Settings,
  config: ModelConfig,
) -> jax.Array:
  """Queries [B, T, K, G, H], keys and values [B, T, K, H], all of one dtype -> context [B, T, K, G, H]
  float32."""
  rows, length, heads, groups, width = q.shape
  padding = tables.queries.shape[-1] - length
  # Triton requires shapes that are powers of two.
  padded_width = 1 << (width - 1).bit_length() if settings.platform == "gpu" else width
  pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, padded_width - width)))
  q = pad(q.transpose(0, 2, 3, 1, 4).reshape(rows, heads * groups, length, width))
  k, v = (pad(x.transpose(0, 2, 1, 3)) for x in (k, v))
  by_query, by_key = (
    jax.tree.map(partial(jnp.where, local), of_local, of_global) if settings.windowed else of_global
    for of_global, of_local in (tables.by_query, tables.by_key)
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

  def step(carry, at, visited, full, window, fixed, moving):
    q, queries = fixed
    k, v_t, keys = moving
    scores, _ = _scores(settings, q, k, queries, keys, at, visited, full, window)
    return tiles.forward_step(carry, scores, v_t())

  context, lse = _sweep(
    settings,
    step,
    partial(tiles.forward_start, settings.size, width),
    tiles.forward_end,
    fixed=[_Operand(q), _Operand(queries, across=True)],
    moving=[
      _Operand(k, of_keys=True),
      _Operand(_transpose(v), of_keys=True, across=True),
      _Operand(keys, of_keys=True),
    ],
    outputs=[_Output(width, across=True), _Output(1, across=True)],
    heads=q.shape[1],
    inner=1,
    groups=q.shape[1] // k.shape[1],
    schedule=by_query,
    window=window,
  )
  context, lse = checkpoint_name(_transpose(context), "attention"), checkpoint_name(lse, "attention")
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

  def query_step(carry, at, visited, full, window, fixed, moving):
    *of_keys, k_t = moving
    _, d_scores = weights(*fixed, *of_keys, at, visited, full, window)
    return (carry[0] + tiles.dot(k_t(), d_scores.astype(k_t().dtype)),)

  def key_step(carry, at, visited, full, window, fixed, moving):
    w, d_scores = weights(*moving, *fixed, visited, at, full, window)
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
    moving=[*of_keys, _Operand(_transpose(k), of_keys=True, across=True)],
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
    _transpose(d_q).astype(q.dtype),
    d_k.astype(k.dtype),
    d_v.astype(v.dtype),
    *jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), (keys, queries, by_query, by_key, window)),
  )


_flash.defvjp(_forward, _backward)


def _transpose(x: jax.Array) -> jax.Array:
  return jnp.swapaxes(x, -1, -2)


def _scores(settings: Settings, q, k, queries, keys, at_query, at_key, full, window):
  """`tiles.tile_scores` of the tiles that a sweep's step gets."""
  windowed = settings.windowed
  own = queries.ref.shape[-2] - 1, keys.ref.shape[-1] - int(windowed)  # rows and columns of the mask
  rows, columns = [queries.row(i) for i in range(own[0])], [keys.column(i) for i in range(own[1])]
  positions = (queries.row(own[0]), keys.column(own[1])) if windowed else None

  def visible(q, k):
    seen = settings.mask.seen(q, k, rows, columns)
    return seen if positions is None else seen & in_window(*positions, window)

  return tiles.tile_scores(q(), k(), at_query, at_key, visible, full, settings.softcap)


class _Operand(NamedTuple):
  """An array [B, heads, T, X], or [B, heads, X, T] if `across`; with one head if all heads share it."""

  array: jax.Array
  of_keys: bool = False
  across: bool = False


class _Output(NamedTuple):
  """An array [B, heads, T, width], or [B, heads, width, T] if `across`; float32."""

  width: int
  across: bool = False


class _Tile:
  """A tile of an operand inside a kernel: a call reads it, `column(i)` reads one column [size, 1], `row(i)` one row
  [1, size] of an operand that is `across`."""

  def __init__(self, ref, size: int, at=None, head=None, across: bool = False, lanes: bool = True):
    self.ref, self._across, self._lanes = ref, across, lanes
    self._at = None if at is None else pl.ds(at, size)
    self._range = pl.ds(0, size) if self._at is None else self._at
    self._head = () if head is None else (head,)

  def __call__(self) -> jax.Array:
    if self._at is None:
      return self.ref[...]
    return self.ref[(*self._head, *((slice(None), self._at) if self._across else (self._at, slice(None))))]

  def column(self, i: int) -> jax.Array:
    if self._lanes:  # on TPU vectors have two axes
      return self.ref[:, i : i + 1]
    return self.ref[(*self._head, self._range, i)][:, None]

  def row(self, i: int) -> jax.Array:
    if self._lanes:
      return self.ref[i : i + 1, :]
    return self.ref[(*self._head, i, self._range)][None, :]


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
  schedule: tiles.TileSchedule,
  window: jax.Array,
) -> list[jax.Array]:
  """For each row, each of `heads` and each tile of the `fixed` operands: starts with the carry `start()`,
  applies `step` to every tile of the `moving` operands that the schedule visits, in `inner` heads one after
  another, and returns `end(carry)` as outputs.

  `step(carry, at, visited, full, window, fixed, moving)` gets the first index of the fixed and of the visited
  tile, whether nothing is masked, and the tiles to read.
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
  """Which head of an operand head `h` of a sweep reads in its inner head `g`."""
  if operand.array.shape[1] == 1:
    return 0
  if operand.of_keys:
    return h if inner > 1 or groups == 1 else jax.lax.div(h, groups)
  return h * inner + g


def _on_tpu(settings, step, start, end, fixed, moving, outputs, shapes, grid, groups, schedule, window):
  """Grid (B, heads, tiles, inner heads, visited tiles). The schedule is prefetched, so that only visited
  tiles are fetched."""
  size, (_, _, n, inner) = settings.size, grid
  visit = lambda b, o, s, order, count: order[(b * n + o) * n + jnp.minimum(s, count[b * n + o] - 1)]

  def block(operand: _Operand, moving: bool) -> pl.BlockSpec:
    def index(b, h, o, g, s, order, count, window):
      del window
      head, tile = _head(operand, h, g, inner, groups), visit(b, o, s, order, count) >> 1 if moving else o
      return (b, head, 0, tile) if operand.across else (b, head, tile, 0)

    width = operand.array.shape[-2 if operand.across else -1]
    return pl.BlockSpec((None, None, *((width, size) if operand.across else (size, width))), index)

  def kernel(order, count, window, *refs):
    fixed_refs, moving_refs = refs[: len(fixed)], refs[len(fixed) : len(fixed) + len(moving)]
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
      visited = visit(b, o, s, order, count)
      new = step(
        tuple(ref[...] for ref in carry),
        o * size,
        (visited >> 1) * size,
        (visited & 1) == 1,
        window[0],
        [_Tile(ref, size) for ref in fixed_refs],
        [_Tile(ref, size) for ref in moving_refs],
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
  """Grid (B, heads, tiles); each program loops over the tiles that its own tile visits."""
  size, (_, _, n, inner) = settings.size, grid

  def block(operand: _Operand, moving: bool) -> pl.BlockSpec:
    _, heads, *last = operand.array.shape
    if not moving:
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
    fixed_tiles = [_Tile(ref, size, lanes=False) for ref in refs[: len(fixed)]]
    moving_refs, out = refs[len(fixed) : len(fixed) + len(moving)], refs[len(fixed) + len(moving) :]
    at, window_size = pl.program_id(2) * size, window[0]

    def sweep_head(g: int, carry):
      def body(s, carry):
        visited = order[s]
        place = (visited >> 1) * size
        moving_tiles = [
          _Tile(ref, size, place, g if len(ref.shape) == 3 else None, operand.across, lanes=False)
          for ref, operand in zip(moving_refs, moving)
        ]
        return step(carry, at, place, (visited & 1) == 1, window_size, fixed_tiles, moving_tiles)

      return jax.lax.fori_loop(0, count[0], body, carry)

    carry = start()
    for g in range(inner):
      carry = sweep_head(g, carry)
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
