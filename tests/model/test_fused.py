"""The fused form of the layers, which decodes: parity with the form that training has, and how it is sharded."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_model import TIED, UNTIED, logits, random_params, random_tokens
from test_products import decode_token

from pasta_jax.model import sharding
from pasta_jax.model.attention import causal_mask, dense_attention
from pasta_jax.model.lora import Adapter, linears
from pasta_jax.model.transformer import rope_angles, split_gate_up, split_qkv
from pasta_jax.weights import build

FORMS = {
  "llama": TIED,
  "untied head": UNTIED,
  "qwen 2": dataclasses.replace(TIED, qkv_bias=True),
  "qwen 3": dataclasses.replace(UNTIED, qk_norm=True),
  "one key-value head": dataclasses.replace(TIED, n_kv_heads=1, qkv_bias=True),
  "no groups": dataclasses.replace(UNTIED, n_kv_heads=6, qkv_bias=True),
  "gemma 3": dataclasses.replace(
    TIED, n_kv_heads=1, qk_norm=True, post_norms=True, norm_offset=1.0, activation="gelu", window=5,
    local_layers=(True, True, False), local_rope_theta=100.0, scale_embeddings=True, logit_softcap=15.0,
    attention_softcap=20.0, query_scale=0.2,
  ),
}  # fmt: skip
EVERY = pytest.mark.parametrize("family", FORMS)


def adapter(config) -> Adapter:
  """Updates of some of the matrices that are fused, and tags."""
  rng = np.random.default_rng(5)
  draw = lambda *shape: rng.normal(size=shape).astype("f")
  d, kv = config.d_model, config.n_kv_heads * config.head_dim
  factors = {
    "layers.1.attn.k": (draw(d, 2), draw(2, kv)),
    "layers.2.mlp.up": (draw(d, 2), draw(2, config.d_ff)),
  }
  return Adapter(0.3, factors, draw(6, d), None if config.tie_embeddings else draw(d, 6))


def both(config, dtype):
  """(the form that training has, fused), with the same weights."""
  params = random_params(config)
  return [build.for_decoding(config, params, adapter(config), dtype, fused=f) for f in (False, True)]


@EVERY
def test_the_fused_form_computes_the_same_logits(family: str):
  plain, fused = both(FORMS[family], jnp.float32)
  tokens = random_tokens(2, 30)
  assert {n.rsplit(".", 1)[1] for n in linears(fused)} == {"qkv", "o", "gate_up", "down"}
  expected = logits(plain, tokens)
  assert expected.std() > 0.5
  np.testing.assert_allclose(logits(fused, tokens), expected, atol=5e-5, rtol=5e-5)  # a prefill
  step = jnp.asarray([3, 261, 262, 267])
  np.testing.assert_allclose(decode_token(fused, step), decode_token(plain, step), atol=5e-5, rtol=5e-5)


@EVERY
def test_the_fused_form_in_bfloat16_is_as_close_to_float32(family: str):
  tokens = random_tokens(2, 30)
  exact = logits(both(FORMS[family], jnp.float32)[0], tokens)
  plain, fused = (
    np.abs(logits(m, tokens) - exact).mean() / exact.std() for m in both(FORMS[family], jnp.bfloat16)
  )
  assert 1e-5 < fused < 0.05 and fused < 1.2 * plain


@EVERY
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_come_back(family: str, dtype):
  plain, fused = (build.to_params(m) for m in both(FORMS[family], dtype))
  assert plain.keys() == fused.keys()
  for name, value in plain.items():
    assert value.dtype == fused[name].dtype
    np.testing.assert_array_equal(fused[name], value, err_msg=name)


def test_heads_and_columns_are_where_the_rules_shard_them():
  """Each key-value head has its queries, its key and its value next to each other."""
  c = dataclasses.replace(TIED, qkv_bias=True)
  params = random_params(c)
  layer = build.for_decoding(c, params, None, jnp.float32).layers[2]
  q, k, v = (
    np.asarray(params[f"layers.2.attn.{x}.kernel"]).reshape(c.d_model, -1, c.head_dim) for x in "qkv"
  )
  for head in range(c.n_kv_heads):
    own = [*(q[:, c.n_groups * head + g] for g in range(c.n_groups)), k[:, head], v[:, head]]
    np.testing.assert_array_equal(layer.attn.qkv.kernel[:, head], np.concatenate(own, axis=1))
  bias = [params[f"layers.2.attn.{x}.bias"] for x in "qkv"]
  for part, expected in zip(split_qkv(layer.attn.qkv.bias[...], c), bias):
    np.testing.assert_array_equal(part.reshape(-1), expected)
  for part, name in zip(split_gate_up(layer.mlp.gate_up.kernel[...]), ("gate", "up")):
    np.testing.assert_array_equal(part, params[f"layers.2.mlp.{name}.kernel"])


def test_a_part_that_is_missing_or_of_another_shape_is_named():
  params = random_params(TIED)
  lacking = {name: x for name, x in params.items() if name != "layers.1.attn.v.kernel"}
  with pytest.raises(ValueError, match="parameter layers.1.attn.v.kernel is missing"):
    build.from_params(TIED, lacking, fused=True)
  wrong = params | {"layers.0.mlp.up.kernel": np.zeros((24, 41), "f")}
  with pytest.raises(
    ValueError, match=r"layers.0.mlp.up.kernel has shape \(24, 41\), the model needs \(24, 40\)"
  ):
    build.from_params(TIED, wrong, fused=True)


def communication(shape: dict[str, int], weights: str) -> list[str]:
  """The collective operations of one layer of the fused form on a mesh."""
  c = dataclasses.replace(TIED, qkv_bias=True)
  mesh = sharding.make_mesh(shape)
  model = build.for_decoding(c, random_params(c), None, jnp.float32, weights=weights)
  graph, state = nnx.split(model.layers[0])
  angles = rope_angles(jnp.arange(9)[None], c.rope_frequencies())
  run = lambda s, x: nnx.merge(graph, s)(x, angles, dense_attention(causal_mask(9)), None, False)[0]
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  x = jax.device_put(jnp.ones((1, 9, c.d_model)), whole)
  with jax.set_mesh(mesh):
    compiled = jax.jit(run, out_shardings=whole).lower(sharding.shard_put(mesh, state), x).compile()
  return re.findall(r"= \S+ (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", compiled.as_text())


@pytest.mark.parametrize("weights", ["", "int8"])
def test_a_layer_on_a_tensor_axis_communicates_after_its_two_last_products_only(weights: str):
  """Two devices: one sum after the output projection and one after the feed-forward, as in the plain form."""
  root = Path(__file__).parents[2]
  mesh = {"data": 1, "fsdp": 1, "tensor": 2}
  code = f"import test_fused; print(*test_fused.communication({mesh}, {weights!r}))"
  path = os.pathsep.join(map(str, (root, root / "tests", root / "tests" / "model")))
  flags = "--xla_force_host_platform_device_count=2"
  done = subprocess.run(
    [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.split() == ["all-reduce", "all-reduce"]
