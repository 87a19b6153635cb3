"""Attention over packed rows in training, by one of several programs that compute the same.

chunked    plain JAX, in blocks of queries
tpu, gpu   the kernels of `model.flash`
auto       the TPU kernels on TPU, chunked elsewhere: those for GPU are right there, their speed is not yet compared
interpret  the TPU kernels, interpreted in plain JAX: slow, for tests on any machine
dense      the full T x T mask: the reference
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pasta_jax.config.sections import ATTENTION
from pasta_jax.model import flash, tiles
from pasta_jax.model.attention import chunked_attention, dense_attention, sliding_window_mask
from pasta_jax.model.config import ModelConfig
from pasta_jax.model.masks import Intervals, Mask, Rounds
from pasta_jax.model.sharding import ROWS, constrain_rows, head_axes
from pasta_jax.model.transformer import Attend

DeviceBatch = Mapping[str, jax.Array]  # fields of data.packing.PackedBatch on the devices, leaves [B, …]


def check_machine(config, name: str) -> None:
  """Raises ValueError, one line, if this machine cannot run a section's `attention`."""
  here = jax.default_backend()
  if config.attention in ("tpu", "gpu") and config.attention != here:
    raise ValueError(
      f"{name}.attention={config.attention} cannot run on this machine's {here}: leave it at auto"
    )


def masked_intervals(batch: DeviceBatch) -> jax.Array:
  """[B, T, L + 1, 2]: the intervals of query indices that each key is masked from.

  The last level masks an example from the examples after it in the same row (causality in
  `visibility.is_visible` masks it from those before); a padding token sees only itself.
  """
  segment_ids = batch["segment_ids"]
  rows, length = segment_ids.shape
  at = jnp.arange(length, dtype=jnp.int32)
  last = jnp.concatenate([segment_ids[:, 1:] != segment_ids[:, :-1], jnp.ones((rows, 1), jnp.bool_)], axis=1)
  behind = jax.lax.cummin(jnp.where(last | (segment_ids == 0), at + 1, length), axis=1, reverse=True)
  rest = jnp.stack([behind, jnp.full_like(behind, tiles.FAR)], axis=-1)
  return jnp.concatenate([batch["masked_intervals"], rest[:, :, None]], axis=2)


def mask_of(batch: DeviceBatch, visibility: str) -> Mask:
  """Who sees whom in a batch under a `visibility` of `lang.forms`. The rounds of a row keep its examples apart
  (`data.packing`), so `live` needs no intervals."""
  return Rounds(batch["rounds"]) if visibility == "live" else Intervals(masked_intervals(batch))


def attention_mask(batch: DeviceBatch, visibility: str = "promise") -> jax.Array:
  """[B, T, T] boolean: whether the query sees the key."""
  length = batch["tokens"].shape[1]
  return mask_of(batch, visibility).block(0, length, length)


def make_attend(
  kind: str, batch: DeviceBatch, config: ModelConfig, dtype, visibility: str = "promise"
) -> Attend:
  """`attend` for a batch's rows under a `visibility`, computed by `kind`. On a mesh, rows and heads are sharded."""
  if kind == "auto":
    kind = "tpu" if jax.default_backend() == "tpu" else "chunked"
  positions = batch["positions"]
  if kind == "dense":
    window_mask = sliding_window_mask(positions, positions, config.window)
    attend = dense_attention(
      attention_mask(batch, visibility), dtype, window_mask=window_mask, softcap=config.attention_softcap
    )
  elif kind == "chunked":
    attend = chunked_attention(mask_of(batch, visibility), positions, config, dtype)
  elif kind in ATTENTION:
    attend = _by_kernel(kind, mask_of(batch, visibility), positions, config, dtype)
  else:
    raise ValueError(f"attention must be one of {', '.join(ATTENTION)}, not {kind!r}")

  def pinned(cache, q, k, v, local):
    q, k, v = (constrain_rows(x, None, "tensor") for x in (q, k, v))
    context, _ = attend(cache, q, k, v, local)
    return constrain_rows(context, None, "tensor"), None

  return pinned


def _by_kernel(kind: str, mask: Mask, positions: jax.Array, config: ModelConfig, dtype) -> Attend:
  """The partitioner cannot split a kernel, so each device runs it on its rows and key heads, or on its query
  heads if there are too few key heads."""
  platform = "gpu" if kind == "gpu" else "tpu"
  size = flash.tile_size(platform, positions.shape[1], config.head_dim)
  settings = flash.Settings(
    platform, size, config.attention_softcap, config.window > 0, kind == "interpret", type(mask)
  )
  tables = flash.make_tables(mask, positions, config.window, size)
  run = partial(flash.attention, settings=settings, config=config)

  def attend(cache, q, k, v, local):
    del cache
    q, k, v, local = q.astype(dtype), k.astype(dtype), v.astype(dtype), jnp.asarray(local)
    if jax.sharding.get_abstract_mesh().size > 1:
      heads, groups = head_axes(*q.shape[2:4])
      ours, theirs = PartitionSpec(ROWS, None, heads, groups), PartitionSpec(ROWS, None, heads)
      divided = jax.shard_map(
        run,
        in_specs=(ours, theirs, theirs, PartitionSpec(), PartitionSpec(ROWS)),
        out_specs=ours,
        check_vma=False,
      )
      return divided(q, k, v, local, tables), None
    return run(q, k, v, local, tables), None

  return attend
