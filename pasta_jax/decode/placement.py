"""Where the state of requests lies on a mesh (`model.sharding`).

The pool is split over its key-value heads (axis `tensor`), as the keys and values that the sharded weights give. It is
replicated where there are fewer heads than devices, or they cannot be divided. The requests of a batch are split over
`data`. Everything else, a few numbers for each thread and pool entry, is replicated: a device decides for itself what
its threads do.
"""

from typing import Any

import jax
from jax.sharding import PartitionSpec

from pasta_jax.decode.state import KVPool, State
from pasta_jax.model.sharding import constrain_axes
from pasta_jax.model.transformer import Attend


def constrain_one(state: State) -> State:
  """A traced state of one request: what a program returns lies where it lay before."""
  return _constrain(state, ())


def constrain_batch(batch: Any) -> Any:
  """The same for states, or states and sampling, whose every leaf has a leading axis of requests."""
  return _constrain(batch, ("data",))


def _constrain(tree: Any, lead: tuple[str, ...]) -> Any:
  if jax.sharding.get_abstract_mesh().size <= 1:
    return tree
  whole = lambda x: constrain_axes(x, *lead, *[None] * (x.ndim - len(lead)))
  heads = lambda x: constrain_axes(x, *lead, "tensor", *[None] * (x.ndim - len(lead) - 1))
  return jax.tree.map(
    lambda x: jax.tree.map(heads if isinstance(x, KVPool) else whole, x),
    tree,
    is_leaf=lambda x: isinstance(x, KVPool),
  )


def on_heads(attend: Attend) -> Attend:
  """`attend` whose queries, keys and values [..., K, G, H], [..., K, H] lie as the pool does: over key-value heads, or,
  where these cannot be divided, the queries over their heads and the pool everywhere."""

  def placed(cache, q, k, v, local):
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
      return attend(cache, q, k, v, local)
    split = q.shape[-3] % mesh.shape["tensor"] == 0
    queries = ("tensor", None, None) if split else (None, "tensor", None)
    keys = ("tensor", None) if split else (None, None)
    put = lambda x, axes: constrain_axes(x, *[None] * (x.ndim - len(axes)), *axes)
    context, collected = attend(cache, put(q, queries), put(k, keys), put(v, keys), local)
    return put(context, queries), collected

  return placed


def replicated(x: jax.Array) -> jax.Array:
  """A traced array that every device needs whole, such as logits."""
  mesh = jax.sharding.get_abstract_mesh()
  return x if mesh.size <= 1 else jax.lax.with_sharding_constraint(x, PartitionSpec(*[None] * x.ndim))
