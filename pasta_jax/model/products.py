"""Matrix products that a linear layer may use, by name: where a kernel for decoding goes in.

xla    plain JAX
numba  the kernel of `pasta_jax.cpu`, on CPU for x in bfloat16; xla for others

Training uses "xla" only. For decoding, `weights.build.for_decoding(..., product=NAME)` sets the product of
every linear layer and of the head. To add a kernel:

1. Write a function (x [..., in], kernel [in, *out], scale [*out] or None) -> [..., *out]. `out` has two dimensions for
   matrices that are fused (`transformer.FUSED`), which a device reads as one matrix [in, prod(out)], otherwise one.
   `x` is float32 or bfloat16, and `kernel` one of

       the dtype of `x`         `scale` is None
       int8, float8_e4m3fn      `scale` float32, one for each output channel (weights.quantise)

   The result is the sum over `in` of x * kernel, times `scale` where there is one. 8-bit numbers are converted to the
   dtype of `x`, which is exact; the sum is one of float32, and is scaled in float32. A function that is for some of
   these formats calls `xla_product` for the others. No gradient is needed. The function must accept any number of
   leading axes: a prefill calls it with x [1, T, in]. A decode step calls it with x [in] under `jax.vmap`: once over
   the W branches of a request, and once more over requests in batch decoding. A Pallas kernel that should read the
   kernel matrix once for all branches defines its own batching rule (`jax.custom_batching.custom_vmap`), which gets
   x [W, in] and the unbatched kernel and scale.
2. Add it to `PRODUCTS`, and its name to `config.sections.KERNELS`; `--config.decode.kernels=NAME` selects it.

tests/model/test_products.py compares every entry of `PRODUCTS` with float64, with and without `jax.vmap`.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from pasta_jax.cpu import calls, programs

# (x [..., in], kernel [in, *out], scale [*out] or None) -> [..., *out] float32
Product = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]


@jax.custom_vjp
def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
  """[..., m, k] @ [..., k, n] -> float32; both operands have one dtype, and `y` has the same leading axes as
  `x` or none.

  The backward pass rounds the cotangent to the operands' dtype before its two products: with bfloat16 weights
  XLA would otherwise promote them to float32 products, which take three times as long on CPU.
  """
  return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def _matmul_forward(x, y):
  return matmul(x, y), (x, y)


def _matmul_backward(operands, cotangent):
  x, y = operands
  cotangent = cotangent.astype(x.dtype)
  x_bar = jnp.matmul(cotangent, jnp.swapaxes(y, -1, -2), preferred_element_type=jnp.float32).astype(x.dtype)
  if y.ndim == 2:
    x, cotangent = x.reshape(-1, x.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1])
  y_bar = jnp.matmul(jnp.swapaxes(x, -1, -2), cotangent, preferred_element_type=jnp.float32).astype(y.dtype)
  return x_bar, y_bar


matmul.defvjp(_matmul_forward, _matmul_backward)


def xla_product(x: jax.Array, kernel: jax.Array, scale: jax.Array | None = None) -> jax.Array:
  """[..., in] by [in, *out] -> [..., *out] float32; see the module for the contract. A kernel of two dimensions
  without `scale` has the gradient of `matmul`.

  The kernel is not reshaped: the partitioner shards the dimensions that it has.
  """
  if scale is None and kernel.ndim == 2:
    return matmul(x, kernel)
  if scale is not None:
    # Made to depend on `x`, the conversion stays in the product. XLA would otherwise move it out of the loop over
    # steps, and read a whole model of converted matrices in every step; on CPU, where it cannot be a part of the
    # product, that is the faster way. The platform is that which is compiled for (`decode.ahead`).
    both = lambda *operands: operands
    x, kernel = jax.lax.platform_dependent(
      x, kernel, cpu=both, default=lambda *o: jax.lax.optimization_barrier(o)
    )
  y = jnp.tensordot(x, kernel.astype(x.dtype), 1, preferred_element_type=jnp.float32)
  return y if scale is None else y * scale


_FEW = 64  # rows


def numba_product(x: jax.Array, kernel: jax.Array, scale: jax.Array | None = None) -> jax.Array:
  """The same by the kernel for CPU, where it is for these operands. A prompt in bfloat16 is XLA's: its product of many
  rows is 1.2 times as fast."""
  prompt = x.ndim > 1 and x.shape[-2] > _FEW and kernel.dtype == jnp.bfloat16
  if prompt or not calls.multiplies(x, kernel):
    return xla_product(x, kernel, scale)
  programs.require()
  return calls.multiply(x, kernel, jnp.zeros(0, jnp.float32) if scale is None else scale)


def gated_product(
  name: str, x: jax.Array, kernel: jax.Array, scale: jax.Array | None, activation: str
) -> jax.Array:
  """[..., in] by [in, 2, F]: the `activation`, a key of `ACTIVATIONS`, of the first half times the second, [..., F], by
  the product `name`; rounded to bfloat16 if a kernel computes all at once."""
  few = x.ndim == 1 or x.shape[-2] <= _FEW
  if name == "numba" and few and calls.multiplies(x, kernel) and kernel.shape[2] >= calls.PANEL:
    programs.require()
    which = jnp.full(1, calls.ACTIVATIONS[activation], jnp.int32)
    return calls.gated(x, kernel, jnp.zeros(0, jnp.float32) if scale is None else scale, which)
  y = PRODUCTS[name](x, kernel, scale)
  return ACTIVATIONS[activation](y[..., 0, :]) * y[..., 1, :]


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float, kernel: bool = False) -> jax.Array:
  """Root-mean-square normalisation over the last axis, [..., D] by [D] float32. With `kernel` the kernel for CPU
  computes that of few rows, and rounds it to bfloat16, as the product behind it would."""
  if kernel and (x.ndim == 1 or x.shape[-2] <= _FEW) and x.shape[-1] % calls.LANES == 0:
    programs.require()
    return calls.normalise(x, scale, jnp.full(1, epsilon, jnp.float32))
  mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(mean_square + epsilon) * scale


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "silu": jax.nn.silu,
  "gelu": partial(jax.nn.gelu, approximate=True),
}
PRODUCTS: dict[str, Product] = {"xla": xla_product, "numba": numba_product}


def resolve_kernels(name: str, dtype: str, mesh: Any = None) -> str:
  """The programs of decoding on this machine, "xla" or "numba", that a value of `decode.kernels` stands for in a
  precision of `decode.dtype`. Those of precisions that numba has no kernels for are XLA's. Raises ValueError, one line,
  if numba's are asked for and cannot be used."""
  if name == "xla" or dtype not in calls.PRECISIONS:
    return "xla"
  here = jax.default_backend()
  if name == "auto" and (mesh is not None or here != "cpu"):
    return "xla"
  if mesh is not None:
    raise ValueError("decode.kernels=numba is for one CPU, not for a mesh: leave it at auto")
  if here != "cpu":
    raise ValueError(f"decode.kernels=numba cannot run on this machine's {here}: leave it at auto")
  if not (reason := programs.unusable()):
    return "numba"
  if name == "numba":
    raise ValueError(f"decode.kernels=numba cannot be used: {reason}")
  _say_once(f"decoding by XLA, which is slower on CPU: the kernels cannot be used ({reason})")
  return "xla"


_say_once = functools.cache(logging.warning)


def check_product(name: str) -> None:
  """Raises ValueError, one line, if `PRODUCTS` has no product of that name."""
  if name not in PRODUCTS:
    raise ValueError(f"unknown matrix product {name!r}: choose one of {', '.join(PRODUCTS)}")
