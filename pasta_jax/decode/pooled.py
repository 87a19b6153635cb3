"""Kernels of attention that read a pool once for all its branches, as `attend` of one branch.

A step is a `jax.vmap` over branches; a kernel is a function of keys [B, K, H, P], values [B, K, P, H], mask [B, W, P],
q [B, W, K, G, H], k and v [B, W, K, H] that returns [B, W, K, G, H]. Letters: B requests, each with a pool; W branches
of a pool; P, K, G and H as in `decode.attention`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec

from pasta_jax.model.attention import layer_mask
from pasta_jax.model.sharding import fitting, head_axes
from pasta_jax.model.transformer import Attend


def pool_attend(kernel: Callable, visible: jax.Array, window_mask: jax.Array | None) -> Attend:
  """`attend` of one branch, as `decode.attention.xla_decode` documents it, by a kernel that `batched` has made."""

  def attend(cache, q, k, v, local):
    keys, values = cache
    mask = layer_mask(visible, window_mask, local)
    context = kernel(keys[None], values[None], *(x[None, None] for x in (mask, q, k, v)))
    return context[0, 0], (k.astype(keys.dtype), v.astype(values.dtype))

  return attend


def batched(kernel: Callable) -> Callable:
  """The kernel as a function to which `jax.vmap` adds branches where pools are shared, otherwise requests."""
  run = custom_vmap(functools.partial(_on_mesh, kernel))

  def rule(size: int, batched, *operands):
    each = [x if own else jnp.broadcast_to(x, (size, *x.shape)) for x, own in zip(operands, batched)]
    if batched[0] or batched[1]:
      context = run(*(x.reshape(-1, *x.shape[2:]) for x in each))
      return context.reshape(size, -1, *context.shape[1:]), True
    rows = (jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]) for x in each[2:])
    context = run(*operands[:2], *rows)
    return jnp.moveaxis(context.reshape(context.shape[0], size, -1, *context.shape[2:]), 1, 0), True

  run.def_vmap(rule)
  return run


def _on_mesh(kernel: Callable, keys, values, mask, q, k, v) -> jax.Array:
  """The partitioner cannot split a kernel: each device runs it on its requests and on its heads, which lie as
  `decode.placement` says."""
  sizes = jax.sharding.get_abstract_mesh()
  if sizes.size <= 1:
    return kernel(keys, values, mask, q, k, v)
  [rows] = fitting(("data",), q.shape[:1], sizes.shape)
  heads, groups = head_axes(*q.shape[2:4])
  pool, token = PartitionSpec(rows, heads), PartitionSpec(rows, None, heads)
  queries = PartitionSpec(rows, None, heads, groups)
  specs = (pool, pool, PartitionSpec(rows), queries, token, token)
  run = jax.shard_map(kernel, in_specs=specs, out_specs=queries, check_vma=False)
  return run(keys, values, mask, q, k, v)
