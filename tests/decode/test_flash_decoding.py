"""The kernels of decode attention, interpreted: against float64 over random shapes, under every nesting of `vmap`, in
whole responses; what they read; and that they compile for machines that are not here."""

import re
from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec

from pasta_jax.decode.attention import DECODE, check_kind
from pasta_jax.decode.flash_decoding import flash_decode
from pasta_jax.decode.interpreter import Interpreter
from pasta_jax.decode.scheduler import Scheduler
from pasta_jax.decode.settings import Limits, SamplingConfig, StepFeatures

PLATFORMS = ("tpu", "gpu")
POOL_AXES = (None, None, 0, 0, 0, 0)  # branches of one pool


def attend(platform: str, softcap: float = 0.0, interpret: bool = True):
  """(keys, values, mask, q, k, v) of one branch -> context."""

  def run(keys, values, mask, q, k, v):
    branch = flash_decode(platform, mask, None, softcap, interpret=interpret)
    return branch((keys, values), q, k, v, False)[0]

  return run


def expected(keys, values, mask, q, k, v, softcap: float = 0.0) -> np.ndarray:
  """[W, K, G, H] in float64 by the definition, one query at a time; what is not seen is not touched."""
  keys, values, q, k, v = (np.asarray(x, np.float64) for x in (keys, values, q, k, v))
  out = np.zeros(q.shape)
  for w, h, g in np.ndindex(*q.shape[:3]):
    seen = np.flatnonzero(mask[w])
    scores = np.append(keys[h][:, seen].T @ q[w, h, g], k[w, h] @ q[w, h, g])
    weights = np.exp(softcap * np.tanh(scores / softcap) if softcap else scores)
    out[w, h, g] = weights @ np.concatenate([values[h, seen], v[w, h][None]]) / weights.sum()
  return out


def random_layer(rng, branches, heads, groups, width, entries, share=0.5, dtype=jnp.float32):
  """(keys, values, mask, q, k, v): `share` of the mask is True. Values of float32 are exact in `dtype`."""

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape) * width**-0.25, dtype)

  mask = jnp.asarray(rng.random((branches, entries)) < share)
  q, k, v = (normal(branches, heads, *more, width).astype(jnp.float32) for more in ((groups,), (), ()))
  return normal(heads, width, entries), normal(heads, entries, width), mask, q, k, v


SHAPES = [
  # (branches, key-value heads, query heads of each, width, entries, soft cap)
  (1, 1, 1, 64, 128, 0.0),
  (2, 1, 8, 256, 384, 0.0),
  (5, 3, 3, 64, 40, 2.0),
  (8, 2, 2, 24, 1100, 30.0),  # a width and a pool that are not whole tiles
  (33, 1, 3, 16, 600, 0.0),  # more branches than a block has
]


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_branches_of_one_pool_equal_float64(platform: str, shape):
  *sizes, softcap = shape
  rng = np.random.default_rng(sum(sizes))
  run = jax.jit(jax.vmap(attend(platform, softcap), POOL_AXES))
  for share in (0.6, 0.01):
    layer = random_layer(rng, *sizes, share=share)
    mask = layer[2].at[0].set(False)  # one branch sees only itself
    layer = (*layer[:2], mask, *layer[3:])
    got = run(*layer)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected(*layer, softcap), atol=4e-6)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_bfloat16_adds_in_float32(platform: str):
  layer = random_layer(np.random.default_rng(1), 8, 1, 3, 64, 1024, dtype=jnp.bfloat16)
  got = jax.jit(jax.vmap(attend(platform), POOL_AXES))(*layer)
  wanted = expected(*layer)
  error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
  assert error < 4e-3  # weights are rounded to 2**-9, the sums are not


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_nesting_of_vmap(platform: str):
  """No vmap; requests with a pool each; branches in two axes; a mask for all branches; pools that differ by branch;
  keys that differ and values that do not."""
  rng, run = np.random.default_rng(2), attend(platform)
  size = (3, 1, 2, 16, 40)
  layers = [random_layer(rng, *size) for _ in range(2)]
  wanted = [expected(*layer) for layer in layers]
  keys, values, mask, q, k, v = layers[0]
  close = partial(np.testing.assert_allclose, atol=4e-6)

  close(jax.jit(run)(keys, values, mask[1], q[1], k[1], v[1]), wanted[0][1])
  requests = [jnp.stack(x) for x in zip(*layers)]
  close(jax.jit(jax.vmap(jax.vmap(run, POOL_AXES)))(*requests), wanted)
  twice = [jnp.stack([x, x[::-1]]) for x in (mask, q, k, v)]
  got = jax.jit(jax.vmap(jax.vmap(run, POOL_AXES), POOL_AXES))(keys, values, *twice)
  close(got, [wanted[0], wanted[0][::-1]])
  got = jax.jit(jax.vmap(run, (None, None, None, 0, 0, 0)))(keys, values, mask[0], q, k, v)
  close(got, expected(keys, values, mask[:1].repeat(3, 0), q, k, v))
  of_one = [x[:, 1] for x in requests[2:]]
  close(jax.jit(jax.vmap(run))(*requests[:2], *of_one), [w[1] for w in wanted])
  got = jax.jit(jax.vmap(run, (0, None, 0, 0, 0, 0)))(requests[0], values, *of_one)
  for i in range(2):
    close(got[i], expected(requests[0][i], values, *(x[i : i + 1] for x in of_one))[0])


