"""A decoder-only transformer (Llama and its relatives) as Flax NNX modules. It knows tokens and positions,
but not threads.

Every module accepts any leading axes: training calls the model on [B, T], decoding on one token under
`jax.vmap`. Which keys a query sees is the caller's responsibility: the model passes each layer's queries,
keys and values to `attend` (see `Attend`), which returns the attention's output.

Letters in comments and einsums are those of `config.ModelConfig`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pasta_jax.model.config import ModelConfig
from pasta_jax.model.products import ACTIVATIONS, PRODUCTS, gated_product, matmul, rms_norm

# The linear layers of the fused form, and those that each one computes at once (`split_qkv`, `split_gate_up`).
FUSED: Mapping[str, tuple[str, ...]] = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}

# The norms whose results products alone take.
BEFORE_PRODUCTS = ("attn_norm", "mlp_norm", "final_norm")

# Whether a layer is local, that is, limited to the sliding window; a traced boolean where layers are scanned
# over.
Local = bool | jax.Array


class Attend(Protocol):
  """Attention of one layer, as the caller of the model computes it."""

  def __call__(
    self, cache: Any, q: jax.Array, k: jax.Array, v: jax.Array, local: Local, /
  ) -> tuple[jax.Array, Any]:
    """(context [..., K, G, H], anything to collect per layer).

    `cache` is the layer's entry of the `caches` that the model was called with. Queries [..., K, G, H] are
    rotated and scaled, keys [..., K, H] rotated, values [..., K, H] as projected; all are float32.
    """
    ...


# Rematerialisation policy: what is saved of a layer for the backward pass; the rest is computed again.
REMAT = {
  "none": None,  # saves everything
  "full": jax.checkpoint_policies.nothing_saveable,  # saves only the layer's input
  # and the results of the attention kernels (`flash`)
  "attention": jax.checkpoint_policies.save_only_these_names("attention"),
  "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # and all products with weights
}


class LoraParam(nnx.Param):
  """A factor of a low-rank update."""


class TagParam(nnx.Param):
  """Vocabulary rows of PASTA's tags."""


def set_matmul_precision(dtype: str, backend: str = "") -> None:
  """Computes float32 products in float32 on TPU and newer GPUs (`backend`, or this machine's), which
  otherwise round the operands.

  This is a setting of the whole process. float32 is chosen for exactness, bfloat16 for speed.
  """
  if dtype == "float32" and (backend or jax.default_backend()) != "cpu":
    jax.config.update("jax_default_matmul_precision", "highest")


class Linear(nnx.Module):
  """x @ kernel, plus the bias, plus the low-rank update where `lora.add_lora` has added one. Accumulates in
  float32.

  The kernel is [in, *out]; `out` has more than one dimension in the fused form only. `product` names the entry of
  `products.PRODUCTS` that computes x @ kernel; it is static, as `operands`, the dtype of `x` where the kernel has 8
  bits (`in_8_bits`).
  """

  def __init__(self, n_in: int, *out: int, rngs: nnx.Rngs, dtype: Any, bias: bool = False):
    scale = n_in**-0.5
    self.kernel = nnx.Param((jax.random.normal(rngs.params(), (n_in, *out)) * scale).astype(dtype))
    self.kernel_scale: nnx.Param | None = nnx.data(None)  # [*out] float32, of a kernel in 8 bits
    self.operands: Any = None
    self.bias: nnx.Param | None = nnx.data(nnx.Param(jnp.zeros(out, jnp.float32)) if bias else None)
    self.lora_a: LoraParam | None = nnx.data(None)  # [in, r]
    self.lora_b: LoraParam | None = nnx.data(None)  # [r, out]
    self.lora_scale = 0.0
    self.product = "xla"

  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., in] -> [..., *out] float32."""
    x, kernel, scale = self._operands(x)
    y = PRODUCTS[self.product](x, kernel, scale)
    if self.bias is not None:
      y = y + self.bias[...].astype(jnp.float32)
    if self.lora_a is not None and self.lora_b is not None:
      low = matmul(x, self.lora_a[...].astype(x.dtype))
      y = y + self.lora_scale * matmul(low.astype(x.dtype), self.lora_b[...].astype(x.dtype))
    return y

  def gated(self, x: jax.Array, activation: str) -> jax.Array:
    """[..., in] -> [..., F] of a kernel [in, 2, F], for decoding: without bias and update (`gated_product`)."""
    return gated_product(self.product, *self._operands(x), activation)

  def _operands(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """What a product takes: x, kernel, scale."""
    kernel = self.kernel[...]
    scale = None if self.kernel_scale is None else self.kernel_scale[...]
    return x.astype(self.operands or kernel.dtype), kernel, scale

  def in_8_bits(self, dtype: Any) -> None:
    """Makes an abstract module, whose arrays are `jax.ShapeDtypeStruct`, one with a kernel of this dtype and scales,
    in place; the operands of its product keep the dtype that the kernel had."""
    shape, self.operands = self.kernel.shape, self.kernel.dtype
    self.kernel = nnx.Param(jax.ShapeDtypeStruct(shape, dtype))
    self.kernel_scale = nnx.Param(jax.ShapeDtypeStruct(shape[1:], jnp.float32))


class RMSNorm(nnx.Module):
  """Root-mean-square normalisation in float32; with `kernel`, which is static, by the kernel for CPU
  (`products.rms_norm`), where products of `dtype` bfloat16 are all that is behind it."""

  def __init__(self, width: int, c: ModelConfig):
    self.scale = nnx.Param(jnp.full((width,), 1 - c.norm_offset, jnp.float32))
    self.eps, self.offset, self.kernel = c.norm_eps, c.norm_offset, False

  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., D] -> [..., D]."""
    scale = self.scale[...] + self.offset if self.offset else self.scale[...]
    return rms_norm(x, scale, self.eps, self.kernel)


