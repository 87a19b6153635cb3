"""Who sees whom in the rows of a batch, as every program of attention asks: for a block, for tiles, within a tile.

A mask is an array over the row's tokens, by one of the rules of `lang.visibility`; no T x T array is made unless a
whole block is asked for. Both kinds have the same members:

  block(start, size, stop)   [B, size, stop] boolean: what the queries from `start` on see of the keys up to `stop`
  tiles(size)                two [B, n, n] booleans: whether query tile i sees nothing of key tile j, [b, j, i]; and
                             everything. Right for tiles below the diagonal; the caller knows the others
  columns, rows              what a kernel reads of keys [B, T, R] and of queries [B, Q, T], int32
  seen(q, k, rows, columns)  the same rule within a tile, from indices and what was read: rows [1, q], columns [k, 1]
  padded(n)                  the mask of rows that are n tokens longer, which nobody sees
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pasta_jax.lang.visibility import is_visible, is_visible_live, outside


class Intervals(NamedTuple):
  """`is_visible`: each key is masked from intervals of queries."""

  intervals: jax.Array  # [B, T, L, 2]

  def block(self, start, size: int, stop: int) -> jax.Array:
    at = start + jnp.arange(size)
    return is_visible(at[:, None], jnp.arange(stop)[None, :], self.intervals[:, None, :stop])

  def tiles(self, size: int) -> tuple[jax.Array, jax.Array]:
    """A tile that only several intervals of a key together mask may count as not empty although it is."""
    rows, length = self.intervals.shape[:2]
    n = length // size
    first = jnp.arange(n) * size  # first query of each tile; [n], broadcast against keys [B, T, 1, L]
    start, stop = self.intervals[..., None, :, 0], self.intervals[..., None, :, 1]
    tile_start, tile_stop = first[:, None], first[:, None] + size
    key = jnp.arange(length)[:, None, None]
    covered = jnp.any((start <= jnp.maximum(tile_start, key)) & (tile_stop <= stop), axis=-1)  # [B, T, n]
    touched = jnp.any((start < stop) & (start < tile_stop) & (tile_start < stop), axis=-1)
    by_tile = lambda x: x.reshape(rows, n, size, n).swapaxes(2, 3)  # [B, j, i, size]
    return jnp.all(by_tile(covered), axis=-1), ~jnp.any(by_tile(touched), axis=-1)

  @property
  def columns(self) -> jax.Array:
    """Starts and stops, level by level."""
    return self.intervals.reshape(*self.intervals.shape[:2], -1)

  @property
  def rows(self) -> jax.Array:
    rows, length = self.intervals.shape[:2]
    return jnp.zeros((rows, 0, length), jnp.int32)

  @staticmethod
  def seen(q, k, rows: Sequence[jax.Array], columns: Sequence[jax.Array]) -> jax.Array:
    del rows
    return outside(q, k, zip(columns[::2], columns[1::2]))

  def padded(self, n: int) -> "Intervals":
    return Intervals(jnp.pad(self.intervals, ((0, 0), (0, n), (0, 0), (0, 0))))


class Rounds(NamedTuple):
  """`is_visible_live`: a query sees the earlier keys of earlier rounds, and itself."""

  rounds: jax.Array  # [B, T]; 0 in padding, which is below those of every example

  def block(self, start, size: int, stop: int) -> jax.Array:
    at = start + jnp.arange(size)
    of_queries = jax.lax.dynamic_slice_in_dim(self.rounds, start, size, axis=1)[:, :, None]
    return is_visible_live(at[:, None], jnp.arange(stop)[None, :], of_queries, self.rounds[:, None, :stop])

  def tiles(self, size: int) -> tuple[jax.Array, jax.Array]:
    by_tile = self.rounds.reshape(len(self.rounds), -1, size)
    least, most = by_tile.min(axis=-1), by_tile.max(axis=-1)
    # A token sees itself whatever its round, so a tile on the diagonal is never empty.
    empty = (least[:, :, None] >= most[:, None, :]) & ~jnp.eye(by_tile.shape[1], dtype=jnp.bool_)
    return empty, most[:, :, None] < least[:, None, :]

  @property
  def columns(self) -> jax.Array:
    return self.rounds[:, :, None]

  @property
  def rows(self) -> jax.Array:
    return self.rounds[:, None]

  @staticmethod
  def seen(q, k, rows: Sequence[jax.Array], columns: Sequence[jax.Array]) -> jax.Array:
    return is_visible_live(q, k, rows[0], columns[0])

  def padded(self, n: int) -> "Rounds":
    return Rounds(jnp.pad(self.rounds, ((0, 0), (0, n))))


Mask = Intervals | Rounds
