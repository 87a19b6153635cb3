"""Masks, and attention over whole rows in plain JAX: the reference for every kernel, and what CPUs run.

In training a mask is told by an array over the row's tokens (`model.masks`); `chunked_attention` and the kernels of
`model.flash`, on TPU and GPU, compute the same.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pasta_jax.model.config import ModelConfig
from pasta_jax.model.masks import Mask
from pasta_jax.model.products import matmul
from pasta_jax.model.transformer import Attend, Local, soft_cap

MASK_VALUE = -1e30  # a masked score: finite, so that a fully masked row averages instead of giving NaN
_UNROLLED = 8  # at most this many block shapes are compiled


def in_window(queries: jax.Array, keys: jax.Array, window) -> jax.Array:
  """Whether keys at positions `keys` are in the sliding window of queries at positions `queries`;
  broadcasts."""
  return queries - keys < window


def sliding_window_mask(queries: jax.Array, keys: jax.Array, window: int) -> jax.Array | None:
  """[..., q, k] boolean from positions [..., q] and [..., k]: True where the key is in the query's sliding
  window; None if `window` is 0.

  The window is measured in positions, not in indices of a row or a pool: positions jump at promises, and so
  does the window.
  """
  return in_window(queries[..., :, None], keys[..., None, :], window) if window else None


def layer_mask(visible: jax.Array, window_mask: jax.Array | None, local: Local) -> jax.Array:
  """The mask of one layer: `visible`, and in a local layer `window_mask` as well. Shapes broadcast."""
  if window_mask is None or local is False:
    return visible
  return visible & (window_mask | jnp.logical_not(local))


def causal_mask(length: int) -> jax.Array:
  """[1, T, T] boolean, for a row of plain text."""
  return jnp.tril(jnp.ones((1, length, length), jnp.bool_))


def dense_attention(
  mask: jax.Array,
  dtype: Any = jnp.float32,
  block: int = 128,
  *,
  window_mask: jax.Array | None = None,
  softcap: float = 0.0,
) -> Attend:
  """`attend` over whole rows [B, T]. `mask` is boolean [B, T, T], True where query t sees key s, never True
  for s > t. Local layers also apply `window_mask` [B, T, T] (`sliding_window_mask`). Collects each layer's
  keys and values [B, T, K, H].

  Raises TypeError if `mask` is not boolean.
  """
  if mask.dtype != jnp.bool_:
    raise TypeError(f"a mask must be boolean (True = may attend), not {mask.dtype}")

  def block_mask(start, size: int, stop: int, local: Local) -> jax.Array:
    part = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)[..., :stop]
    return layer_mask(part(mask), None if window_mask is None else part(window_mask), local)

  return _in_blocks(block_mask, dtype, block, softcap)


def chunked_attention(
  mask: Mask, positions: jax.Array, config: ModelConfig, dtype: Any, block: int = 128
) -> Attend:
  """`attend` over whole rows [B, T] under `mask`; local layers also apply the sliding window to `positions` [B, T].
  Collects each layer's keys and values [B, T, K, H].

  No T x T array is made: the mask of each block of queries is computed when it is needed.
  """

  def block_mask(start, size: int, stop: int, local: Local) -> jax.Array:
    window_mask = sliding_window_mask(
      jax.lax.dynamic_slice_in_dim(positions, start, size, axis=1), positions[:, :stop], config.window
    )
    return layer_mask(mask.block(start, size, stop), window_mask, local)

  return _in_blocks(block_mask, dtype, block, config.attention_softcap)


def _in_blocks(
  block_mask: Callable[[Any, int, int, Local], jax.Array], dtype: Any, block: int, softcap: float
) -> Attend:
  """Attention in blocks of `block` queries. A block reads the keys up to its own end, or, in long rows, up to
  the end of its eighth of the row: later keys are masked for all of its queries, which saves nearly half of
  the work. `block_mask(start, size, stop, local)` is the mask [B, size, stop] of the queries from `start` on.

  Products take operands in `dtype` and accumulate in float32. The sums of the weights come from the same
  product as the context (columns of ones are appended to the values), because XLA's row sums are slow on CPU.
  """

  def attend(cache, q, k, v, local=False):
    del cache
    length, width = q.shape[1], q.shape[-1]
    q_ = q.astype(dtype).transpose(0, 2, 3, 1, 4)  # B K G T H
    k_ = k.astype(dtype).transpose(0, 2, 3, 1)  # B K H T
    v_ = v.astype(dtype).transpose(0, 2, 1, 3)  # B K T H
    v_ = jnp.concatenate([v_, jnp.ones((*v_.shape[:-1], 16), dtype)], axis=-1)

    def run(start, size: int, stop: int, k, v):
      """[B, K, G, size, H + 16] of the queries from `start` on, which see no key from `stop` on."""
      block_q = jax.lax.dynamic_slice_in_dim(q_, start, size, axis=3)
      rows, heads, groups, *_ = block_q.shape
      scores = matmul(block_q.reshape(rows, heads, groups * size, width), k).reshape(
        rows, heads, groups, size, -1
      )
      mask = block_mask(start, size, stop, local)
      scores = soft_cap(scores, softcap) + jnp.where(mask, 0.0, MASK_VALUE)[:, None, None]
      peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
      weights = jnp.exp(scores - peak).astype(dtype)
      return matmul(weights.reshape(rows, heads, groups * size, -1), v).reshape(*block_q.shape[:-1], -1)

    section = -(-length // block // _UNROLLED) * block if length > _UNROLLED * block else block
    outputs = []
    for start in range(0, length, section):
      stop = min(start + section, length)
      keys, values, at = k_[..., :stop], v_[..., :stop, :], start
      one = jax.checkpoint(run, static_argnums=(1, 2))
      whole = (stop - start) // block if section > block else 0
      if whole:
        each = jax.lax.map(
          lambda at, stop=stop, keys=keys, values=values, one=one: one(at, block, stop, keys, values),
          start + block * jnp.arange(whole),
        )  # [blocks, B, K, G, block, H+]
        outputs.append(jnp.moveaxis(each, 0, 3).reshape(*q_.shape[:3], whole * block, -1))
        at = start + whole * block
      if at < stop:
        outputs.append(one(at, stop - at, stop, keys, values))
    out = jnp.concatenate(outputs, axis=-2)
    context = out[..., :width] / out[..., width : width + 1]
    return context.transpose(0, 3, 1, 2, 4), (k, v)

  return attend
