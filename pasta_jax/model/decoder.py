"""A decoder-only transformer (llama family) as Flax NNX modules. It knows tokens and positions, no threads.

Every module works on any leading axes: training calls the decoder on [B, T], the interpreter on one token
under `jax.vmap`. What a query may see is the caller's affair: the decoder hands each layer's queries, keys
and values to `attend`, which answers with the attention's result.

Letters in comments and einsums are those of `config.ModelConfig`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pasta_jax.model.config import ModelConfig

# (cache of this layer, queries [..., K, G, H], keys [..., K, H], values [..., K, H])
#   -> (context [..., K, G, H], anything to collect per layer)
Attend = Callable[[Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class LoraParam(nnx.Param):
  """A factor of a low-rank update."""


class TagParam(nnx.Param):
  """Rows of the vocabulary that PASTA adds."""


DTYPES = ("float32", "bfloat16")


def exact_products(dtype: str) -> None:
  """Makes float32 products float32 on TPU and newer GPUs, which round their operands otherwise.

  A setting of the whole process; float32 is chosen for exactness, bfloat16 for speed.
  """
  if dtype == "float32" and jax.default_backend() != "cpu":
    jax.config.update("jax_default_matmul_precision", "highest")


@jax.custom_vjp
def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
  """[..., m, k] @ [..., k, n] -> float32, both operands of one dtype, leading axes equal or absent from y.

  The cotangent is rounded to the operands' dtype before the two products of the backward pass: with bfloat16
  weights XLA would otherwise promote them to float32 products, three times slower on CPU.
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


class Linear(nnx.Module):
  """x @ kernel, plus a low-rank update where `lora.add_lora` has put one. Accumulates in float32."""

  def __init__(self, n_in: int, n_out: int, *, rngs: nnx.Rngs, dtype: Any):
    scale = n_in ** -0.5
    self.kernel = nnx.Param((jax.random.normal(rngs.params(), (n_in, n_out)) * scale).astype(dtype))
    self.lora_a: LoraParam | None = nnx.data(None)  # [in, r]
    self.lora_b: LoraParam | None = nnx.data(None)  # [r, out]
    self.lora_scale = 0.0

  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., in] -> [..., out] float32."""
    kernel = self.kernel[...]
    x = x.astype(kernel.dtype)
    y = matmul(x, kernel)
    if self.lora_a is not None and self.lora_b is not None:
      low = matmul(x, self.lora_a[...].astype(x.dtype))
      y = y + self.lora_scale * matmul(low.astype(x.dtype), self.lora_b[...].astype(x.dtype))
    return y


class RMSNorm(nnx.Module):
  """Root-mean-square normalisation in float32."""

  def __init__(self, width: int, eps: float):
    self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., D] -> [..., D]."""
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + self.eps) * self.scale[...]


def rope_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines, [..., 1, H/2] each, for rotate-half RoPE at integer `positions` [...]."""
  frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  angle = positions[..., None, None].astype(jnp.float32) * frequency
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Applies RoPE to [..., heads, H]."""
  cos, sin = angles
  first, second = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nnx.Module):
  """Grouped-query attention around a caller's `attend`."""

  def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs, dtype: Any):
    self.q = Linear(c.d_model, c.n_heads * c.head_dim, rngs=rngs, dtype=dtype)
    self.k = Linear(c.d_model, c.n_kv_heads * c.head_dim, rngs=rngs, dtype=dtype)
    self.v = Linear(c.d_model, c.n_kv_heads * c.head_dim, rngs=rngs, dtype=dtype)
    self.o = Linear(c.n_heads * c.head_dim, c.d_model, rngs=rngs, dtype=dtype)
    self.config = c

  def __call__(self, x, angles, attend: Attend, cache) -> tuple[jax.Array, Any]:
    """[..., D] -> [..., D], and what `attend` collects."""
    c, lead = self.config, x.shape[:-1]
    q = rotate(self.q(x).reshape(*lead, c.n_heads, c.head_dim), angles)
    k = rotate(self.k(x).reshape(*lead, c.n_kv_heads, c.head_dim), angles)
    v = self.v(x).reshape(*lead, c.n_kv_heads, c.head_dim)
    q = q.reshape(*lead, c.n_kv_heads, c.n_groups, c.head_dim) * c.head_dim ** -0.5
    context, collected = attend(cache, q, k, v)
    return self.o(context.reshape(*lead, c.n_heads * c.head_dim)), collected


