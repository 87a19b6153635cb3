"""Attention in square tiles: which tiles are masked, and the computation within one tile.

A row of T tokens has a few numbers a token that say who sees whom (`model.masks`), not a T x T mask; local layers
also apply the sliding window. Nothing here depends on Pallas: `model.flash` runs these steps on TPU and GPU.

Score matrices are [keys, queries]: the maximum, sum and cotangent of queries are then rows, and what masks ask of
keys columns, which is how both are stored.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pasta_jax.model.attention import MASK_VALUE, in_window
from pasta_jax.model.masks import Mask
from pasta_jax.model.transformer import soft_cap

EMPTY, PARTIAL, FULL = 0, 1, 2
FAR = 2**30  # greater than every index and position


def tile_kinds(mask: Mask, positions: jax.Array, window: int, size: int) -> jax.Array:
  """[B, n, n] int32: EMPTY, PARTIAL or FULL for query tile i and key tile j of `size` tokens each.

  `positions` is [B, T]; T is a multiple of `size`; `window` 0 means no window. A tile may be PARTIAL although it is
  empty; EMPTY and FULL are always right.
  """
  rows, length = positions.shape
  n = length // size
  empty, full = mask.tiles(size)  # [B, j, i]
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


def dot(x: jax.Array, y: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
  """Product of two matrices, contracted over the given axes and accumulated in float32."""
  return jax.lax.dot_general(
    x, y, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32
  )


def tile_scores(
  q: jax.Array,
  k: jax.Array,
  at_query,
  at_key,
  visible: Callable[[jax.Array, jax.Array], jax.Array],
  full,
  softcap: float,
):
  """(scores [k, q] with MASK_VALUE where masked, scores before masking). `q` is [q, H] from index `at_query` on, `k`
  [k, H] from `at_key` on; `visible(q, k)` is the mask of indices; `full` says that nothing is masked."""
  scores = soft_cap(dot(k, q, (1, 1)), softcap)

  def masked(scores):
    queries = at_query + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    keys = at_key + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    return jnp.where(visible(queries, keys), scores, MASK_VALUE)

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
