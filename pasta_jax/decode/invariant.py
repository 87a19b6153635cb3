"""Decode steps whose results have the same bits whatever is decoded beside them (`decode.invariant`).

The rounding of a product depends on its shape and on what the compiler fuses with it, so in general on the branch
width, the batch and the pool. Here the live branches of all requests are packed into tiles of TILE rows, and one loop
runs the whole forward pass and the choice of a token on one tile after the other. How many tiles there are is known
on the device only: the compiler has to compile the loop's body by itself, for the same shapes at every width and
batch size. (`optimization_barrier` would not do: XLA removes it on CPU before it fuses.)

What remains is that a row's result must not depend on the other rows of a tile, nor on its own place: products and
reductions are over other axes. Attention adds blocks of BLOCK pool entries to a running maximum and sum, and a block of
which a row sees nothing changes none of that row's bits, so neither the pool's size nor the other requests do.

Letters: B requests, W branches of each, N = B x W rounded up to tiles, and those of `decode.attention`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec

from pasta_jax.decode.sampling import Branch, Sampling, TokenTables, pick
from pasta_jax.decode.settings import DecodeError, Limits, StepFeatures
from pasta_jax.decode.state import State
from pasta_jax.model.attention import MASK_VALUE, layer_mask, sliding_window_mask
from pasta_jax.model.sharding import fitting
from pasta_jax.model.transformer import Attend, Transformer, soft_cap

TILE = 8  # rows of a product: one row costs nearly as much, also on accelerators
BLOCK = 128  # pool entries; the sizes of pools are multiples, others are padded in every step


def check_mesh(sizes: Mapping[str, int]) -> None:
  """Raises DecodeError, one line, if the mesh splits anything but requests."""
  if max(sizes["fsdp"], sizes["tensor"]) > 1:
    raise DecodeError(
      "decode.invariant cannot split a model, as sums over devices have no fixed order: give "
      "--config.mesh.data=-1 --config.mesh.fsdp=1 --config.mesh.tensor=1"
    )


def forward(model: Transformer, state: State, tables: TokenTables, sampling: Sampling, limits: Limits,
            features: StepFeatures, live: jax.Array, branches: Branch) -> tuple:  # fmt: skip
  """What `step.forward` gives for each of W branches, with the leading axis W: caches, tokens, log_p, logits ([W, 0]
  unless `features.return_logits`). Lanes that are not `live` [W] get anything. Under a `jax.vmap` over requests their
  branches share tiles."""
  graph, weights = nnx.split(model)
  pool = list(zip(state.pool.keys, state.pool.values))
  known = state.replace(pool=None, logits=None, sight=None)
  run = custom_vmap(partial(_on_mesh, partial(_requests, graph, limits, features)))

  @run.def_vmap
  def _(size, batched, shared, requests):
    """More requests: their axis becomes a part of B."""
    spread = lambda x, own: x if own else jnp.broadcast_to(x, (size, *x.shape))
    each = jax.tree.map(spread, requests, batched[1])
    out = run(shared, jax.tree.map(lambda x: x.reshape(size * x.shape[1], *x.shape[2:]), each))
    out = jax.tree.map(lambda x: x.reshape(size, x.shape[0] // size, *x.shape[1:]), out)
    return out, jax.tree.map(lambda _: True, out)

  one = jax.tree.map(lambda x: x[None], (pool, (known, sampling), live, branches))
  return jax.tree.map(lambda x: x[0], run((weights, tables), one))


def _on_mesh(run, shared, requests):
  """Each device runs its own requests: the partitioner would gather them for a loop over tiles."""
  sizes = jax.sharding.get_abstract_mesh()
  if sizes.size <= 1:
    return run(shared, requests)
  check_mesh(sizes.shape)
  rows = PartitionSpec(*fitting(("data",), jax.tree.leaves(requests)[0].shape[:1], sizes.shape))
  return jax.shard_map(run, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False)(
    shared, requests
  )


def _requests(graph: Any, limits: Limits, features: StepFeatures, shared: Any, requests: Any) -> tuple:
  """`forward` for every live branch of B requests; every leaf of `requests` has a leading axis B."""
  weights, tables = shared
  pool, about, live, branches = requests
  n = live.size
  padded = -(-n // TILE) * TILE
  live_lanes = jnp.nonzero(live.reshape(-1), size=padded, fill_value=n)[0]
  flat = jax.tree.map(lambda x: _padded(x.reshape(n, *x.shape[2:]), padded), branches)
  owners = jnp.arange(padded) // live.shape[1]

  def tile(i: jax.Array) -> tuple:
    lanes = jax.lax.dynamic_slice_in_dim(live_lanes, i * TILE, TILE)
    used, lanes = lanes < n, jnp.minimum(lanes, n - 1)
    owner = owners[lanes]
    branch = jax.tree.map(lambda x: x[lanes], flat)
    state, sampling = jax.tree.map(lambda x: x[owner], about)
    model, t, sees = nnx.merge(graph, weights), branch.thread, branch.sees & used[:, None]
    positions = jax.vmap(lambda state: state.log.position)(state)
    window = sliding_window_mask(t.position[:, None], positions, model.config.window)
    attend = attention(
      sees, None if window is None else window[:, 0], owner, len(live), model.config.attention_softcap
    )
    hidden, cache = model(t.token, t.position, attend, pool)
    logits = model.logits(hidden)
    chosen = jax.vmap(partial(pick, tables=tables, limits=limits, features=features))
    return (
      cache,
      *chosen(logits, state, branch, sampling=sampling),
      logits[:, : None if features.return_logits else 0],
    )

  def add(i: jax.Array, out: tuple) -> tuple:
    write = lambda all, x: jax.lax.dynamic_update_slice_in_dim(all, x, i * TILE, 0)
    return jax.tree.map(write, out, tile(i))

  shapes = jax.eval_shape(tile, jnp.int32(0))
  blank = jax.tree.map(lambda x: jnp.zeros((padded, *x.shape[1:]), x.dtype), shapes)
  out = jax.lax.fori_loop(0, -(-live.sum() // TILE), add, blank)
  place = jnp.maximum(jnp.cumsum(live.reshape(-1)) - 1, 0).reshape(live.shape)
  return jax.tree.map(lambda x: x[place], out)


def attention(visible: jax.Array, window_mask: jax.Array | None, owner: jax.Array, requests: int,
              softcap: float) -> Attend:  # fmt: skip
  """`attend` of a tile's R rows to themselves and to what they see of their own pools, as `decode.attention.xla_decode`
  documents it for one row and one pool.

  `visible` and `window_mask` are [R, P], `owner` [R] says whose pool a row's is. In `attend` the caches are those of
  all requests, keys [B, K, H, P] and values [B, K, P, H], q is [R, K, G, H], k and v [R, K, H].
  """
  rows, entries = visible.shape
  blocks = -(-entries // BLOCK)
  visible = _padded(visible, blocks * BLOCK, 1)
  window_mask = None if window_mask is None else _padded(window_mask, blocks * BLOCK, 1)
  seen = visible.reshape(rows, 1, blocks, BLOCK).any(axis=-1)
  seen = (seen & (owner[:, None] == jnp.arange(requests))[..., None]).any(axis=0)  # [B, blocks], by any row
  order = jnp.nonzero(seen.reshape(-1), size=seen.size, fill_value=0)[0]

  def attend(cache: Any, q: jax.Array, k: jax.Array, v: jax.Array, local) -> tuple[jax.Array, Any]:
    keys, values = _padded(cache[0], blocks * BLOCK, 3), _padded(cache[1], blocks * BLOCK, 2)
    heads, groups, width = q.shape[1:]
    mask = layer_mask(visible, window_mask, local)
    q, k, v = q.astype(keys.dtype), k.astype(keys.dtype), v.astype(values.dtype)
    own = soft_cap(jnp.einsum("rkgh,rkh->krg", q, k, preferred_element_type=jnp.float32), softcap)
    by_head = q.transpose(1, 0, 2, 3).reshape(heads, rows * groups, width)

    def add(i: jax.Array, carry: tuple) -> tuple:
      peak, total, context = carry  # [K, R x G], and with H
      request, start = order[i] // blocks, order[i] % blocks * BLOCK
      key = jax.lax.dynamic_slice(keys, (request, 0, 0, start), (1, heads, width, BLOCK))[0]
      value = jax.lax.dynamic_slice(values, (request, 0, start, 0), (1, heads, BLOCK, width))[0]
      sees = jax.lax.dynamic_slice_in_dim(mask, start, BLOCK, 1) & (owner == request)[:, None]
      sees = jnp.repeat(sees, groups, axis=0)
      scores = jnp.einsum("krh,khp->krp", by_head, key, preferred_element_type=jnp.float32)
      scores = jnp.where(sees, soft_cap(scores, softcap), MASK_VALUE)
      new = jnp.maximum(peak, scores.max(axis=-1))
      weights, shrink = jnp.where(sees, jnp.exp(scores - new[..., None]), 0.0), jnp.exp(peak - new)
      more = jnp.einsum(
        "krp,kph->krh", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
      )
      return new, total * shrink + weights.sum(axis=-1), context * shrink[..., None] + more

    own = own.reshape(heads, rows * groups)
    itself = jnp.repeat(v.astype(jnp.float32).swapaxes(0, 1), groups, axis=1)
    _, total, context = jax.lax.fori_loop(0, seen.sum(), add, (own, jnp.ones_like(own), itself))
    context = (context / total[..., None]).reshape(heads, rows, groups, width)
    return context.swapaxes(0, 1), (k, v)

  return attend


def _padded(x: jax.Array, size: int, axis: int = 0) -> jax.Array:
  """`x` with zeros, or False, up to `size` along an axis."""
  more = size - x.shape[axis]
  return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)]) if more else x
