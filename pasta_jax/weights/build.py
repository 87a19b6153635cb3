"""Models from weights: named arrays in, NNX modules out, in the forms that training and decoding use."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from pasta_jax.model.config import ModelConfig
from pasta_jax.model.lora import Adapter, adapter_of, merged_kernel
from pasta_jax.model.products import check_product
from pasta_jax.model.sharding import shard_put_array
from pasta_jax.model.transformer import (
  BEFORE_PRODUCTS,
  FUSED,
  Embedder,
  Linear,
  RMSNorm,
  Transformer,
  split_gate_up,
  split_qkv,
  stack,
  unstack,
)
from pasta_jax.weights.adapter import Merged
from pasta_jax.weights.arrays import Arena, aligned_empty, read_into, reading
from pasta_jax.weights.quantise import FORMATS, check_weights, quantise


def _parts(name: str, array: Any, config: ModelConfig) -> dict[str, tuple[Any, tuple[int, ...]]]:
  """The parameters that an array of a model consists of: by name ("layers.0.attn.q.kernel"), where it is in the array
  (a view, if that is NumPy's) and the parameter's shape. More than one for arrays of the fused form only."""
  *path, module, kind = name.split(".")
  if module not in FUSED:
    return {name: (array, array.shape)}
  split = split_qkv(array, config) if module == "qkv" else split_gate_up(array)
  lead = array.shape[:-2]
  shape = lambda x: (*lead, math.prod(x.shape[len(lead) :]))
  return {".".join((*path, part, kind)): (x, shape(x)) for part, x in zip(FUSED[module], split)}


def abstract(
  config: ModelConfig, dtype: Any, *, stacked: bool = False, fused: bool = False, weights: str = ""
) -> Transformer:
  """The model with `jax.ShapeDtypeStruct` in place of arrays; the arguments are those of `from_params`."""
  make = lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=dtype, fused=fused)
  model = nnx.eval_shape(lambda: stack(make()) if stacked else make())
  if weights:
    for _, module in nnx.iter_modules(model):
      if isinstance(module, Linear):
        module.in_8_bits(FORMATS[weights].dtype)
  return model


def from_params(
  config: ModelConfig,
  params: Mapping[str, Any],
  dtype: Any = jnp.float32,
  *,
  stacked: bool = False,
  fused: bool = False,
  weights: str = "",
  put: Callable[[str, np.ndarray], jax.Array] | None = None,
  product: str = "xla",
) -> Transformer:
  """A model with the given `params`, named as in `arrays.param_shapes` ("layers.0.attn.q.kernel").

  Matrices are cast to `dtype`; norm scales and biases stay float32. Lazy parameters are read one by one,
  directly into that dtype, or in float32 where they are then stored in 8 bits.

  Args:
    stacked: return the model in the form of `transformer.stack`.
    fused: return the fused form of `transformer.Transformer`; `params` are those of the other one.
    weights: a key of `quantise.FORMATS`: linear layers and a separate head get kernels in 8 bits, and `kernel_scale`;
      `dtype` stays that of embeddings and of products. Not with `stacked`.
    put: (name, array) -> the array on its devices; called for each array before the next one is read. Without it
      arrays go to the default device, and are not copied if host and device share memory.
    product: the matrix product of all linear modules, a key of `products.PRODUCTS`; training needs "xla".

  Raises:
    ValueError: names the first parameter that is missing, unexpected or of another shape, the unknown product,
      or the format of weights that cannot be used.
  """
  check_product(product)
  check_weights(weights)
  model = abstract(config, dtype, stacked=stacked, fused=fused, weights=weights)
  for path, module in nnx.iter_modules(model):
    if isinstance(module, Linear):
      module.product = product
    elif isinstance(module, RMSNorm) and path[-1] in BEFORE_PRODUCTS:
      module.kernel = product == "numba" and jnp.dtype(dtype) == jnp.bfloat16
  graph, state = nnx.split(model)
  put = put or (lambda name, x: jax.device_put(x))
  left, arena = set(params), Arena()
  scales: dict[str, np.ndarray] = {}  # of kernels that have been stored, by the name of their array

  def read(name: str, out: np.ndarray) -> None:
    if name not in left:
      raise ValueError(f"parameter {name} is missing")
    left.remove(name)
    if not hasattr(params, "read_into") and np.shape(params[name]) != out.shape:
      raise ValueError(f"parameter {name} has shape {np.shape(params[name])}, the model needs {out.shape}")
    read_into(params, name, out)
    advance()

  def store(name: str, out: np.ndarray) -> None:
    """Fills one array of the model, or of one layer. The parts of a fused one are read one after the other."""
    for part, (view, shape) in _parts(name, out, config).items():
      one = out if view is out else np.empty(shape, out.dtype)
      read(part, one)
      if view is not out:
        view[...] = one.reshape(view.shape)

  def store_in_8_bits(name: str, out: np.ndarray) -> None:
    """The same for a kernel in 8 bits, and its scales."""
    scales[f"{name}_scale"] = scale = aligned_empty(out.shape[1:], np.float32)
    scale_of = {part: view for part, (view, _) in _parts(f"{name}_scale", scale, config).items()}
    for part, (view, shape) in _parts(name, out, config).items():
      one = out if view is out else np.empty(shape, out.dtype)
      whole = np.empty(shape, np.float32)
      read(part, whole)
      of_part, where = quantise(whole, one), scale_of[f"{part}_scale"]
      where[...] = of_part.reshape(where.shape)
      if view is not out:
        view[...] = one.reshape(view.shape)

  def fill(path, leaf):
    name = ".".join(str(getattr(p, "key", getattr(p, "name", p))) for p in path if str(p) != ".value")
    if name in scales:  # leaves are visited in the order of their names: a kernel comes before its scales
      return put(name, scales.pop(name))
    out = arena.empty(leaf.shape, leaf.dtype)
    if weights and name.endswith(".kernel"):
      store_in_8_bits(name, out)
    elif stacked and name.startswith("layers."):
      for i in range(config.n_layers):
        store(f"layers.{i}.{name.removeprefix('layers.')}", out[i])
    else:
      store(name, out)
    return put(name, out)

  with reading(params) as advance:
    state = jax.tree_util.tree_map_with_path(fill, state)
  if left:
    raise ValueError(f"unexpected parameter {min(left)}")
  return nnx.merge(graph, state)


def for_decoding(
  config: ModelConfig,
  params: Mapping[str, Any],
  adapter: Adapter | None,
  dtype: Any,
  *,
  product: str = "xla",
  fused: bool = True,
  weights: str = "",
  mesh: Mesh | None = None,
) -> Transformer:
  """The form that decodes fastest: updates merged, tags in the embedding table, head untied and stored as [D,
  V], layers fused.

  A separate head costs V x D weights of memory; a product with the transposed embedding would cost a
  transposition in each step. `product` is the matrix product of all linear modules, a key of
  `products.PRODUCTS`; `fused` says whether layers have the fused form, `weights` in which 8 bits matrices are stored
  ("": in `dtype`). On a `mesh` each array is put where it belongs (`model.sharding`) before the next one is read.
  Raises as `from_params`.
  """
  merged = Merged(config, params, adapter, untied=True)
  put = None if mesh is None else partial(shard_put_array, mesh)
  return from_params(merged.config, merged, dtype, fused=fused, weights=weights, put=put, product=product)


def to_params(model: Transformer, *, updates: bool = True) -> dict[str, jax.Array]:
  """The inverse of `from_params`, of any form: low-rank updates are merged into the kernels, or left out if not
  `updates`; separate tag rows are left out. Matrices in 8 bits are given in float32."""
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
      if module.kernel_scale is not None:
        kernel = kernel.astype(jnp.float32) * module.kernel_scale[...]
      if adapter is not None and name in adapter.factors:
        kernel = merged_kernel(kernel.astype(jnp.float32), adapter.factors[name], adapter.scale)
      arrays = {"kernel": kernel} if module.bias is None else {"kernel": kernel, "bias": module.bias[...]}
      for kind, array in arrays.items():
        split = _parts(f"{name}.{kind}", array, model.config)
        params |= {part: x.reshape(shape) for part, (x, shape) in split.items()}
  return params
