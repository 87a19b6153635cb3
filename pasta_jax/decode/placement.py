"""Where the state of requests lies on a mesh (`model.sharding`).

The pool is split over its key-value heads (axis `tensor`), as the keys and values that the sharded weights give. It is
replicated where there are fewer heads than devices, or they cannot be divided. The requests of a batch are split over
`data`. Everything else, a few numbers for each thread and pool entry, is replicated: a device decides for itself what
its threads do. Logits are left to the partitioner, which keeps them split over the vocabulary: gathering them would
move several times the bytes of all other collectives.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from pasta_jax.decode.state import KVPool, State
from pasta_jax.model.sharding import constrain_axes, fitting, head_axes
from pasta_jax.model.transformer import Attend


def specs(tree: Any, sizes: Mapping[str, int], *, batch: bool = False) -> Any:
  """The PartitionSpec of every array of a state, or of states and their sampling in a `batch`, whose every leaf has a
  leading axis of requests; `sizes` are those of the mesh."""
  lead = ("data",) if batch else ()

  def spec(x, *axes: str | None) -> PartitionSpec:
    axes = (*lead, *axes)
    return PartitionSpec(*fitting((*axes, *[None] * (x.ndim - len(axes))), x.shape, sizes))

  of_pool = lambda pool: jax.tree.map(lambda x: spec(x, "tensor"), pool)
  is_pool = lambda x: isinstance(x, KVPool)
  return jax.tree.map(lambda x: of_pool(x) if is_pool(x) else spec(x), tree, is_leaf=is_pool)


def constrain_one(state: State) -> State:
  """A traced state of one request: what a program returns lies where it lay before."""
  return _constrain(state, batch=False)


def constrain_batch(batch: Any) -> Any:
  """The same for the requests of a batch."""
  return _constrain(batch, batch=True)


def _constrain(tree: Any, *, batch: bool) -> Any:
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size <= 1:
    return tree
  return jax.tree.map(jax.lax.with_sharding_constraint, tree, specs(tree, mesh.shape, batch=batch))


def on_heads(attend: Attend) -> Attend:
  """`attend` whose queries, keys and values [..., K, G, H], [..., K, H] lie as the pool does: over key-value heads, or,
  where these cannot be divided, the queries over their heads and the pool everywhere."""

  def placed(cache, q, k, v, local):
    if jax.sharding.get_abstract_mesh().size <= 1:
      return attend(cache, q, k, v, local)
    heads, groups = head_axes(*q.shape[-3:-1])
    put = lambda x, *axes: constrain_axes(x, *[None] * (x.ndim - len(axes)), *axes)
    k, v = (put(x, heads, None) for x in (k, v))
    context, collected = attend(cache, put(q, heads, groups, None), k, v, local)
    return put(context, heads, groups, None), collected

  return placed
