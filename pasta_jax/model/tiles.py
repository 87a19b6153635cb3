"""Attention in square tiles: which tiles are masked, and the computation within one tile.

Visibility is stored by key: a query sees a key from the key's own index on, except in the query intervals
that the key is masked from (`lang.layout`); local layers also apply the sliding window. A row of T tokens
therefore needs T x levels numbers, not a T x T mask. Nothing here depends on Pallas: `model.flash` runs these
steps on TPU and GPU.

Score matrices are [keys, queries]: the maximum, sum and cotangent of queries are then rows, and the intervals
of keys columns, which is how both are stored.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pasta_jax.lang.visibility import outside
from pasta_jax.model.attention import MASK_VALUE, in_window
from pasta_jax.model.transformer import soft_cap

EMPTY, PARTIAL, FULL = 0, 1, 2
FAR = 2**30  # greater than every index and position


def tile_kinds(masked_intervals: jax.Array, positions: jax.Array, window: int, size: int) -> jax.Array:
  """[B, n, n] int32: EMPTY, PARTIAL or FULL for query tile i and key tile j of `size` tokens each.

  `masked_intervals` is [B, T, L, 2], `positions` [B, T]; T is a multiple of `size`; `window` 0 means no
  window. A tile that only several intervals of a key together mask may be PARTIAL although it is empty; EMPTY
  and FULL are always right.
  """
  rows, length = positions.shape
  n = length // size
  first = jnp.arange(n) * size  # first query of each tile; [n], broadcast against keys [B, T, 1, L]
  start, stop = masked_intervals[..., None, :, 0], masked_intervals[..., None, :, 1]
  tile_start, tile_stop = first[:, None], first[:, None] + size
  key = jnp.arange(length)[:, None, None]
  covered = jnp.any((start <= jnp.maximum(tile_start, key)) & (tile_stop <= stop), axis=-1)  # [B, T, n]
  touched = jnp.any((start < stop) & (start < tile_stop) & (tile_start < stop), axis=-1)
  by_tile = lambda x: x.reshape(rows, n, size, n).swapaxes(2, 3)  # [B, j, i, size]
  empty, full = jnp.all(by_tile(covered), axis=-1), ~jnp.any(by_tile(touched), axis=-1)
  j, i = jnp.arange(n)[:, None], jnp.arange(n)[None, :]
  empty, full = empty | (j > i), full & (j < i)
  if window:
    tiles = positions.reshape(rows, n, size)
    least, most = tiles.min(axis=-1), tiles.max(axis=-1)
    empty |= ~in_window(least[:, None, :], most[:, :, None], window)
    full &= in_window(most[:, None, :], least[:, :, None], window)
  return jnp.where(empty, EMPTY, jnp.where(full, FULL, PARTIAL)).swapaxes(1, 2).astype(jnp.int32)


class TileSchedule(NamedTuple):
  """For each tile of one side (queries or keys), the tiles of the other side that it visits."""

  order: jax.Array  # [B, n, n] int32: 2 x tile + whether it is full; the first `visits` entries count
  visits: jax.Array  # [B, n] int32


def tile_schedule(kinds: jax.Array) -> TileSchedule:
  """The schedule of query tiles; with the last two axes of `kinds` swapped, that of key tiles."""
  order = jnp.argsort(kinds == EMPTY, axis=-1, stable=True).astype(jnp.int32)
  full = jnp.take_along_axis(kinds, order, axis=-1) == FULL
  return TileSchedule(2 * order + full, jnp.sum(kinds != EMPTY, axis=-1, dtype=jnp.int32))


class Keys(NamedTuple):
  """What visibility needs to know of a tile's keys; arrays are columns [k, 1]."""

  start: jax.Array | int  # index of the first key
  intervals: Sequence[tuple[jax.Array, jax.Array]]  # (start, stop) of the query intervals, one pair a level
  position: jax.Array | None  # None in models without windows


class Queries(NamedTuple):
  """The same for queries; arrays are rows [1, q]."""

  start: jax.Array | int  # index of the first query
  position: jax.Array | None


def dot(x: jax.Array, y: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
  """Product of two matrices, contracted over the given axes and accumulated in float32."""
  return jax.lax.dot_general(
    x, y, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32
  )


def tile_scores(q: jax.Array, k: jax.Array, queries: Queries, keys: Keys, full, window, softcap: float):
  """(scores [k, q] with MASK_VALUE where masked, scores before masking). `q` is [q, H], `k` [k, H]; `full`
  says that nothing is masked."""
  scores = soft_cap(dot(k, q, (1, 1)), softcap)

  def masked(scores):
    at = queries.start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    visible = outside(at, keys.start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0), keys.intervals)
    if queries.position is not None and keys.position is not None:
      visible = visible & in_window(queries.position, keys.position, window)
    return jnp.where(visible, scores, MASK_VALUE)

  return jax.lax.cond(full, lambda s: s, masked, scores), scores


def forward_start(q: int, width: int):
  """Running maximum [1, q], sum [1, q] and context [H, q] before the first tile."""
  return (
    jnp.full((1, q), MASK_VALUE, jnp.float32),
    jnp.zeros((1, q), jnp.float32),
    jnp.zeros((width, q), jnp.float32),
  )


def forward_step(carry, scores: jax.Array, v_t: jax.Array):
  """Adds one tile, rescaling the softmax so far to the new maximum (Milakov and Gimelshein 2018). `v_t` is
  [H, k]."""
  peak, total, context = carry
  new = jnp.maximum(peak, jnp.max(scores, axis=0, keepdims=True))
  weights, shrink = jnp.exp(scores - new), jnp.exp(peak - new)
  return (
    new,
    total * shrink + jnp.sum(weights, axis=0, keepdims=True),
    context * shrink + dot(v_t, weights.astype(v_t.dtype)),
  )


def forward_end(carry):
  """(context [H, q], log-sum-exp of the scores [1, q])."""
  peak, total, context = carry
  return context / total, peak + jnp.log(total)


def backward(
  scores: jax.Array,
  raw: jax.Array,
  v: jax.Array,
  d_context: jax.Array,
  lse: jax.Array,
  delta: jax.Array,
  softcap: float,
) -> tuple[jax.Array, jax.Array]:
  """(weights, cotangent of the product of q and k) of a tile, both [k, q]. `v` is [k, H], `d_context` [q, H];
  `delta` [1, q] is the sum of context x d_context (Dao 2023)."""
  weights = jnp.exp(scores - lse)
  d_scores = weights * (dot(v, d_context, (1, 1)) - delta)
  if softcap:
    d_scores = d_scores * (1 - jnp.square(raw / softcap))
  return weights, d_scores
