"""Attention in square tiles: which of them anything is seen in, and what happens in one.

What a query may see is given by key: a key is seen from its own index on, but for the intervals of query
indices that it is hidden from (`lang.layout`); local layers also ask for near positions. So a row of T tokens
needs T x levels numbers, not a T x T mask. Nothing here knows Pallas: `model.flash` drives the steps on TPU
and GPU.

Scores lie with keys down and queries across: a query's maximum, sum and cotangent are then rows, and a key's
intervals columns, which is how both are stored.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pasta_jax.lang.layout import outside
from pasta_jax.model.attention import MASK_VALUE, within
from pasta_jax.model.transformer import soft_cap

EMPTY, PARTIAL, FULL = 0, 1, 2
FAR = 2**30  # beyond all indices and positions


def tile_kinds(masked_intervals: jax.Array, positions: jax.Array, window: int, size: int) -> jax.Array:
  """[B, n, n] integers of EMPTY, PARTIAL, FULL for query tile i and key tile j of `size` tokens each.

  `masked_intervals` is [B, T, L, 2], `positions` [B, T]; T is a multiple of `size`; `window` 0: none. A tile that
  several intervals of a key hide together may be called PARTIAL though it is empty; one that is called EMPTY
  or FULL is.
  """
  rows, length = positions.shape
  n = length // size
  first = jnp.arange(n) * size  # of each query tile; [n] beside keys [B, T, 1, L]
  start, stop = masked_intervals[..., None, :, 0], masked_intervals[..., None, :, 1]
  first_, behind_ = first[:, None], first[:, None] + size
  key = jnp.arange(length)[:, None, None]
  covered = jnp.any((start <= jnp.maximum(first_, key)) & (behind_ <= stop), axis=-1)  # [B, T, n]
  touched = jnp.any((start < stop) & (start < behind_) & (first_ < stop), axis=-1)
  by_tile = lambda x: x.reshape(rows, n, size, n).swapaxes(2, 3)  # [B, j, i, size]
  empty, full = jnp.all(by_tile(covered), axis=-1), ~jnp.any(by_tile(touched), axis=-1)
  j, i = jnp.arange(n)[:, None], jnp.arange(n)[None, :]
  empty, full = empty | (j > i), full & (j < i)
  if window:
    tiles = positions.reshape(rows, n, size)
    least, most = tiles.min(axis=-1), tiles.max(axis=-1)
    empty |= ~within(least[:, None, :], most[:, :, None], window)
    full &= within(most[:, None, :], least[:, :, None], window)
  return jnp.where(empty, EMPTY, jnp.where(full, FULL, PARTIAL)).swapaxes(1, 2).astype(jnp.int32)


class Schedule(NamedTuple):
  """For each tile of one side, the tiles of the other that it meets."""

  order: jax.Array  # [B, n, n] int32: 2 x tile + whether it is full, the first `visits` of them
  visits: jax.Array  # [B, n] int32


def schedule(kinds: jax.Array) -> Schedule:
  """Visits of each query tile; of each key tile, with the last two axes of `kinds` exchanged."""
  order = jnp.argsort(kinds == EMPTY, axis=-1, stable=True).astype(jnp.int32)
  full = jnp.take_along_axis(kinds, order, axis=-1) == FULL
  return Schedule(2 * order + full, jnp.sum(kinds != EMPTY, axis=-1, dtype=jnp.int32))


class Keys(NamedTuple):
  """What decides whether a tile's keys [k, 1] are seen; `near` is None in models without windows."""

  start: jax.Array | int  # index of the first key
  intervals: Sequence[tuple[jax.Array, jax.Array]]
  position: jax.Array | None


class Queries(NamedTuple):
  """The same of queries, [1, q]."""

  start: jax.Array | int
  position: jax.Array | None


def dot(x: jax.Array, y: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
  """Product of two matrices over the named axes, accumulated in float32."""
  return jax.lax.dot_general(
    x, y, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32
  )


def tile_scores(q: jax.Array, k: jax.Array, queries: Queries, keys: Keys, full, window, softcap: float):
  """(scores [k, q] with NEGATIVE where nothing is seen, the same before masking); q [q, H], k [k, H]."""
  scores = soft_cap(dot(k, q, (1, 1)), softcap)

  def masked(scores):
    at = queries.start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    seen = outside(at, keys.start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0), keys.intervals)
    if queries.position is not None and keys.position is not None:
      seen = seen & within(queries.position, keys.position, window)
    return jnp.where(seen, scores, MASK_VALUE)

  return jax.lax.cond(full, lambda s: s, masked, scores), scores


def forward_start(q: int, width: int):
  """Maximum [1, q], sum [1, q] and context [H, q] of scores before any tile."""
  return (
    jnp.full((1, q), MASK_VALUE, jnp.float32),
    jnp.zeros((1, q), jnp.float32),
    jnp.zeros((width, q), jnp.float32),
  )


def forward_step(carry, scores: jax.Array, v_t: jax.Array):
  """One tile more: the softmax so far is scaled to the new maximum (Milakov and Gimelshein 2018). v_t is [H,
  k]."""
  peak, total, context = carry
  new = jnp.maximum(peak, jnp.max(scores, axis=0, keepdims=True))
  weights, shrink = jnp.exp(scores - new), jnp.exp(peak - new)
  return (
    new,
    total * shrink + jnp.sum(weights, axis=0, keepdims=True),
    context * shrink + dot(v_t, weights.astype(v_t.dtype)),
  )


def forward_end(carry):
  """(context [H, q], log of the sum of exponentials [1, q])."""
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
  """(weights, cotangent of q k), both [k, q], of a tile. v [k, H], d_context [q, H]; `delta` [1, q] is the
  sum of context x d_context (Dao 2023)."""
  weights = jnp.exp(scores - lse)
  d_scores = weights * (dot(v, d_context, (1, 1)) - delta)
  if softcap:
    d_scores = d_scores * (1 - jnp.square(raw / softcap))
  return weights, d_scores
