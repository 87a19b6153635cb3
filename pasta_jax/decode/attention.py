"""Attention in decoding, by name: where a kernel for prefill or for decode steps goes in.

A decode step runs the model on one token of each of W branches, as a `jax.vmap` over branches that share the
key-value pool; batch decoding adds a `jax.vmap` over requests, each with a pool of its own.
`make_decode_attend` makes the attention of one branch, `make_prefill_attend` that of a prompt. Both return an
`Attend` (see `model.transformer`), which is called once per layer.

xla        plain JAX
numba      the kernel of `pasta_jax.cpu`, on CPU for pools in bfloat16; xla for others
tpu, gpu   the kernels of `decode.flash_decoding`, whose speed is not measured yet
auto       numba where `decode.kernels` is, otherwise xla
interpret  the TPU kernel, interpreted in plain JAX: slow, for tests on any machine

To add a kernel for decode steps, write a function as `xla_decode` with the same contract, add it to `DECODE`,
and its name to `config.sections.DECODE_ATTENTION`; for prefill, the same with `xla_prefill` and `PREFILL`. A
kind that has no prefill of its own uses "xla" there. `--config.decode.attention=NAME` selects it, `_resolve`
says what "auto" is on which machine. A kernel that should read the pool once for all branches defines its own
batching rule (`jax.custom_batching.custom_vmap`), as `flash_decoding` does: it then gets queries [W, K, G, H] and
masks [W, P] with an unbatched pool. tests/decode/test_decode_attention.py compares every kind with float64.

Letters: P pool entries, K key-value heads, G query heads per key-value head, H head width, T tokens of the
padded prompt.
"""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pasta_jax.cpu import calls, programs
from pasta_jax.decode.flash_decoding import flash_decode
from pasta_jax.decode.placement import on_heads
from pasta_jax.decode.pooled import batched, pool_attend
from pasta_jax.decode.state import KVPool
from pasta_jax.model.attention import (
  MASK_VALUE,
  causal_mask,
  dense_attention,
  layer_mask,
  sliding_window_mask,
)
from pasta_jax.model.config import ModelConfig
from pasta_jax.model.transformer import Attend, soft_cap


