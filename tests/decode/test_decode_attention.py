"""Attention in decoding: every kind against float64, and kernels that are added to the tables."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasta_jax.config import sections
from pasta_jax.decode import attention
from pasta_jax.decode.attention import DECODE, KINDS, make_decode_attend, make_prefill_attend
from pasta_jax.model.config import ModelConfig
from pasta_jax.model.products import PRODUCTS

CONFIG = ModelConfig(vocab_size=8, d_model=8, n_layers=1, n_heads=6, n_kv_heads=2, head_dim=16, d_ff=8)
HEADS, GROUPS, WIDTH, ENTRIES = 2, 3, 16, 40
RUNNABLE = [kind for kind in KINDS if kind not in ("tpu", "gpu") or kind == jax.default_backend()]


def reference(q, keys, values, mask, softcap: float) -> np.ndarray:
  """[K, G, H] in float64: q [K, G, H], keys and values [K, S, H], mask [S]."""
  q, keys, values = (np.asarray(x, np.float64) for x in (q, keys, values))
  scores = np.einsum("kgh,ksh->kgs", q, keys)
  scores = softcap * np.tanh(scores / softcap) if softcap else scores
  scores = np.where(mask, scores, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  return np.einsum("kgs,ksh->kgh", weights / weights.sum(-1, keepdims=True), values)


def random_branch(seed: int, dtype=jnp.float32):
  """(cache, q, k, v) of one layer."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  cache = normal(HEADS, WIDTH, ENTRIES).astype(dtype), normal(HEADS, ENTRIES, WIDTH).astype(dtype)
  return cache, normal(HEADS, GROUPS, WIDTH), normal(HEADS, WIDTH), normal(HEADS, WIDTH)


def expected_context(cache, q, k, v, mask, softcap: float) -> np.ndarray:
  """`reference` over the visible pool entries and the token itself, last."""
  keys = np.concatenate([np.asarray(cache[0], np.float64).swapaxes(1, 2), np.asarray(k)[:, None]], axis=1)
  values = np.concatenate([np.asarray(cache[1], np.float64), np.asarray(v)[:, None]], axis=1)
  return reference(q, keys, values, np.append(mask, True), softcap)


@pytest.mark.parametrize("kind", RUNNABLE)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_decode_attention_equals_float64(kind: str, softcap: float):
  """Global and local layers, with the flag known or traced; nothing visible, some entries, all entries."""
  cache, q, k, v = random_branch(3)
  rng = np.random.default_rng(4)

  def run(visible, window_mask, local):
    return make_decode_attend(kind, visible, window_mask, softcap)(cache, q, k, v, local)

  programs = jax.jit(run, static_argnums=2), jax.jit(run)
  for share in (0.0, 0.4, 1.0):
    visible, window = rng.random(ENTRIES) < share, rng.random(ENTRIES) < 0.5
    for window_mask, local in ((None, False), (None, True), (window, False), (window, True)):
      mask = visible & window_mask if window_mask is not None and local else visible
      expected = expected_context(cache, q, k, v, mask, softcap)
      for program in programs:
        context, (own_k, own_v) = program(visible, window_mask, local)
        assert context.dtype == jnp.float32
        np.testing.assert_allclose(context, expected, atol=2e-6)
        np.testing.assert_array_equal(own_k, k)
        np.testing.assert_array_equal(own_v, v)


@pytest.mark.parametrize("kind", RUNNABLE)
def test_entries_that_are_not_visible_do_not_matter(kind: str):
  """Unused pool entries may contain anything finite, large scores included."""
  (keys, values), q, k, v = random_branch(5)
  visible = jnp.arange(ENTRIES) < 11
  far = lambda x, axis: jnp.where(jnp.expand_dims(visible, axis), x, 1e4)
  attend = jax.jit(make_decode_attend(kind, visible, None, 0.0))
  context, _ = attend((keys, values), q, k, v, False)
  np.testing.assert_array_equal(attend((far(keys, 0), far(values, 1)), q, k, v, False)[0], context)


@pytest.mark.parametrize("kind", RUNNABLE)
def test_decode_attention_in_bfloat16_adds_in_float32(kind: str):
  cache, q, k, v = random_branch(6, jnp.bfloat16)
  visible = np.arange(ENTRIES) % 3 > 0
  context, (own_k, own_v) = jax.jit(make_decode_attend(kind, jnp.asarray(visible), None, 0.0))(
    cache, q, k, v, False
  )
  assert context.dtype in (jnp.float32, jnp.bfloat16) and own_k.dtype == own_v.dtype == jnp.bfloat16
  rounded = [np.asarray(x.astype(jnp.bfloat16), np.float64) for x in (q, k, v)]
  np.testing.assert_allclose(context, expected_context(cache, *rounded, visible, 0.0), atol=1e-2)