def rope_angles(positions: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines, each [..., 1, H/2], of rotate-half RoPE at integer `positions` [...]."""
  angle = positions[..., None, None].astype(jnp.float32) * frequencies
  return jnp.cos(angle), jnp.sin(angle)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
  """cap * tanh(x / cap): near x for small x, bounded by cap. 0 means no cap."""
  return cap * jnp.tanh(x / cap) if cap else x


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Applies RoPE to [..., heads, H]."""
  cos, sin = angles
  first, second = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def split_qkv(x: Any, c: ModelConfig) -> tuple[Any, Any, Any]:
  """Queries [..., K, G, H], keys and values [..., K, H] of the fused form [..., K, (G + 2)·H]: results of its
  product, or its kernel, bias or scales. Those of a NumPy array are views."""
  heads = x.reshape(*x.shape[:-1], c.n_groups + 2, c.head_dim)
  return heads[..., : c.n_groups, :], heads[..., c.n_groups, :], heads[..., c.n_groups + 1, :]


def split_gate_up(x: Any) -> tuple[Any, Any]:
  """The same for gate and up, each [..., F], of [..., 2, F]."""
  return x[..., 0, :], x[..., 1, :]


class Attention(nnx.Module):
  """Grouped-query attention around the caller's `attend`.

  In the fused form `qkv` takes the place of `q`, `k` and `v`. Its dimension K can be sharded: a device then has the
  queries of its key-value heads.
  """

  q: Linear
  k: Linear
  v: Linear
  qkv: Linear

  def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs, dtype: Any, fused: bool):
    linear = partial(Linear, c.d_model, rngs=rngs, dtype=dtype, bias=c.qkv_bias)
    if fused:
      self.qkv = linear(c.n_kv_heads, (c.n_groups + 2) * c.head_dim)
    else:
      self.q = linear(c.n_heads * c.head_dim)
      self.k = linear(c.n_kv_heads * c.head_dim)
      self.v = linear(c.n_kv_heads * c.head_dim)
    self.fused = fused
    self.o = Linear(c.n_heads * c.head_dim, c.d_model, rngs=rngs, dtype=dtype)
    self.q_norm: RMSNorm | None = nnx.data(RMSNorm(c.head_dim, c) if c.qk_norm else None)
    self.k_norm: RMSNorm | None = nnx.data(RMSNorm(c.head_dim, c) if c.qk_norm else None)
    self.config = c

  def __call__(self, x, angles, attend: Attend, cache, local: Local) -> tuple[jax.Array, Any]:
    """[..., D] -> [..., D], and what `attend` collected."""
    c, lead = self.config, x.shape[:-1]
    q, k, v = split_qkv(self.qkv(x), c) if self.fused else (self.q(x), self.k(x), self.v(x))
    q = q.reshape(*lead, c.n_heads, c.head_dim)
    k, v = (y.reshape(*lead, c.n_kv_heads, c.head_dim) for y in (k, v))
    if self.q_norm is not None and self.k_norm is not None:
      q, k = self.q_norm(q), self.k_norm(k)
    q, k = rotate(q, angles), rotate(k, angles)
    q = q.reshape(*lead, c.n_kv_heads, c.n_groups, c.head_dim) * (c.query_scale or c.head_dim**-0.5)
    context, collected = attend(cache, q, k, v, local)
    return self.o(context.reshape(*lead, c.n_heads * c.head_dim)), collected


