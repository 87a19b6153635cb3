"""Decoders from weights: flat named arrays in, NNX modules out, and the forms that training and decoding
use."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pasta_jax.model.config import ModelConfig
from pasta_jax.model.transformer import Embedder, Linear, RMSNorm, Transformer
from pasta_jax.weights.adapter import Adapter, Merged, merged_kernel
from pasta_jax.weights.arrays import aligned_empty, read_into, reading


def abstract(config: ModelConfig, dtype: Any, *, stacked: bool = False) -> Transformer:
  """The model with shapes in the place of arrays."""
  make = lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=dtype)
  return nnx.eval_shape(lambda: stack(make()) if stacked else make())


def from_params(
  config: ModelConfig,
  params: Mapping[str, Any],
  dtype: Any = jnp.float32,
  *,
  stacked: bool = False,
  put: Callable[[str, np.ndarray], jax.Array] = lambda name, x: jax.device_put(x),
) -> Transformer:
  """A decoder that holds `params`, named as `checkpoint.Checkpoint` names them ("layers.0.attn.q.kernel").

  Matrices are cast to `dtype`, norm scales and biases stay float32. Parameters that are read when they are
  asked for are read one by one, straight into that type. `stacked`: in the form of `stack`. `put(name,
  array)` brings an array to where it is to lie, before the next one is read; the default leaves it where host
  and device are one.

  Raises ValueError naming the first parameter that is missing, left over or of the wrong shape.
  """
  graph, state = nnx.split(abstract(config, dtype, stacked=stacked))
  left = set(params)

  def read(name: str, out: np.ndarray) -> None:
    if name not in left:
      raise ValueError(f"parameter {name} is missing")
    left.remove(name)
    if not hasattr(params, "read_into") and np.shape(params[name]) != out.shape:
      raise ValueError(f"parameter {name} has shape {np.shape(params[name])}, the model needs {out.shape}")
    read_into(params, name, out)
    advance()

  def fill(path, leaf):
    name = ".".join(str(getattr(p, "key", getattr(p, "name", p))) for p in path if str(p) != ".value")
    out = aligned_empty(leaf.shape, leaf.dtype)
    if stacked and name.startswith("layers."):
      for i in range(config.n_layers):
        read(f"layers.{i}.{name.removeprefix('layers.')}", out[i])
    else:
      read(name, out)
    return put(name, out)

  with reading(params) as advance:
    state = jax.tree_util.tree_map_with_path(fill, state)
  if left:
    raise ValueError(f"unexpected parameter {min(left)}")
  return nnx.merge(graph, state)


def stack(model: Transformer) -> Transformer:
  """The same model with its layers in one module whose leaves have a leading layer axis (for `lax.scan`)."""
  graphs, states = zip(*(nnx.split(layer) for layer in model.layers))
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
  return _with_layers(model, nnx.merge(graphs[0], stacked))


def unstack(model: Transformer) -> Transformer:
  """The inverse of `stack`."""
  graph, state = nnx.split(model.layers)
  n = model.config.n_layers
  one = lambda i: nnx.merge(graph, jax.tree.map(lambda x: x[i], state))
  return _with_layers(model, nnx.List([one(i) for i in range(n)]))


def _with_layers(model: Transformer, layers: Any) -> Transformer:
  """A shallow copy of the model around other layers."""
  copy = nnx.merge(*nnx.split(model))
  copy.layers = nnx.data(layers)
  return copy


def linears(model: Transformer) -> dict[str, Linear]:
  """The linear modules inside the layers, by path ("layers.0.attn.q"); one entry each where stacked."""
  return {
    ".".join(map(str, path)): module
    for path, module in nnx.iter_modules(model)
    if isinstance(module, Linear) and path[0] == "layers"
  }


def adapter_of(model: Transformer) -> Adapter:
  """The updates and tag rows that a model has, its layers stacked or not."""
  model = model if isinstance(model.layers, nnx.List) else unstack(model)
  found = {name: m for name, m in linears(model).items() if m.lora_a is not None and m.lora_b is not None}
  value = lambda param: None if param is None else param[...]
  return Adapter(
    scale=next((m.lora_scale for m in found.values()), 1.0),
    factors={name: (m.lora_a[...], m.lora_b[...]) for name, m in found.items()},  # type: ignore[index]
    tags=value(model.embed.tags),
    head_tags=value(model.head_tags),
  )


def for_decoding(
  config: ModelConfig, params: Mapping[str, Any], adapter: Adapter | None, dtype: Any
) -> Transformer:
  """The form that decodes fastest: updates merged, tags in the tables, head untied and stored as [D, V].

  A separate head costs V x D weights of memory; a matrix product with the embedding's transpose would cost
  a transposition each step.
  """
  whole = Merged(config, params, adapter, untied=True)
  return from_params(whole.config, whole, dtype)


def to_params(model: Transformer, *, updates: bool = True) -> dict[str, jax.Array]:
  """The inverse of `from_params`, low-rank updates merged, or left out; tag rows that are kept apart are left
  out."""
  if not isinstance(model.layers, nnx.List):
    model = unstack(model)
  adapter = adapter_of(model) if updates else None
  params = {}
  for path, module in nnx.iter_modules(model):
    name = ".".join(map(str, path))
    if isinstance(module, Embedder):
      params[f"{name}.embedding"] = module.embedding[...]
    elif isinstance(module, RMSNorm):
      params[f"{name}.scale"] = module.scale[...]
    elif isinstance(module, Linear):
      kernel = module.kernel[...]
      if adapter is not None and name in adapter.factors:
        kernel = merged_kernel(kernel.astype(jnp.float32), adapter.factors[name], adapter.scale)
      params[f"{name}.kernel"] = kernel
      if module.bias is not None:
        params[f"{name}.bias"] = module.bias[...]
  return params
