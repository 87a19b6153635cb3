"""Attention of decode steps as Pallas kernels that split the pool (flash decoding, Dao et al. 2023).

The queries of all branches and groups of a key-value head are the rows of one matrix, so that every pool entry
is read once for all branches of a step. Entries after the last visible one are not read, nor are splits that no
branch sees. On TPU the splits are the grid's last axis, and sums stay in VMEM; on GPU every split is a program
of its own, and a second kernel combines their results.

Letters: B requests, each with a pool; W branches of a pool; P, K, G and H as in `decode.attention`; U blocks of
N branches each; R = G x N rows, row r is branch r mod N of the block; C splits of the pool.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from pasta_jax.decode.pooled import batched, pool_attend
from pasta_jax.model.attention import MASK_VALUE
from pasta_jax.model.tiles import dot
from pasta_jax.model.transformer import Attend, soft_cap

_ROWS = {"tpu": 256, "gpu": 64}  # at most, unless one branch has more groups
_WORD = 32  # branches in a word of visibility
_LANES = 128
_TPU_SPLIT = 512  # pool entries
_TPU_BLOCK = 2**19  # bytes of keys that a grid step reads, if one head has fewer
_GPU_TILE = 2**15  # bytes of keys that a program reads at once in bfloat16
_GPU_PROGRAMS = 512  # at most, a few for each multiprocessor
_GPU_SPLITS = 64  # at most: what fits into registers when they are combined


def flash_decode(
  platform: str,
  visible: jax.Array,
  window_mask: jax.Array | None,
  softcap: float,
  *,
  interpret: bool = False,
) -> Attend:
  """`attend` of one branch, as `decode.attention.xla_decode` documents it, by the kernel for `platform`, "tpu" or
  "gpu". `interpret` runs it in plain JAX on any machine, slowly."""
  return pool_attend(_kernel(platform, softcap, interpret), visible, window_mask)


@functools.cache
def _kernel(platform: str, softcap: float, interpret: bool) -> Callable:
  return batched(functools.partial(_on_tpu if platform == "tpu" else _on_gpu, softcap, interpret))


def _block(platform: str, branches: int, groups: int) -> int:
  """N, a power of two: branches of one block."""
  fits = max(1, _ROWS[platform] // groups)
  return min(pl.next_power_of_2(branches), 1 << (fits.bit_length() - 1), _WORD)


def _visibility(mask: jax.Array, block: int, split: int) -> jax.Array:
  """[B, U, C, split] int32 from [B, W, P]: bit i says whether branch i of the block sees the entry. The padding is
  not visible."""
  pools, branches, entries = mask.shape
  mask = jnp.pad(mask, ((0, 0), (0, -branches % block), (0, -entries % split)))
  mask = mask.reshape(pools, -1, block, mask.shape[-1] // split, split)
  bits = jnp.arange(block, dtype=jnp.int32)[:, None, None]
  return jnp.sum(mask.astype(jnp.int32) << bits, axis=2, dtype=jnp.int32)


def _start(q: jax.Array, k: jax.Array, v: jax.Array, counts, softcap: float):
  """Running maximum [R, 1], sum [R, 1] and context [R, H] after the rows' own tokens, all [R, H]. They are masked
  where `counts` is False: one split alone counts them."""
  q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  own = soft_cap(jnp.sum(q * k, axis=1, keepdims=True), softcap)
  return jnp.where(counts, own, MASK_VALUE), jnp.ones_like(own), v


def _add(carry, q: jax.Array, keys: jax.Array, values: jax.Array, bits: jax.Array, block: int, softcap: float,
         across: bool = False):  # fmt: skip
  """The carry after some pool entries: keys [H, S], values [S, H] or, if they are `across`, [H, S], and visibility
  [1, S]."""
  peak, total, context = carry
  scores = soft_cap(dot(q, keys), softcap)
  branch = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0) & (block - 1)
  seen = ((bits >> branch) & 1) == 1
  new = jnp.maximum(peak, jnp.max(jnp.where(seen, scores, MASK_VALUE), axis=1, keepdims=True))
  weights, shrink = jnp.where(seen, jnp.exp(scores - new), 0.0), jnp.exp(peak - new)
  return (
    new,
    total * shrink + jnp.sum(weights, axis=1, keepdims=True),
    context * shrink + dot(weights.astype(values.dtype), values, (1, int(across))),
  )


def _on_tpu(softcap: float, interpret: bool, keys, values, mask, q, k, v):
  """Grid (B, blocks of heads, U, splits up to the last visible one). A split that nobody sees is not fetched: its
  step names the visible split before it, which is already there, or the first one."""
  pools, heads, width, entries = keys.shape
  branches, groups = q.shape[1], q.shape[3]
  block, split = _block("tpu", branches, groups), min(entries, _TPU_SPLIT)
  fits = max(1, _TPU_BLOCK // (width * split * keys.dtype.itemsize))
  together = next(n for n in range(min(fits, heads), 0, -1) if heads % n == 0)
  # Narrow values are stored with the entries as lanes. XLA would transpose them for a kernel that takes [P, H].
  across = width % _LANES > 0
  values = jnp.swapaxes(values, 2, 3) if across else values
  bits = _visibility(mask, block, split)
  blocks, splits, rows = bits.shape[1], bits.shape[2], groups * block
  visible = jnp.any(bits != 0, axis=-1)
  first = jnp.argmax(visible, axis=2, keepdims=True).astype(jnp.int32)
  place = jax.lax.cummax(jnp.where(visible, jnp.arange(splits, dtype=jnp.int32), first), axis=2)

  def of_rows(x):
    """[B, W, K, G or 1, H] -> [B, K, U, R, H]."""
    x = jnp.pad(x, ((0, 0), (0, -branches % block), (0, 0), (0, 0), (0, 0))).astype(keys.dtype)
    x = x.reshape(pools, blocks, block, heads, -1, width).transpose(0, 3, 1, 4, 2, 5)
    return jnp.broadcast_to(x, (*x.shape[:3], groups, *x.shape[4:])).reshape(
      pools, heads, blocks, rows, width
    )

  def kernel(place, q, k, v, keys, values, bits, out, *carry):
    b, u, c = (pl.program_id(axis) for axis in (0, 2, 3))

    @pl.when(c == 0)
    def _():
      for h in range(together):
        for ref, value in zip(carry, _start(q[h], k[h], v[h], True, softcap)):
          ref[h] = value

    @pl.when(place[(b * blocks + u) * splits + c] == c)
    def _():
      for h in range(together):
        read = values[h]
        if entries % split:  # what is read after the pool's end may be NaN
          at = c * split + jax.lax.broadcasted_iota(jnp.int32, read.shape, int(across))
          read = jnp.where(at < entries, read, 0)
        before = tuple(ref[h] for ref in carry)
        after = _add(before, q[h], keys[h], read, bits[...], block, softcap, across)
        for ref, value in zip(carry, after):
          ref[h] = value

    @pl.when(c == pl.num_programs(3) - 1)
    def _():
      for h in range(together):
        out[h] = (carry[2][h] / carry[1][h]).astype(out.dtype)

  row_block = pl.BlockSpec((None, together, None, rows, width), lambda b, h, u, c, place: (b, h, u, 0, 0))

  def pool_block(across: bool) -> pl.BlockSpec:
    def index(b, h, u, c, place):
      at = place[(b * blocks + u) * splits + c]
      return (b, h, 0, at) if across else (b, h, at, 0)

    return pl.BlockSpec((None, together, *((width, split) if across else (split, width))), index)

  def bits_index(b, h, u, c, place):
    return b, u, 0, place[(b * blocks + u) * splits + c]

  context = pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct((pools, heads, blocks, rows, width), keys.dtype),
    interpret=interpret,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(pools, heads // together, blocks, jnp.max(place) + 1),
      in_specs=[
        row_block,
        row_block,
        row_block,
        pool_block(True),
        pool_block(across),
        pl.BlockSpec((None, None, 1, split), bits_index),
      ],
      out_specs=row_block,
      scratch_shapes=[pltpu.VMEM((together, rows, n), jnp.float32) for n in (1, 1, width)],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
    ),
    name="decode_attention",
  )(
    place.reshape(-1),
    *(of_rows(x) for x in (q, k[:, :, :, None], v[:, :, :, None])),
    keys,
    values,
    bits.reshape(pools, blocks, 1, -1),
  )
  context = context.reshape(pools, heads, blocks, groups, block, width).transpose(0, 2, 4, 1, 3, 5)
  return context.reshape(pools, -1, heads, groups, width)[:, :branches]


def _on_gpu(softcap: float, interpret: bool, keys, values, mask, q, k, v):
  """Grid (B, K, U, C): each program reads what is visible of its split, in tiles, and gives the softmax of it and
  its log-sum-exp. A second kernel averages over the splits."""
  pools, heads, width, entries = keys.shape
  branches, groups = q.shape[1], q.shape[3]
  block = _block("gpu", branches, groups)
  blocks, rows = pl.cdiv(branches, block), groups * block
  # Triton requires shapes that are powers of two, and at least 16 in products.
  size = lambda n: max(16, pl.next_power_of_2(n))
  # Products of float32 keep their operands in registers: more than 16 entries do not fit.
  tile = 16 if keys.dtype == jnp.float32 else min(max(16, _GPU_TILE // (2 * size(width))), 128, size(entries))
  most = min(max(1, _GPU_PROGRAMS // (pools * heads * blocks)), _GPU_SPLITS)
  split = tile * pl.cdiv(pl.cdiv(entries, tile), most)
  bits = _visibility(mask, block, split)
  splits = bits.shape[2]
  tiles_of = jnp.arange(split, dtype=jnp.int32) // tile
  first = jnp.min(jnp.where(bits != 0, tiles_of, split // tile), axis=-1)
  stop = jnp.max(jnp.where(bits != 0, tiles_of + 1, 0), axis=-1)  # at most `first` where nothing is visible
  # One array, which XLA makes in one kernel: the queries of each key-value head, then its key, then its value.
  token = jnp.concatenate([q, k[:, :, :, None], v[:, :, :, None]], axis=3).astype(keys.dtype)

  def kernel(token, keys, values, bits, first, stop, out, lse):
    c = pl.program_id(3)
    row = jax.lax.iota(jnp.int32, size(rows))
    branch, group = row & (block - 1), row >> int(math.log2(block))
    branch = pl.program_id(2) * block + branch
    column = jax.lax.iota(jnp.int32, size(width))[None]
    inside = (row < rows)[:, None] & (branch < branches)[:, None] & (column < width)
    load = lambda of: plgpu.load(token.at[branch[:, None], of[:, None], column], mask=inside, other=0.0)
    queries = load(group)
    own = [load(jnp.full_like(group, groups + i)) for i in range(2)]

    def read(ref, start, shape):
      """A matrix from row and column `start` on, with zeros outside of the array."""
      at = [jnp.expand_dims(start[i] + jax.lax.iota(jnp.int32, shape[i]), 1 - i) for i in range(2)]
      if all(n % m == 0 for n, m in zip(ref.shape, shape)):
        return plgpu.load(ref.at[tuple(at)])
      return plgpu.load(ref.at[tuple(at)], mask=(at[0] < ref.shape[0]) & (at[1] < ref.shape[1]), other=0.0)

    def body(i, carry):
      at = c * split + i * tile
      return _add(
        carry,
        queries,
        read(keys, (0, at), (size(width), tile)),
        read(values, (at, 0), (tile, size(width))),
        bits[pl.ds(i * tile, tile)][None],
        block,
        softcap,
      )

    carry = _start(queries, *own, c == 0, softcap)
    peak, total, context = jax.lax.fori_loop(first[...], stop[...], body, carry)
    # `combine` reads no context without weight.
    inside = (row < rows)[:, None] & (column < width) & ((c == 0) | (first[...] < stop[...]))
    plgpu.store(out.at[row[:, None], column], context / total, mask=inside)
    plgpu.store(lse.at[row], (peak + jnp.log(total))[:, 0], mask=row < rows)

  def combine(contexts, lse, out):
    c, column = jax.lax.iota(jnp.int32, pl.next_power_of_2(splits)), jax.lax.iota(jnp.int32, size(width))
    logs = plgpu.load(lse.at[c], mask=c < splits, other=MASK_VALUE)
    weights = jnp.exp(logs - jnp.max(logs))
    weights = weights / jnp.sum(weights)
    used = (weights > 0)[:, None] & (column < width)[None]
    parts = plgpu.load(contexts.at[c[:, None], column[None]], mask=used, other=0.0)
    context = jnp.sum(parts * weights[:, None], axis=0).astype(out.dtype)
    plgpu.store(out.at[column], context, mask=column < width)

  number = pl.BlockSpec((None, None, None), lambda b, k, u, c: (b, u, c))
  parts = pl.pallas_call(
    kernel,
    out_shape=[
      jax.ShapeDtypeStruct((pools, heads, blocks, splits, rows, width), jnp.float32),
      jax.ShapeDtypeStruct((pools, heads, blocks, splits, rows), jnp.float32),
    ],
    grid=(pools, heads, blocks, splits),
    in_specs=[
      pl.BlockSpec((None, branches, None, groups + 2, width), lambda b, k, u, c: (b, 0, k, 0, 0)),
      pl.BlockSpec((None, None, width, entries), lambda b, k, u, c: (b, k, 0, 0)),
      pl.BlockSpec((None, None, entries, width), lambda b, k, u, c: (b, k, 0, 0)),
      pl.BlockSpec((None, None, None, split), lambda b, k, u, c: (b, u, c, 0)),
      number,
      number,
    ],
    out_specs=[
      pl.BlockSpec((None, None, None, None, rows, width), lambda b, k, u, c: (b, k, u, c, 0, 0)),
      pl.BlockSpec((None, None, None, None, rows), lambda b, k, u, c: (b, k, u, c, 0)),
    ],
    interpret=interpret,
    compiler_params=plgpu.CompilerParams(num_warps=4 if rows <= 32 else 8, num_stages=2),
    name="decode_attention",
  )(token, keys, values, bits, first, stop)
  row = lambda w, g: g * block + (w & (block - 1))
  return pl.pallas_call(
    combine,
    out_shape=jax.ShapeDtypeStruct(q.shape, keys.dtype),
    grid=(pools, branches, heads, groups),
    in_specs=[
      pl.BlockSpec(
        (None, None, None, splits, None, width), lambda b, w, k, g: (b, k, w // block, 0, row(w, g), 0)
      ),
      pl.BlockSpec((None, None, None, splits, None), lambda b, w, k, g: (b, k, w // block, 0, row(w, g))),
    ],
    out_specs=pl.BlockSpec((None, None, None, None, width), lambda b, w, k, g: (b, w, k, g, 0)),
    interpret=interpret,
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
    name="decode_attention_combine",
  )(*parts)
