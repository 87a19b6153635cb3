"""Decoders from weights: flat named arrays in, NNX modules out, and the forms that training and decoding use."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pasta_jax.model.config import ModelConfig
from pasta_jax.model.decoder import Decoder, Embedder, Linear, RMSNorm, with_tags


def abstract(config: ModelConfig, dtype: Any) -> Decoder:
  """The model with shapes in the place of arrays."""
  return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype))


def from_params(config: ModelConfig, params: Mapping[str, np.ndarray], dtype: Any = jnp.float32) -> Decoder:
  """A decoder that holds `params`, named as `checkpoint.Checkpoint` names them ("layers.0.attn.q.kernel").

  Matrices are cast to `dtype`, norm scales and biases stay float32. Raises ValueError naming the first parameter that
  is missing, left over or of the wrong shape.
  """
  model = abstract(config, dtype)
  graph, state = nnx.split(model)
  left = dict(params)

  def fill(path, leaf):
    name = ".".join(str(getattr(p, "key", getattr(p, "name", p))) for p in path if str(p) != ".value")
    value = left.pop(name, None)
    if value is None:
      raise ValueError(f"parameter {name} is missing")
    if value.shape != leaf.shape:
      raise ValueError(f"parameter {name} has shape {value.shape}, the model needs {leaf.shape}")
    return jnp.asarray(value, leaf.dtype)

  state = jax.tree_util.tree_map_with_path(fill, state)
  if left:
    raise ValueError(f"unexpected parameter {min(left)}")
  return nnx.merge(graph, state)


def stack(model: Decoder) -> Decoder:
  """The same model with its layers in one module whose leaves have a leading layer axis (for `lax.scan`)."""
  graphs, states = zip(*(nnx.split(layer) for layer in model.layers))
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
  return _with_layers(model, nnx.merge(graphs[0], stacked))


def unstack(model: Decoder) -> Decoder:
  """The inverse of `stack`."""
  graph, state = nnx.split(model.layers)
  n = model.config.n_layers
  one = lambda i: nnx.merge(graph, jax.tree.map(lambda x: x[i], state))
  return _with_layers(model, nnx.List([one(i) for i in range(n)]))


def _with_layers(model: Decoder, layers: Any) -> Decoder:
  """A shallow copy of the model around other layers."""
  copy = nnx.merge(*nnx.split(model))
  copy.layers = nnx.data(layers)
  return copy


def for_decoding(model: Decoder, dtype: Any) -> Decoder:
  """The form that decodes fastest: updates merged, tags in the tables, head untied and stored as [D, V].

  A separate head costs V x D weights of memory; a matrix product with the embedding's transpose would cost
  a transposition each step. `model` is left as it is; its layers may be stacked.
  """
  config, params = merged(model)
  if config.tie_embeddings:
    params["head.kernel"] = params["embed.embedding"].T
  config = dataclasses.replace(config, tie_embeddings=False)
  return from_params(config, {k: np.asarray(v, np.float32) for k, v in params.items()}, dtype)


def merged(model: Decoder) -> tuple[ModelConfig, dict[str, jax.Array]]:
  """Architecture and parameters of the model with updates merged and the tags among the vocabulary's rows, where
  `config.tag_ids` then says."""
  params = to_params(model)
  table = params["embed.embedding"] = model.embed.table()
  if model.head is not None and model.head_tags is not None:
    params["head.kernel"] = with_tags(model.head.kernel[...], model.head_tags[...], model.config.tag_ids, axis=1)
  ids = model.config.tag_ids or tuple(range(model.config.vocab_size, len(table)))
  return dataclasses.replace(model.config, vocab_size=len(table), tag_ids=ids), params


def to_params(model: Decoder) -> dict[str, jax.Array]:
  """The inverse of `from_params`, low-rank updates merged; tag rows that are kept apart are left out."""
  if not isinstance(model.layers, nnx.List):
    model = unstack(model)
  params = {}
  for path, module in nnx.iter_modules(model):
    name = ".".join(map(str, path))
    if isinstance(module, Embedder):
      params[f"{name}.embedding"] = module.embedding[...]
    elif isinstance(module, RMSNorm):
      params[f"{name}.scale"] = module.scale[...]
    elif isinstance(module, Linear):
      params[f"{name}.kernel"] = merged_kernel(module)
      if module.bias is not None:
        params[f"{name}.bias"] = module.bias[...]
  return params


def merged_kernel(linear: Linear) -> jax.Array:
  """Kernel with its low-rank update added, float32; leading layer axes pass through."""
  kernel = linear.kernel[...].astype(jnp.float32)
  if linear.lora_a is None or linear.lora_b is None:
    return kernel
  return kernel + linear.lora_scale * (linear.lora_a[...] @ linear.lora_b[...])
