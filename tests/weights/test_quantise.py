"""Matrices in 8 bits: the error of each number, the same model in other words, memory, and what says its name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_fused import FORMS, adapter
from test_model import TIED, UNTIED, logits, random_params, random_tokens
from test_products import decode_token

from pasta_jax.config import Config, with_changes
from pasta_jax.config.sections import WEIGHTS, formats
from pasta_jax.decode.generator import Model, decode_settings
from pasta_jax.evaluate.identity import settings_of
from pasta_jax.model.products import xla_product
from pasta_jax.model.transformer import Linear
from pasta_jax.weights import build, quantise
from pasta_jax.weights.adapter import Merged
from pasta_jax.weights.quantise import FORMATS

EACH = pytest.mark.parametrize("weights", FORMATS)


def matrix(seed: int = 0) -> np.ndarray:
  """Channels of very different sizes, one of zeros, one with a single large weight."""
  rng = np.random.default_rng(seed)
  kernel = rng.normal(size=(57, 23)) * 10.0 ** rng.uniform(-6, 3, 23)
  kernel[:, 3], kernel[11, 5] = 0, 1e4
  return kernel.astype(np.float32)


def stored(kernel: np.ndarray, weights: str) -> tuple[np.ndarray, np.ndarray]:
  """(the numbers in 8 bits, scales), both in float64."""
  out = np.empty(kernel.shape, FORMATS[weights].dtype)
  scale = quantise.quantise(kernel, out)
  assert scale.dtype == np.float32 and scale.shape == kernel.shape[1:]
  return out.astype(np.float64), scale.astype(np.float64)


@pytest.mark.parametrize("block", [1, 100, 1 << 22])
def test_int8_is_the_nearest_multiple_of_the_scale(block: int, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(quantise, "BLOCK", block)
  kernel = matrix().astype(np.float64)
  q, scale = stored(matrix(), "int8")
  peak = np.abs(kernel).max(axis=0)
  np.testing.assert_allclose(scale[peak > 0], peak[peak > 0] / 127, rtol=1e-7)
  assert np.abs(q).max() == 127 and (q[:, 3] == 0).all()
  assert (np.abs(kernel - scale * q) <= scale / 2 * (1 + 1e-5)).all()
  assert (np.abs(q[:, peak > 0]).max(axis=0) == 127).all()  # the whole range is used


def test_fp8_has_four_significant_bits():
  kernel = matrix().astype(np.float64)
  q, scale = stored(matrix(), "fp8")
  assert np.isfinite(q).all() and np.abs(q).max() == 448 and (q[:, 3] == 0).all()
  half = np.maximum(np.abs(kernel) * 2.0**-4, scale * 2.0**-10)  # subnormal numbers are multiples of 2 ** -9
  assert (np.abs(kernel - scale * q) <= half * (1 + 1e-5)).all()


def eight_bits(config, weights: str, dtype=jnp.float32, **how):
  return build.for_decoding(config, random_params(config), adapter(config), dtype, weights=weights, **how)


@EACH
@pytest.mark.parametrize("family", FORMS)
def test_the_model_is_that_of_its_dequantised_weights(family: str, weights: str):
  """Every matrix is the quantised one of the merged weights; products with float32 operands differ by rounding only."""
  config = FORMS[family]
  model = eight_bits(config, weights)
  merged = Merged(config, random_params(config), adapter(config), untied=True)
  params = build.to_params(model)
  assert params.keys() == merged.keys()
  for name, value in merged.items():
    expected = (
      np.prod(np.broadcast_arrays(*stored(value, weights)), axis=0) if name.endswith("kernel") else value
    )
    np.testing.assert_allclose(params[name], expected, rtol=1e-6, err_msg=name)
  plain = build.from_params(merged.config, params)
  tokens, step = random_tokens(2, 30), jnp.asarray([3, 261, 262, 267])
  np.testing.assert_allclose(logits(model, tokens), logits(plain, tokens), atol=1e-4, rtol=1e-4)
  np.testing.assert_allclose(decode_token(model, step), decode_token(plain, step), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("weights, least, most", [("int8", 1e-3, 0.05), ("fp8", 1e-3, 0.2)])
def test_logits_are_close_to_those_of_the_same_weights(weights: str, least: float, most: float):
  """As a share of their spread. bfloat16 operands add little to it."""
  tokens = random_tokens(2, 48)
  exact = logits(build.for_decoding(UNTIED, random_params(UNTIED), adapter(UNTIED), jnp.float32), tokens)
  for dtype in (jnp.float32, jnp.bfloat16):
    model = eight_bits(UNTIED, weights, dtype)
    assert model.dtype == dtype
    error = np.abs(logits(model, tokens) - exact).mean() / exact.std()
    assert least < error < most


@EACH
@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_matrices_take_half_of_the_memory(config, weights: str):
  plain, model = eight_bits(config, "", jnp.bfloat16), eight_bits(config, weights, jnp.bfloat16)

  def sizes(model):
    matrices = [m for _, m in nnx.iter_modules(model) if isinstance(m, Linear)]
    assert len(matrices) == 4 * config.n_layers + 1  # the head too
    return sum(m.kernel[...].nbytes for m in matrices), sum(
      x.nbytes for x in jax.tree.leaves(nnx.state(model))
    )

  (before, all_before), (after, all_after) = sizes(plain), sizes(model)
  assert 2 * after == before
  channels = sum(m.kernel_scale[...].size for _, m in nnx.iter_modules(model) if isinstance(m, Linear))
  assert all_before - all_after == after - 4 * channels
  assert model.embed.embedding.dtype == jnp.bfloat16 and model.final_norm.scale.dtype == jnp.float32


@EACH
def test_each_array_is_put_once_and_only_one_matrix_is_read_at_a_time(weights: str):
  """In float32 there is never more than the matrix that is read, and its place among those it is fused with."""
  merged = Merged(UNTIED, random_params(UNTIED), adapter(UNTIED), untied=True)
  events = []

  class Watched(Merged):
    def read_into(self, name, out):
      events.append(name)
      super().read_into(name, out)

  watched = Watched(UNTIED, random_params(UNTIED), adapter(UNTIED), untied=True)

  def put(name, x):
    events.append(f"put {name}")
    return jax.device_put(x)

  model = build.from_params(watched.config, watched, jnp.bfloat16, fused=True, weights=weights, put=put)
  read = [e for e in events if not e.startswith("put ")]
  assert sorted(read) == sorted(merged) and len(events) - len(read) == len(jax.tree.leaves(nnx.state(model)))
  at = events.index("put layers.1.attn.qkv.kernel")
  assert events[at - 3 : at + 2] == [
    *(f"layers.1.attn.{x}.kernel" for x in "qkv"), "put layers.1.attn.qkv.kernel", "put layers.1.attn.qkv.kernel_scale"
  ]  # fmt: skip


def test_names_of_formats_are_those_of_settings():
  assert tuple(FORMATS) == WEIGHTS
  assert [formats(d) for d in ("float32", "bfloat16", *WEIGHTS)] == [
    ("float32", ""), ("bfloat16", ""), ("bfloat16", "int8"), ("bfloat16", "fp8")
  ]  # fmt: skip


def test_unusable_formats_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch):
  with pytest.raises(ValueError, match="unknown format of weights 'int4': choose one of int8, fp8"):
    eight_bits(TIED, "int4")

  def refuses(x):
    raise NotImplementedError("no such\nconversion")

  monkeypatch.setattr(quantise, "_as_bfloat16", refuses)
  with pytest.raises(
    ValueError, match="dtype fp8: XLA on cpu does not convert float8_e4m3fn: choose int8"
  ) as e:
    eight_bits(TIED, "fp8")
  assert "\n" not in str(e.value)


@EACH
def test_a_loaded_model_computes_in_bfloat16_and_records_name_its_weights(weights: str):
  changes = {"model.source": "tiny", "model.adapter": "", "decode.dtype": weights, "decode.max_new_tokens": 12,
             "decode.kv_capacity": 256, "eval.dtype": "float32"}  # fmt: skip
  config = with_changes(Config(), changes)
  model = Model(config)
  assert model.model.dtype == jnp.bfloat16
  assert (
    model.model.head.kernel.dtype == model.model.layers[0].mlp.down.kernel.dtype == FORMATS[weights].dtype
  )
  state = model.interpreter(False).prefill([1, 2, 3])
  assert {x.dtype for x in state.pool.keys + state.pool.values} == {jnp.dtype(jnp.bfloat16)}
  assert len(model.generate("Why?", parallel=False).trace.main.tokens) > 0
  other = model.with_settings(dataclasses.replace(config.decode, dtype="float32", temperature=1.0))
  assert other.model is model.model and other.limits == model.limits
  assert decode_settings(config, "", parallel=True)["decode.dtype"] == weights
  assert settings_of(config, "base", timed=True)["decode.dtype"] == weights
  assert settings_of(config, "base", timed=False)["decode.dtype"] == "float32"
  batched = with_changes(config, {"eval.dtype": weights})
  assert settings_of(batched, "base", timed=False)["decode.dtype"] == weights


def test_the_conversion_stays_in_the_product_of_the_platform_that_is_compiled_for():
  """As compile mode does: lowered on a CPU for a TPU."""
  x, kernel, scale = jnp.ones((8, 16)), jnp.ones((16, 4), jnp.int8), jnp.ones(4)
  traced = jax.jit(xla_product).trace(x, kernel, scale)
  barriers = {
    p: "optimization_barrier" in traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu")
  }
  assert barriers == {"cpu": False, "tpu": True}