@pytest.mark.parametrize("platform", PLATFORMS)
def test_what_nobody_sees_is_not_read(platform: str):
  """Splits before, between and after the visible ones hold NaN, which would reach the result even with weight 0."""
  for width in (16, 128):  # of values across, and as they are
    layer = keys, values, mask, *token = random_layer(np.random.default_rng(3), 2, 1, 1, width, 4096)
    unseen = np.zeros(4096, bool)
    unseen[:512] = unseen[1024:2048] = unseen[2560:] = True
    mask = mask & ~unseen
    clean = jnp.where(unseen, 0.0, keys), jnp.where(unseen[:, None], 0.0, values)
    spoilt = jnp.where(unseen, jnp.nan, keys), jnp.where(unseen[:, None], jnp.nan, values)
    run = jax.jit(jax.vmap(attend(platform), POOL_AXES))
    got = run(*spoilt, mask, *token)
    np.testing.assert_array_equal(got, run(*clean, mask, *token))
    np.testing.assert_allclose(got, expected(*layer[:2], mask, *token), atol=4e-6)


def pallas_calls(jaxpr) -> list:
  """All of a program, at any depth."""
  found = []
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "pallas_call":
      found.append(eqn)
    else:
      found += [call for inner in jaxprs_in_params(eqn.params) for call in pallas_calls(inner)]
  return found


@pytest.mark.parametrize("platform, calls", [("tpu", 1), ("gpu", 2)])
def test_one_kernel_reads_a_pool_for_all_branches(platform: str, calls: int):
  layer = random_layer(np.random.default_rng(4), 4, 2, 3, 128, 384)
  run = jax.vmap(attend(platform, interpret=False), POOL_AXES)
  for program, arguments, pools in (
    (run, layer, 1),
    (jax.vmap(run), [jnp.stack([x] * 5) for x in layer], 5),
  ):
    jaxpr = jax.make_jaxpr(program)(*arguments).jaxpr
    found = pallas_calls(jaxpr)
    assert len(found) == calls
    shapes = [x.aval.shape for x in found[0].invars]
    assert shapes.count((pools, 2, 128, 384)) == shapes.count((pools, 2, 384, 128)) == 1
    assert max(np.prod(s) for s in shapes) == pools * 2 * 128 * 384