class Mlp(nnx.Module):
  """Gated feed-forward: SwiGLU or GeGLU (Shazeer 2020). In the fused form `gate_up` takes the place of `gate` and
  `up`."""

  gate: Linear
  up: Linear
  gate_up: Linear

  def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs, dtype: Any, fused: bool):
    if fused:
      self.gate_up = Linear(c.d_model, 2, c.d_ff, rngs=rngs, dtype=dtype)
    else:
      self.gate = Linear(c.d_model, c.d_ff, rngs=rngs, dtype=dtype)
      self.up = Linear(c.d_model, c.d_ff, rngs=rngs, dtype=dtype)
    self.fused = fused
    self.down = Linear(c.d_ff, c.d_model, rngs=rngs, dtype=dtype)
    self.activation = c.activation

  def __call__(self, x: jax.Array) -> jax.Array:
    if self.fused:
      return self.down(self.gate_up.gated(x, self.activation))
    return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))


class Layer(nnx.Module):
  """Pre-norm residual block, with norms after its two parts as well if `config.post_norms`. The residual
  stream is float32 for every dtype of the weights."""

  def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs, dtype: Any, fused: bool):
    self.attn_norm = RMSNorm(c.d_model, c)
    self.attn = Attention(c, rngs=rngs, dtype=dtype, fused=fused)
    self.mlp_norm = RMSNorm(c.d_model, c)
    self.mlp = Mlp(c, rngs=rngs, dtype=dtype, fused=fused)
    self.attn_post_norm: RMSNorm | None = nnx.data(RMSNorm(c.d_model, c) if c.post_norms else None)
    self.mlp_post_norm: RMSNorm | None = nnx.data(RMSNorm(c.d_model, c) if c.post_norms else None)

  def __call__(self, x, angles, attend: Attend, cache, local: Local) -> tuple[jax.Array, Any]:
    update, collected = self.attn(self.attn_norm(x), angles, attend, cache, local)
    x = x + (self.attn_post_norm(update) if self.attn_post_norm is not None else update)
    update = self.mlp(self.mlp_norm(x))
    return x + (self.mlp_post_norm(update) if self.mlp_post_norm is not None else update), collected


def with_tags(logits: jax.Array, tags: jax.Array, ids: Sequence[int]) -> jax.Array:
  """Logits of a vocabulary [..., V] with those of the tags [..., n] at `ids`, which may be rows behind it, or
  appended if `ids` is empty."""
  if not ids:
    return jnp.concatenate([logits, tags], axis=-1)
  more = max(0, max(ids) + 1 - logits.shape[-1])
  return jnp.pad(logits, [(0, 0)] * (logits.ndim - 1) + [(0, more)]).at[..., np.asarray(ids)].set(tags)


def tag_columns(config: ModelConfig, width: int) -> np.ndarray:
  """Where `with_tags` puts the tags in logits that are `width` wide with them."""
  return np.asarray(config.tag_ids or range(config.vocab_size, width), np.int32)


class Embedder(nnx.Module):
  """Embeddings of tokens, and of PASTA's tags where training keeps them apart.

  The two are never joined into one table: the gradient of a tag's row would then cost that of the whole
  table.
  """

  def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs, dtype: Any):
    table = jax.random.normal(rngs.params(), (c.vocab_size, c.d_model)) * c.d_model**-0.5
    self.embedding = nnx.Param(table.astype(dtype))
    self.tags: TagParam | None = nnx.data(None)  # [n, D] float32, n: rows of `tag_ids`, or 6
    self.tag_ids = c.tag_ids
    self.scale = c.d_model**0.5 if c.scale_embeddings else 1.0

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """[...] -> [..., D] float32."""
    # Made to depend on the tokens: XLA's CPU backend gathers in float32, and would convert the whole table for it
    # before a loop over steps.
    table, tokens = jax.lax.optimization_barrier((self.embedding[...], tokens))
    rows = table[tokens]
    if self.tags is not None:
      own = tokens[..., None] == np.asarray(self.tag_ids or len(table) + np.arange(len(self.tags[...])))
      tags = self.tags[...].astype(table.dtype)[jnp.argmax(own, axis=-1)]
      rows = jnp.where(jnp.any(own, axis=-1, keepdims=True), tags, rows)
    return rows.astype(jnp.float32) * self.scale

  def logits(self, hidden: jax.Array) -> jax.Array:
    """[..., D] -> [..., V] float32, for a head that is tied to the embeddings."""
    table = self.embedding[...]
    hidden = hidden.astype(table.dtype)
    logits = matmul(hidden, table.T)
    if self.tags is None:
      return logits
    return with_tags(logits, matmul(hidden, self.tags[...].astype(table.dtype).T), self.tag_ids)