@pytest.mark.parametrize("kind", RUNNABLE)
@pytest.mark.parametrize("window, softcap", [(0, 0.0), (9, 0.0), (9, 2.0)])
def test_prefill_attention_equals_float64(kind: str, window: int, softcap: float):
  length = 37
  config = dataclasses.replace(CONFIG, window=window, attention_softcap=softcap)
  rng = np.random.default_rng(7)
  q = rng.normal(size=(1, length, HEADS, GROUPS, WIDTH)).astype("f")
  k, v = (rng.normal(size=(1, length, HEADS, WIDTH)).astype("f") for _ in range(2))
  positions = np.arange(length)[None]
  for local in (False, True):
    attend = make_prefill_attend(kind, jnp.asarray(positions), config, jnp.float32)
    context, (keys, values) = jax.jit(attend)(None, q, k, v, local)
    np.testing.assert_array_equal(keys, k)
    np.testing.assert_array_equal(values, v)
    for t in range(length):
      mask = np.arange(length) <= t
      if window and local:
        mask &= t - np.arange(length) < window
      expected = reference(q[0, t], k[0].swapaxes(0, 1), v[0].swapaxes(0, 1), mask, softcap)
      np.testing.assert_allclose(context[0, t], expected, atol=1e-5)


def test_unknown_kinds_are_refused():
  for make in (
    lambda: make_decode_attend("flash", jnp.ones(4, bool), None, 0.0),
    lambda: make_prefill_attend("flash", jnp.arange(4)[None], CONFIG, jnp.float32),
  ):
    with pytest.raises(ValueError, match="unknown attention 'flash' for decoding: choose one of auto, xla"):
      make()


def test_a_kernel_that_is_added_gets_all_branches_at_once(monkeypatch: pytest.MonkeyPatch):
  """As the module's docstring says: with a batching rule of its own, a kind sees W branches and one pool."""
  shapes = []

  def kernel_decode(visible, window_mask, softcap):
    reference_attend = attention.xla_decode

    @jax.custom_batching.custom_vmap
    def one(visible, keys, values, q, k, v):
      return reference_attend(visible, window_mask, softcap)((keys, values), q, k, v, False)[0]

    @one.def_vmap
    def many(axis_size, in_batched, visible, keys, values, q, k, v):
      shapes.append((axis_size, visible.shape, keys.shape, values.shape, q.shape, k.shape, v.shape))
      assert in_batched == [True, False, False, True, True, True]
      return jax.vmap(one.fun, (0, None, None, 0, 0, 0))(visible, keys, values, q, k, v), True

    def attend(cache, q, k, v, local):
      return one(visible, *cache, q, k, v), (k, v)

    return attend

  monkeypatch.setitem(DECODE, "kernel", kernel_decode)
  cache, *_ = random_branch(8)
  q, k, v = (jnp.stack(x) for x in zip(*(random_branch(i)[1:] for i in range(5))))
  visible = jnp.asarray(np.random.default_rng(9).random((5, ENTRIES)) < 0.5)

  def run(kind):
    branch = lambda visible, q, k, v: make_decode_attend(kind, visible, None, 0.0)(cache, q, k, v, False)[0]
    return jax.jit(jax.vmap(branch))(visible, q, k, v)

  np.testing.assert_allclose(run("kernel"), run("xla"), atol=1e-6)
  pool = (HEADS, WIDTH, ENTRIES), (HEADS, ENTRIES, WIDTH)
  token = (5, HEADS, GROUPS, WIDTH), (5, HEADS, WIDTH), (5, HEADS, WIDTH)
  assert shapes == [(5, (5, ENTRIES), *pool, *token)]
  prefill = make_prefill_attend("kernel", jnp.arange(3)[None], CONFIG, jnp.float32)  # which is XLA's
  assert prefill(None, jnp.ones((1, 3, 2, 3, 16)), jnp.ones((1, 3, 2, 16)), jnp.ones((1, 3, 2, 16)), False)


def test_settings_name_every_kind_and_product():
  assert KINDS == sections.DECODE_ATTENTION
  assert {"auto", *PRODUCTS} == set(sections.KERNELS)