@pytest.mark.parametrize("platform, lowered, calls", [("tpu", "tpu", 1), ("gpu", "cuda", 2)])
@pytest.mark.parametrize(
  "branches, heads, groups, width, entries, softcap, dtype",
  [
    (8, 16, 1, 256, 4096, 0.0, jnp.bfloat16),  # Gemma 7B
    (8, 3, 3, 64, 4224, 0.0, jnp.bfloat16),  # SmolLM2-135M
    (8, 1, 8, 256, 8192, 50.0, jnp.bfloat16),  # Gemma 2B
    (1, 4, 5, 80, 1000, 0.0, jnp.float32),
    (64, 2, 8, 128, 512, 0.0, jnp.bfloat16),
  ],
)
def test_kernels_lower(platform, lowered, calls, branches, heads, groups, width, entries, softcap, dtype):
  run = jax.jit(jax.vmap(attend(platform, softcap, interpret=False), POOL_AXES))
  device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
  there = AbstractMesh((1,), ("x",), abstract_device=device) if platform == "gpu" else AbstractMesh((), ())
  with jax.sharding.use_abstract_mesh(there):
    traced = run.trace(*shapes_of(branches, heads, groups, width, entries, dtype))
    text = traced.lower(lowering_platforms=(lowered,)).as_text()
  assert text.count("tpu_custom_call" if platform == "tpu" else "__gpu$xla.gpu.triton") == calls


def shapes_of(branches, heads, groups, width, entries, dtype):
  shape = jax.ShapeDtypeStruct
  pool = shape((heads, width, entries), dtype), shape((heads, entries, width), dtype)
  token = [shape((branches, heads, *more, width), jnp.float32) for more in ((groups,), (), ())]
  return *pool, shape((branches, entries), jnp.bool_), *token


@pytest.mark.skipif(find_spec("libtpu") is None, reason="the TPU compiler is not installed")
@pytest.mark.parametrize(
  "heads, groups, width, entries, dtype",
  [
    (16, 1, 256, 2048, jnp.bfloat16),
    (3, 3, 64, 4096, jnp.bfloat16),
    (1, 8, 256, 512, jnp.bfloat16),
    (3, 3, 64, 1000, jnp.float32),
  ],
)
def test_the_tpu_compiler_takes_the_kernel(heads, groups, width, entries, dtype):
  """And copies no pool for it."""
  from pasta_jax.train.ahead import topology

  one = NamedSharding(Mesh(np.array(topology("v5e:1x1")[:1]), ("x",)), PartitionSpec())
  run = jax.jit(jax.vmap(attend("tpu", interpret=False), POOL_AXES), in_shardings=one, out_shardings=one)
  traced = run.trace(*shapes_of(8, heads, groups, width, entries, dtype))
  compiled = traced.lower(lowering_platforms=("tpu",)).compile()
  pool = heads * width * entries
  moved = re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|transpose|fusion)\(", compiled.as_text())
  assert moved and all(np.prod([int(n) for n in dims.split(",")]) < pool for dims in moved)
  assert compiled.memory_analysis().temp_size_in_bytes < 2**20


def test_responses_are_those_of_plain_attention(monkeypatch: pytest.MonkeyPatch):
  """Whole programs of promises, in a batch of requests with a pool each."""
  monkeypatch.setitem(DECODE, "gpu", partial(flash_decode, "gpu", interpret=True))
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # for `decode.attention` to take it
  limits = Limits(max_new_tokens=40, max_threads=6, branch_widths=(4,), kv_buckets=(128,))
  prompts, sampling = [[1, 2, 3], [4, 5], [6, 7, 8, 2]], SamplingConfig(temperature=1.0, seed=3)
  tokens = []
  for kind in ("xla", "interpret", "gpu"):
    interpreter = Interpreter(tiny.model(), tiny.VOCABULARY, limits, StepFeatures(attention=kind))
    interpreter.params = tiny.weights(1, "habits")
    traces = Scheduler(interpreter, batch_size=2, branch_width=2).run(prompts, sampling, seeds=range(3))
    tokens.append([[t.tokens.tolist() for t in trace.threads] for trace in traces])
  assert tokens[0] == tokens[1] == tokens[2]
  assert any(len(threads) > 1 for threads in tokens[0])


@pytest.mark.parametrize("kind", [k for k in ("tpu", "gpu") if k != jax.default_backend()])
def test_kernels_of_other_machines_are_refused(kind: str):
  with pytest.raises(ValueError, match=f"decode.attention={kind} cannot run on this machine's"):
    check_kind(kind)
