"""What may be seen, and attention over whole rows in plain JAX: the reference for every kernel, and what CPUs
run.

Training has rows whose keys say which queries they are hidden from (`chunked_attention`); the kernels of
`model.flash` do the same on TPU and GPU.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pasta_jax.lang.layout import is_visible
from pasta_jax.model.config import ModelConfig
from pasta_jax.model.transformer import Attend, Local, matmul, soft_cap

MASK_VALUE = -1e30  # a masked score: finite, so that a row that sees nothing averages instead of giving NaN
_UNROLLED = 8  # so many shapes of blocks at most are compiled


def within(queries: jax.Array, keys: jax.Array, window) -> jax.Array:
  """Whether keys at positions `keys` are inside the window of queries at `queries`; broadcasts."""
  return queries - keys < window


def sliding_window_mask(queries: jax.Array, keys: jax.Array, window: int) -> jax.Array | None:
  """[..., q, k] boolean from positions [..., q] and [..., k]: what a local layer may see; None without a
  window.

  Positions count, not places in a row or a pool: they jump at promises, and so does the window.
  """
  return within(queries[..., :, None], keys[..., None, :], window) if window else None


def seen_by(visible: jax.Array, near: jax.Array | None, local: Local) -> jax.Array:
  """What a layer sees of what is visible."""
  return visible if near is None or local is False else visible & (near | jnp.logical_not(local))


def causal_mask(length: int) -> jax.Array:
  """[1, T, T] boolean, for a row that is one plain text."""
  return jnp.tril(jnp.ones((1, length, length), jnp.bool_))


def dense_attention(
  mask: jax.Array,
  dtype: Any = jnp.float32,
  block: int = 128,
  *,
  near: jax.Array | None = None,
  softcap: float = 0.0,
) -> Attend:
  """`attend` over whole rows at once: `mask` is boolean [B, T, T], True where query t sees key s, and never
  True for s > t; local layers see those that are `near` too (`sliding_window_mask`)."""
  if mask.dtype != jnp.bool_:
    raise TypeError(f"a mask must be boolean (True = may attend), not {mask.dtype}")

  def seen(start, size: int, stop: int, local: Local) -> jax.Array:
    part = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)[..., :stop]
    return seen_by(part(mask), None if near is None else part(near), local)

  return _in_blocks(seen, dtype, block, softcap)


def chunked_attention(
  masked_intervals: jax.Array, positions: jax.Array, config: ModelConfig, dtype: Any, block: int = 128
) -> Attend:
  """`attend` over rows whose keys are hidden from the query indices `masked_intervals` [B, T, L, 2]
  (`layout.is_visible`), and in local layers from `positions` [B, T] beyond the window. No T x T array is
  made: what a block of queries sees is found when it is needed."""

  def seen(start, size: int, stop: int, local: Local) -> jax.Array:
    at = start + jnp.arange(size)
    visible = is_visible(at[:, None], jnp.arange(stop)[None, :], masked_intervals[:, None, :stop])
    near = sliding_window_mask(
      jax.lax.dynamic_slice_in_dim(positions, start, size, axis=1), positions[:, :stop], config.window
    )
    return seen_by(visible, near, local)

  return _in_blocks(seen, dtype, block, config.attention_softcap)


def _in_blocks(
  seen: Callable[[Any, int, int, Local], jax.Array], dtype: Any, block: int, softcap: float
) -> Attend:
  """Queries go in blocks of `block`, each against the keys up to its own end, or, in long rows, up to the end
  of its eighth of the row: later keys are masked for all of them, so nearly half of the work falls away.
  `seen(start, size, stop, local)` is the mask [B, size, stop] of the queries from `start` on.

  Products take operands in `dtype` and accumulate in float32. Sums of weights come from the same product as
  the context (a column of ones beside the values): XLA's CPU row sums are slow. Collects each layer's keys
  and values [B, T, K, H].
  """

  def attend(cache, q, k, v, local=False):
    del cache
    length, width = q.shape[1], q.shape[-1]
    q_ = q.astype(dtype).transpose(0, 2, 3, 1, 4)  # B K G T H
    k_ = k.astype(dtype).transpose(0, 2, 3, 1)  # B K H T
    v_ = v.astype(dtype).transpose(0, 2, 1, 3)  # B K T H
    v_ = jnp.concatenate([v_, jnp.ones((*v_.shape[:-1], 16), dtype)], axis=-1)

    def run(start, size: int, stop: int, k, v):
      """[B, K, G, size, H+] of the queries from `start` on, which see no key from `stop` on."""
      own = jax.lax.dynamic_slice_in_dim(q_, start, size, axis=3)
      rows, heads, groups, *_ = own.shape
      scores = matmul(own.reshape(rows, heads, groups * size, width), k).reshape(
        rows, heads, groups, size, -1
      )
      mask = seen(start, size, stop, local)
      scores = soft_cap(scores, softcap) + jnp.where(mask, 0.0, MASK_VALUE)[:, None, None]
      peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
      weights = jnp.exp(scores - peak).astype(dtype)
      return matmul(weights.reshape(rows, heads, groups * size, -1), v).reshape(*own.shape[:-1], -1)

    many = -(-length // block // _UNROLLED) * block if length > _UNROLLED * block else block
    found = []
    for start in range(0, length, many):
      stop = min(start + many, length)
      keys, values, at = k_[..., :stop], v_[..., :stop, :], start
      one = jax.checkpoint(run, static_argnums=(1, 2))
      whole = (stop - start) // block if many > block else 0
      if whole:
        each = jax.lax.map(
          lambda at, stop=stop, keys=keys, values=values, one=one: one(at, block, stop, keys, values),
          start + block * jnp.arange(whole),
        )  # [blocks, B, K, G, block, H+]
        found.append(jnp.moveaxis(each, 0, 3).reshape(*q_.shape[:3], whole * block, -1))
        at = start + whole * block
      if at < stop:
        found.append(one(at, stop - at, stop, keys, values))
    out = jnp.concatenate(found, axis=-2)
    context = out[..., :width] / out[..., width : width + 1]
    return context.transpose(0, 3, 1, 2, 4), (k, v)

  return attend
