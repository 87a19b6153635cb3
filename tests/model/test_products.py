"""Matrix products of linear layers: every one against float64, and one that is added to the table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import TIED, random_params

from pasta_jax.decode.attention import make_decode_attend
from pasta_jax.model.lora import Adapter, linears
from pasta_jax.model.products import PRODUCTS, xla_product
from pasta_jax.model.transformer import Linear
from pasta_jax.weights import build
from pasta_jax.weights.quantise import FORMATS

BATCHED = {  # shape of x -> how decoding batches the product over branches
  (24,): lambda product: product,
  (7, 24): lambda product: product,
  (1, 9, 24): lambda product: product,
  (8, 24): lambda product: jax.vmap(product, (0, None)),
  (3, 8, 24): lambda product: jax.vmap(jax.vmap(product, (0, None)), (0, None)),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", BATCHED)
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("out", [(40,), (5, 8)], ids=["plain", "fused"])
def test_products_equal_float64(out: tuple, name: str, shape: tuple, dtype):
  """Operands that are exact in their dtype; the sum is one of float32."""
  rng = np.random.default_rng(0)
  x, kernel = (jnp.asarray(rng.normal(size=s), dtype) for s in (shape, (24, *out)))
  actual = jax.jit(BATCHED[shape](lambda x, kernel: PRODUCTS[name](x, kernel, None)))(x, kernel)
  assert actual.shape == (*shape[:-1], *out) and actual.dtype == jnp.float32
  expected = np.einsum(
    "...i,io->...o", np.asarray(x, np.float64), np.asarray(kernel, np.float64).reshape(24, 40)
  )
  expected = expected.reshape(actual.shape)
  np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("shape", BATCHED)
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("out", [(40,), (5, 8)], ids=["plain", "fused"])
def test_products_in_8_bits_equal_float64(out: tuple, name: str, shape: tuple, weights: str, dtype):
  """All numbers of a format are exact in both dtypes of operands; each channel has a scale of its own."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=shape), dtype)
  form = FORMATS[weights]
  kernel = np.clip(rng.normal(size=(24, *out)) * form.largest / 3, -form.largest, form.largest).astype(
    form.dtype
  )
  scale = rng.uniform(1e-4, 1e-2, out).astype(np.float32)
  product = lambda x, kernel: PRODUCTS[name](x, kernel, scale)
  actual = jax.jit(BATCHED[shape](product))(x, kernel)
  assert actual.shape == (*shape[:-1], *out) and actual.dtype == jnp.float32
  dense = (np.asarray(kernel, np.float64) * scale).reshape(24, 40)
  expected = np.einsum("...i,io->...o", np.asarray(x, np.float64), dense).reshape(actual.shape)
  np.testing.assert_allclose(actual, expected, atol=2e-6 * np.abs(expected).max())


def decode_token(model, tokens: jax.Array) -> jax.Array:
  """[W, V]: logits of the first token of W branches, which see nothing but themselves."""
  c = model.config
  pool = [(jnp.zeros((c.n_kv_heads, c.head_dim, 8)), jnp.zeros((c.n_kv_heads, 8, c.head_dim)))] * c.n_layers

  def branch(token):
    attend = make_decode_attend("auto", jnp.zeros(8, bool), None, 0.0)
    return model.logits(model(token, jnp.int32(0), attend, pool)[0])

  return jax.jit(jax.vmap(branch))(tokens)


def test_decoding_uses_a_product_that_is_added(monkeypatch: pytest.MonkeyPatch):
  calls = []

  def counted(x, kernel, scale):
    calls.append(kernel.shape)
    return xla_product(x, kernel, scale)

  monkeypatch.setitem(PRODUCTS, "counted", counted)
  params, rng = random_params(TIED), np.random.default_rng(1)
  update = rng.normal(size=(24, 2)).astype("f"), rng.normal(size=(2, 48)).astype("f")
  adapter = Adapter(0.5, {"layers.1.attn.q": update}, tags=rng.normal(size=(6, 24)).astype("f"))
  expected = build.for_decoding(TIED, params, adapter, jnp.float32)
  model = build.for_decoding(TIED, params, adapter, jnp.float32, product="counted")
  tokens = jnp.asarray([3, 261, 262, 267])
  np.testing.assert_array_equal(decode_token(model, tokens), decode_token(expected, tokens))
  of_layer = [(24, 2, 40), (48, 24), (24, 2, 40), (40, 24)]  # q, k and v are one product, and gate and up
  assert calls == of_layer * TIED.n_layers + [(24, 268)]

  trained = build.from_params(TIED, params, stacked=True)
  assert {m.product for m in linears(trained).values()} == {"xla"}
  assert Linear(2, 3, rngs=build.nnx.Rngs(0), dtype=jnp.float32).product == "xla"


def test_unknown_products_are_refused():
  with pytest.raises(ValueError, match="unknown matrix product 'fast': choose one of xla"):
    build.for_decoding(TIED, random_params(TIED), None, jnp.float32, product="fast")