def xla_decode(visible: jax.Array, window_mask: jax.Array | None, softcap: float) -> Attend:
  """Attention of one branch's token to itself and to the pool entries that it sees.

  Args:
    visible: [P] boolean, the pool entries that the branch sees. It may be False everywhere. Unused entries are
      never visible; what they contain is undefined.
    window_mask: [P] boolean, the entries in the token's sliding window; None in models without a window. It
      applies to local layers only (`layer_mask`).
    softcap: scores become softcap * tanh(score / softcap); 0 means no cap. It applies before masking.

  Returns:
    attend(cache, q, k, v, local) -> (context, (k, v)). `cache` is the layer's pool: keys [K, H, P] and values
    [K, P, H], in the dtype of the weights. `q` [K, G, H], `k` [K, H] and `v` [K, H] are the token's own,
    float32; `q` is scaled. The token always sees itself: its own key and value are not in the pool yet.
    `context` is [K, G, H], in float32 or, as the next product takes it, in the pool's dtype; `k` and `v` are
    returned in the pool's dtype, and the step writes them to the pool.
  """

  def attend(cache: Any, q: jax.Array, k: jax.Array, v: jax.Array, local) -> tuple[jax.Array, Any]:
    mask = layer_mask(visible, window_mask, local)
    keys, values = cache
    q, k, v = q.astype(keys.dtype), k.astype(keys.dtype), v.astype(values.dtype)
    scores = jnp.einsum("kgh,khp->kgp", q, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, soft_cap(scores, softcap), MASK_VALUE)
    own = soft_cap(jnp.einsum("kgh,kh->kg", q, k, preferred_element_type=jnp.float32), softcap)
    peak = jnp.maximum(jnp.max(scores, axis=-1), own)
    weights, own_weight = jnp.exp(scores - peak[..., None]), jnp.exp(own - peak)
    weights = jnp.where(mask, weights, 0.0)
    context = jnp.einsum(
      "kgp,kph->kgh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
    context = context + own_weight[..., None] * v[:, None].astype(jnp.float32)
    return context / (jnp.sum(weights, axis=-1) + own_weight)[..., None], (k, v)

  return attend


def xla_prefill(positions: jax.Array, config: ModelConfig, dtype: Any) -> Attend:
  """Causal attention over a prompt.

  Args:
    positions: [1, T] int32. Padding comes after the prompt, so that no token of the prompt sees it.
    config: for the sliding window of local layers and the soft cap of scores.
    dtype: the dtype of the products' operands; they accumulate in float32.

  Returns:
    attend(cache, q, k, v, local) -> (context, (k, v)), with q [1, T, K, G, H], k and v [1, T, K, H], and
    context [1, T, K, G, H], all float32. `cache` is unused. The interpreter copies the keys and values to the
    pool.
  """
  return dense_attention(
    causal_mask(positions.shape[-1]),
    dtype,
    window_mask=sliding_window_mask(positions, positions, config.window),
    softcap=config.attention_softcap,
  )


def numba_decode(visible: jax.Array, window_mask: jax.Array | None, softcap: float) -> Attend:
  """The same by the kernel for CPU, where it is for the pool."""
  other = xla_decode(visible, window_mask, softcap)
  kernel = pool_attend(_numba(softcap), visible, window_mask)

  def attend(cache, q, k, v, local):
    return (kernel if calls.attends(cache[0]) else other)(cache, q, k, v, local)

  return attend


@functools.cache
def _numba(softcap: float) -> Callable:
  programs.require()

  def kernel(keys, values, mask, q, k, v):
    q, k, v = q.astype(keys.dtype), k.astype(keys.dtype), v.astype(values.dtype)
    return calls.attend(keys, values, mask, q, k, v, softcap)

  return batched(kernel)


DECODE: dict[str, Callable[[jax.Array, jax.Array | None, float], Attend]] = {
  "xla": xla_decode,
  "numba": numba_decode,
  "tpu": partial(flash_decode, "tpu"),
  "gpu": partial(flash_decode, "gpu"),
  "interpret": partial(flash_decode, "tpu", interpret=True),
}


def append_entries(
  kind: str, pool: KVPool, new: Sequence[tuple[jax.Array, jax.Array]], used: jax.Array, after: jax.Array
) -> KVPool:
  """The pool with each layer's keys and values `new` [W, K, H] after its `used` entries, in place.

  `after` is [W] int32, not negative: what must have been computed before the pool is written, that is, every read of
  it; XLA would otherwise copy the pools twice a step.
  """
  keys, values = zip(*new)
  if kind == "numba" and calls.attends(pool.keys[0]):
    written = calls.append([*pool.keys, *pool.values], [*keys, *values], used, after)
    return KVPool(written[: len(keys)], written[len(keys) :])
  write, zero = jax.lax.dynamic_update_slice, jnp.int32(0)
  late = lambda x: jnp.where((after >= 0)[:, None, None], x, 0)
  return KVPool(
    [write(pool, late(k).transpose(1, 2, 0), (zero, zero, used)) for pool, k in zip(pool.keys, keys)],
    [write(pool, late(v).transpose(1, 0, 2), (zero, used, zero)) for pool, v in zip(pool.values, values)],
  )


PREFILL: dict[str, Callable[[jax.Array, ModelConfig, Any], Attend]] = {"xla": xla_prefill}
KINDS = ("auto", *DECODE)


def check_kind(kind: str, mesh: Any = None) -> None:
  """Raises ValueError, one line, if this machine, or a mesh of its devices, cannot run `kind`. A program of the kernels
  for accelerators can be compiled anywhere."""
  here = jax.default_backend()
  if kind in ("tpu", "gpu") and kind != here or kind == "numba" and here != "cpu":
    raise ValueError(f"decode.attention={kind} cannot run on this machine's {here}: leave it at auto")
  if kind == "numba" and mesh is not None:
    raise ValueError("decode.attention=numba is for one CPU, not for a mesh: leave it at auto")
  if kind == "numba" and (reason := programs.unusable()):
    raise ValueError(f"decode.attention=numba cannot be used: {reason}")


def _resolve(kind: str) -> str:
  """The kind that "auto" stands for, or `kind`. Raises ValueError for an unknown one."""
  if kind == "auto":
    return "xla"
  if kind not in DECODE:
    raise ValueError(f"unknown attention {kind!r} for decoding: choose one of auto, {', '.join(DECODE)}")
  return kind


def make_decode_attend(
  kind: str, visible: jax.Array, window_mask: jax.Array | None, softcap: float
) -> Attend:
  """`attend` of one branch in a decode step, computed by `kind`, one of `KINDS`; see `xla_decode` for the
  contract. On a mesh, heads are sharded.

  Raises ValueError for an unknown kind.
  """
  return on_heads(DECODE[_resolve(kind)](visible, window_mask, softcap))


def make_prefill_attend(kind: str, positions: jax.Array, config: ModelConfig, dtype: Any) -> Attend:
  """`attend` of a prefill, computed by `kind`, one of `KINDS`; see `xla_prefill` for the contract.

  Raises ValueError for an unknown kind.
  """
  return on_heads(PREFILL.get(_resolve(kind), xla_prefill)(positions, config, dtype))