class Mlp(nnx.Module):
  """SwiGLU feed-forward."""

  def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs, dtype: Any):
    self.gate = Linear(c.d_model, c.d_ff, rngs=rngs, dtype=dtype)
    self.up = Linear(c.d_model, c.d_ff, rngs=rngs, dtype=dtype)
    self.down = Linear(c.d_ff, c.d_model, rngs=rngs, dtype=dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
  """Pre-norm residual block; the residual stream is float32 whatever the weights are."""

  def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs, dtype: Any):
    self.attn_norm = RMSNorm(c.d_model, c.norm_eps)
    self.attn = Attention(c, rngs=rngs, dtype=dtype)
    self.mlp_norm = RMSNorm(c.d_model, c.norm_eps)
    self.mlp = Mlp(c, rngs=rngs, dtype=dtype)

  def __call__(self, x, angles, attend: Attend, cache) -> tuple[jax.Array, Any]:
    update, collected = self.attn(self.attn_norm(x), angles, attend, cache)
    x = x + update
    return x + self.mlp(self.mlp_norm(x)), collected


class Embedder(nnx.Module):
  """Token rows, with PASTA's tag rows behind them where they are kept apart for training."""

  def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs, dtype: Any):
    table = jax.random.normal(rngs.params(), (c.vocab_size, c.d_model)) * c.d_model ** -0.5
    self.embedding = nnx.Param(table.astype(dtype))
    self.tags: TagParam | None = nnx.data(None)  # [6, D] float32

  def table(self) -> jax.Array:
    """[V, D] in the weights' dtype."""
    table = self.embedding[...]
    return table if self.tags is None else jnp.concatenate([table, self.tags[...].astype(table.dtype)])

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """[...] -> [..., D] float32."""
    return self.table()[tokens].astype(jnp.float32)


