"""`decode.invariant`: the same bits at every branch width, batch size, pool size and number of devices."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import tiny
from helpers.devices import on_eight

from pasta_jax.config import Config, with_changes
from pasta_jax.decode import invariant
from pasta_jax.decode.interpreter import Interpreter
from pasta_jax.decode.scheduler import Scheduler, decode
from pasta_jax.decode.settings import DecodeError, Limits, SamplingConfig, StepFeatures
from pasta_jax.weights import build

ROOT = Path(__file__).parents[2]
LIMITS = Limits(
  max_new_tokens=60, max_threads=24, max_depth=2, max_topic=4, branch_widths=(1,), kv_buckets=(128,)
)
PROMPTS = [[3, 5, 2], [4, 4], [6, 7, 8, 9], [1], [3, 5, 2, 2], [9, 12, 17], [2, 2, 2], [20, 1, 7]]


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
  """Of 16 pool entries, so that responses of sixty tokens have several."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(invariant, "BLOCK", 16)
    yield


def models(dtype: str, n: int = 3) -> list:
  """Random ones, in the form that decodes."""
  found = []
  for seed in range(n):
    params = build.to_params(nnx.merge(tiny.GRAPH, tiny.weights(seed)))
    weights = dtype if dtype in ("int8", "fp8") else ""
    products = jnp.dtype("bfloat16" if weights else dtype)
    found.append(build.for_decoding(tiny.CONFIG, params, None, products, weights=weights))
  return found


def answers(
  models, widths=(1,), pools=(128,), look=1, batch=1, sampling=SamplingConfig(), **features
) -> list:
  """Threads, tokens and the bits of log-probabilities of every model's answers, one by one or in batches."""
  limits = dataclasses.replace(LIMITS, branch_widths=widths, kv_buckets=pools, steps_per_look=look)
  it, found = Interpreter(models[0], tiny.VOCABULARY, limits, StepFeatures(**features)), []
  for model in models:
    it.params = nnx.split(model)[1]
    if batch > 1:
      scheduler = Scheduler(it, batch_size=batch, branch_width=widths[-1])
      traces = scheduler.run(PROMPTS, sampling, seeds=range(len(PROMPTS)))
    else:
      traces = [decode(it, p, dataclasses.replace(sampling, seed=i)) for i, p in enumerate(PROMPTS)]
    found += [[(t.path, t.tokens.tolist(), t.log_p.tobytes()) for t in trace.threads] for trace in traces]
  return found


# Branch widths, pool sizes, steps between two looks, batch size.
SHAPES = {
  "promise": [
    ((2,), (256,), 4, 1),
    ((4,), (40, 512), 1, 1),  # a pool that grows, from a size that is no multiple of the block
    ((8,), (128,), 1, 1),
    ((16,), (128,), 1, 1),
    ((1,), (128,), 1, 3),
    ((3,), (128,), 4, 8),
  ],
  "live": [((8,), (256,), 4, 1), ((3,), (128,), 1, 2)],
}


@pytest.mark.parametrize("visibility", SHAPES)
def test_the_same_bits_at_every_width_batch_and_pool(visibility):
  tried = models("bfloat16")
  expected = answers(tried, invariant=True, visibility=visibility)
  assert sum(len(threads) > 1 for threads in expected) >= len(expected) // 3, "too few promises"
  for shape in SHAPES[visibility]:
    assert answers(tried, *shape, invariant=True, visibility=visibility) == expected, shape


def test_the_ordinary_step_has_other_bits():
  """What the test above would find."""
  tried = models("bfloat16")
  assert answers(tried) != answers(tried, (8,))


@pytest.mark.parametrize("dtype", ["int8", "fp8", "float32"])
def test_samples_in_other_dtypes(dtype):
  """Top-p reads sums of probabilities, and a penalty what the branch sees."""
  sampling = SamplingConfig(temperature=0.8, top_p=0.9, repetition_penalty=1.2)
  tried = models(dtype)
  expected = answers(tried, sampling=sampling, invariant=True)
  assert answers(tried, (4,), (256,), 1, 2, sampling=sampling, invariant=True) == expected


def test_float32_gives_the_tokens_of_the_ordinary_step():
  tried = models("float32")
  tokens = lambda answers: [[thread[:2] for thread in threads] for threads in answers]
  assert tokens(answers(tried, (4,), invariant=True)) == tokens(answers(tried, (4,)))


@pytest.mark.parametrize("window, softcap", [(False, 0.0), (True, 2.0)])
def test_attention_equals_float64(window, softcap):
  """Rows of three pools in a tile; one row sees nothing, and entries that nobody sees are large."""
  rng = np.random.default_rng(1)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  owner = np.array([0, 0, 2, 2, 2, -1])
  keys, values = draw(3, 2, 8, 40), draw(3, 2, 40, 8)  # [B, K, H, P], [B, K, P, H]
  q, k, v = draw(6, 2, 3, 8), draw(6, 2, 8), draw(6, 2, 8)
  visible, near = rng.random((6, 40)) < 0.4, rng.random((6, 40)) < 0.5
  visible[1], visible[owner < 0], visible[:, 30:] = False, False, False
  keys[..., 30:] = values[:, :, 30:] = 1e4
  attend = invariant.attention(visible, near if window else None, owner, 3, softcap)
  context, (own_k, own_v) = jax.jit(attend, static_argnums=4)((keys, values), q, k, v, window)
  np.testing.assert_array_equal(own_k, k)
  np.testing.assert_array_equal(own_v, v)
  for row, request in enumerate(owner):
    mask = np.append(visible[row] & near[row] if window else visible[row], True)
    pool = [keys[request].swapaxes(1, 2), values[request]]
    all_keys, all_values = (np.append(x, y[row, :, None], axis=1).astype(float) for x, y in zip(pool, (k, v)))
    scores = np.einsum("kgh,ksh->kgs", q[row].astype(float), all_keys)
    scores = softcap * np.tanh(scores / softcap) if softcap else scores
    scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("kgs,ksh->kgh", weights / weights.sum(-1, keepdims=True), all_values)
    np.testing.assert_allclose(context[row], expected, atol=3e-6)


def test_eight_devices():
  lines = on_eight("decode_on_eight_devices.py", "invariant", "1")
  assert sum("8 of 8 the same" in line for line in lines) == 2


def test_what_is_refused():
  invariant.check_mesh({"data": 8, "fsdp": 1, "tensor": 1})
  for axis in ("fsdp", "tensor"):
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, axis: 2}
    with pytest.raises(DecodeError, match="mesh.data=-1 --config.mesh.fsdp=1 --config.mesh.tensor=1$"):
      invariant.check_mesh(sizes)
  with pytest.raises(
    ValueError, match="decode.invariant has .* not decode.attention=interpret: leave it at auto"
  ):
    with_changes(Config(), {"decode.invariant": True, "decode.attention": "interpret"})