class Transformer(nnx.Module):
  """The whole model. `layers` is a list, or one Layer whose leaves have a leading layer axis (`stack`).

  `fused`: each layer computes queries, keys and values in one product, and gate and up in one, which is for decoding
  only: adapters are for the layers that training has.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, fused: bool = False):
    self.config = config
    self.embed = Embedder(config, rngs=rngs, dtype=dtype)
    layer = partial(Layer, config, rngs=rngs, dtype=dtype, fused=fused)
    self.layers = nnx.List([layer() for _ in range(config.n_layers)])
    self.final_norm = RMSNorm(config.d_model, config)
    self.head: Linear | None = nnx.data(
      None if config.tie_embeddings else Linear(config.d_model, config.vocab_size, rngs=rngs, dtype=dtype)
    )
    self.head_tags: TagParam | None = nnx.data(None)  # [D, 6] float32, for an untied head

  def __call__(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Attend,
    caches: Sequence[Any] | Any = None,
    remat: str = "none",
  ) -> tuple[jax.Array, Any]:
    """Hidden states after the final norm, [..., D] float32, or bfloat16 from a kernel (`RMSNorm`), and what `attend`
    collected in each layer.

    `tokens` and `positions` are integers [...]. `caches` has one entry per layer, or is None: a list for a
    list of layers, a pytree with a leading layer axis for stacked layers. What is collected is returned in
    the same form. `remat` is a key of `REMAT`.
    """
    x, c = self.embed(tokens), self.config
    checkpoint = (lambda f: f) if remat == "none" else partial(jax.checkpoint, policy=REMAT[remat])
    angles, local_angles = (rope_angles(positions, c.rope_frequencies(local)) for local in (False, True))
    local = [c.is_local(i) for i in range(c.n_layers)]

    def call(layer, x, cache, local):
      layer_angles = angles
      if c.local_rope_theta:
        layer_angles = tuple(jnp.where(local, a, b) for a, b in zip(local_angles, angles))
      return layer(x, layer_angles, attend, cache, local)

    if isinstance(self.layers, nnx.List):
      collected = []
      for i, layer in enumerate(self.layers):
        cache = None if caches is None else caches[i]
        graph, state = nnx.split(layer)
        run = lambda s, x, c, graph=graph, i=i: call(nnx.merge(graph, s), x, c, local[i])
        x, out = checkpoint(run)(state, x, cache)
        collected.append(out)
      return self.final_norm(x), collected
    graph, stacked = nnx.split(self.layers)

    mixed = len(set(local)) > 1  # otherwise `local` stays a Python boolean

    def body(x, scanned):
      state, cache, layer_local = scanned
      return call(nnx.merge(graph, state), x, cache, layer_local if mixed else local[0])

    x, collected = jax.lax.scan(checkpoint(body), x, (stacked, caches, jnp.asarray(local)))
    return self.final_norm(x), collected

  @property
  def dtype(self) -> Any:
    """The dtype of the operands of products, and of the key-value pool. Matrices are stored in it, unless in 8 bits."""
    return self.embed.embedding.dtype

  def logits(self, hidden: jax.Array) -> jax.Array:
    """[..., D] -> [..., V] float32."""
    if self.head is not None:
      logits = self.head(hidden)
      if self.head_tags is not None:
        tags = matmul(hidden.astype(self.dtype), self.head_tags[...].astype(self.dtype))
        logits = with_tags(logits, tags, self.config.tag_ids)
    else:
      logits = self.embed.logits(hidden)
    return soft_cap(logits, self.config.logit_softcap)


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
  """A shallow copy of the model with other layers."""
  copy = nnx.merge(*nnx.split(model))
  copy.layers = nnx.data(layers)
  return copy
