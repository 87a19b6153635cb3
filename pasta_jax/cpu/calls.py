"""The kernels as functions of JAX arrays, on which `jax.vmap` adds rows or requests."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

# `panels.PANEL`: columns of the narrowest matrix, and what entries and head sizes must be a multiple of.
PANEL = 64
LANES = 16  # what rows of a normalisation must be a multiple of: the longest vector's numbers
_FORMATS = (jnp.bfloat16, jnp.int8)
PRECISIONS = ("bfloat16", "int8")  # values of `decode.dtype` whose products these are


def multiplies(x: jax.Array, kernel: jax.Array) -> bool:
  """Whether `multiply` is for these operands: x [..., in] and kernel [in, *out]."""
  width = kernel.size // max(kernel.shape[0], 1)
  return x.dtype == jnp.bfloat16 and kernel.dtype in _FORMATS and kernel.shape[0] % 2 == 0 and width >= PANEL


@custom_vmap
def multiply(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
  """x [..., in] @ kernel [in, *out] times `scale` [*out], or [0] for a kernel in bfloat16 -> [..., *out] float32."""
  rows = x.reshape(-1, x.shape[-1])
  out = jax.ShapeDtypeStruct((rows.shape[0], *kernel.shape[1:]), jnp.float32)
  y = jax.ffi.ffi_call("pasta_jax_cpu_product", out)(rows, kernel, scale)
  return y.reshape(*x.shape[:-1], *kernel.shape[1:])


@multiply.def_vmap
def _(size: int, batched, x, kernel, scale):
  if batched[1] or batched[2]:  # every row with a matrix of its own
    each = [
      a if own else jnp.broadcast_to(a, (size, *a.shape)) for a, own in zip((x, kernel, scale), batched)
    ]
    return jax.lax.map(lambda operands: multiply(*operands), tuple(each)), True
  return multiply(x, kernel, scale), True


ACTIVATIONS = {"silu": 0, "gelu": 1}  # `panels.SILU`, `panels.GELU`


@custom_vmap
def gated(x: jax.Array, kernel: jax.Array, scale: jax.Array, activation: jax.Array) -> jax.Array:
  """x [..., in] by kernel [in, 2, F], as `multiply`: the activation, int32 [1], of the first part times the second ->
  [..., F] bfloat16."""
  rows = x.reshape(-1, x.shape[-1])
  out = jax.ShapeDtypeStruct((rows.shape[0], kernel.shape[2]), jnp.bfloat16)
  y = jax.ffi.ffi_call("pasta_jax_cpu_gated_product", out)(rows, kernel, scale, activation)
  return y.reshape(*x.shape[:-1], kernel.shape[2])


@gated.def_vmap
def _(size: int, batched, x, kernel, scale, activation):
  if batched[1] or batched[2] or batched[3]:
    raise NotImplementedError("a gated product has one kernel for all rows")
  return gated(x, kernel, scale, activation), True


@custom_vmap
def normalise(x: jax.Array, scale: jax.Array, epsilon: jax.Array) -> jax.Array:
  """Root-mean-square normalisation of x [..., D] by `scale` [D], and epsilon [1], all float32 -> [..., D] bfloat16."""
  rows = x.reshape(-1, x.shape[-1])
  out = jax.ShapeDtypeStruct(rows.shape, jnp.bfloat16)
  return jax.ffi.ffi_call("pasta_jax_cpu_norm", out)(rows, scale, epsilon).reshape(x.shape)


@normalise.def_vmap
def _(size: int, batched, x, scale, epsilon):
  if batched[1] or batched[2]:
    raise NotImplementedError("a normalisation has one scale for all rows")
  return normalise(x, scale, epsilon), True


def attends(keys: jax.Array) -> bool:
  """Whether `attend` is for a pool of this dtype and shape, [..., H, P]."""
  return keys.dtype == jnp.bfloat16 and keys.shape[-1] % PANEL == 0 and keys.shape[-2] % PANEL == 0


def attend(keys: Any, values: Any, mask: Any, q: Any, k: Any, v: Any, softcap: float) -> jax.Array:
  """keys [B, K, H, P], values [B, K, P, H], mask [B, W, P], q [B, W, K, G, H], k and v [B, W, K, H], in the dtype of
  the pool -> [B, W, K, G, H] in that dtype."""
  out = jax.ShapeDtypeStruct(q.shape, keys.dtype)
  run = jax.ffi.ffi_call("pasta_jax_cpu_attention", out)
  return run(keys, values, mask, q, k, v, jnp.full(1, softcap, jnp.float32))


@custom_vmap
def append(
  pools: list[jax.Array], rows: list[jax.Array], used: jax.Array, after: jax.Array
) -> list[jax.Array]:
  """Keys [K, H, P] and, after them, values [K, P, H] of all layers, with the rows [W, K, H] of each written behind the
  `used` entries, in place. XLA would convert whole pools in bfloat16 to float32 and back for it. `after` is what must
  have been computed before."""
  every = len(pools)
  out = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pools]
  write = jax.ffi.ffi_call("pasta_jax_cpu_append", out, input_output_aliases={i: i for i in range(every)})
  return list(write(*pools, *rows, used, after))


@append.def_vmap
def _(size: int, batched, pools, rows, used, after):
  each = lambda x, own: x if own else jnp.broadcast_to(x, (size, *x.shape))
  operands = jax.tree.map(each, (pools, rows, used, after), tuple(batched))
  out = append(*operands)
  return out, jax.tree.map(lambda _: True, out)