class Decoder(nnx.Module):
  """The whole model. `layers` is a list, or one Layer with a leading layer axis on every leaf (`stack`)."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
    self.config = config
    self.embed = Embedder(config, rngs=rngs, dtype=dtype)
    self.layers = nnx.List([Layer(config, rngs=rngs, dtype=dtype) for _ in range(config.n_layers)])
    self.final_norm = RMSNorm(config.d_model, config.norm_eps)
    self.head: Linear | None = nnx.data(
        None if config.tie_embeddings else Linear(config.d_model, config.vocab_size, rngs=rngs, dtype=dtype))
    self.head_tags: TagParam | None = nnx.data(None)  # [D, 6] float32, for an untied head

  def __call__(self, tokens: jax.Array, positions: jax.Array, attend: Attend,
               caches: Sequence[Any] | Any = None, remat: bool = False) -> tuple[jax.Array, Any]:
    """Hidden states behind the final norm, [..., D] float32, and per layer what `attend` collected.

    `tokens` and `positions` are integers [...]. `caches` holds one entry a layer (or is None): a list for a
    list of layers, a pytree with a leading layer axis for stacked ones; what is collected comes back in the
    same form. `remat` recomputes each layer in the backward pass.
    """
    x = self.embed(tokens)
    angles = rope_angles(positions, self.config.head_dim, self.config.rope_theta)
    call = lambda layer, x, cache: layer(x, angles, attend, cache)
    if isinstance(self.layers, nnx.List):
      collected = []
      for i, layer in enumerate(self.layers):
        cache = None if caches is None else caches[i]
        graph, state = nnx.split(layer)
        run = lambda s, x, c, graph=graph: call(nnx.merge(graph, s), x, c)
        x, out = (jax.checkpoint(run) if remat else run)(state, x, cache)
        collected.append(out)
      return self.final_norm(x), collected
    graph, stacked = nnx.split(self.layers)

    def body(x, layer_and_cache):
      state, cache = layer_and_cache
      return call(nnx.merge(graph, state), x, cache)

    x, collected = jax.lax.scan(jax.checkpoint(body) if remat else body, x, (stacked, caches))
    return self.final_norm(x), collected

  @property
  def dtype(self) -> Any:
    """What matrices are stored and multiplied in."""
    return self.embed.embedding.dtype

  def logits(self, hidden: jax.Array) -> jax.Array:
    """[..., D] -> [..., V] float32."""
    if self.head is not None:
      logits = self.head(hidden)
      if self.head_tags is None:
        return logits
      tags = matmul(hidden.astype(self.dtype), self.head_tags[...].astype(self.dtype))
      return jnp.concatenate([logits, tags], axis=-1)
    table = self.embed.table()
    return matmul(hidden.astype(table.dtype), table.T)


NEGATIVE = -1e30  # a masked score: finite, so that a row that sees nothing averages instead of giving NaN


def dense_attention(mask: jax.Array, dtype: Any = jnp.float32, block: int = 128) -> Attend:
  """`attend` over whole rows at once: `mask` is boolean [B, T, T], True where query t sees key s, and never
  True for s > t. Products take operands in `dtype` and accumulate in float32.

  Queries go in blocks of `block`, each against the keys up to its own end: later keys are masked for all of
  them, so half of the work falls away. Sums of weights come from the same product as the context (a column
  of ones beside the values): XLA's CPU row sums are slow. Collects each layer's keys and values [B, T, K, H].
  """
  if mask.dtype != jnp.bool_:
    raise TypeError(f"a mask must be boolean (True = may attend), not {mask.dtype}")
  bias = jnp.where(mask, 0.0, NEGATIVE)

  @jax.checkpoint
  def attend_block(q, k, v, bias):
    """q [B, K, G, t, H], k [B, K, H, s], v [B, K, s, H+], bias [B, t, s] -> [B, K, G, t, H+]."""
    rows, heads, groups, t, width = q.shape
    scores = matmul(q.reshape(rows, heads, groups * t, width), k).reshape(rows, heads, groups, t, -1)
    scores = scores + bias[:, None, None]
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - peak).astype(dtype)
    out = matmul(weights.reshape(rows, heads, groups * t, -1), v)
    return out.reshape(rows, heads, groups, t, -1)

  def attend(cache, q, k, v):
    del cache
    length, width = q.shape[1], q.shape[-1]
    q_ = q.astype(dtype).transpose(0, 2, 3, 1, 4)  # B K G T H
    k_ = k.astype(dtype).transpose(0, 2, 3, 1)  # B K H T
    v_ = v.astype(dtype).transpose(0, 2, 1, 3)  # B K T H
    v_ = jnp.concatenate([v_, jnp.ones((*v_.shape[:-1], 16), dtype)], axis=-1)
    blocks = []
    for start in range(0, length, block):
      stop = min(start + block, length)
      blocks.append(attend_block(q_[..., start:stop, :], k_[..., :stop], v_[..., :stop, :],
                                 bias[:, start:stop, :stop]))
    out = jnp.concatenate(blocks, axis=-2)
    context = out[..., :width] / out[..., width : width + 1]
    return context.transpose(0, 3, 1, 2, 4), (k, v)

  return attend


def causal_mask(length: int) -> jax.Array:
  """[1, T, T] boolean, for a row that is one plain text."""
  return jnp.tril(jnp.ones((1, length, length), jnp.bool_))
