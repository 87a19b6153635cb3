"""Kernels for CPU: each against float64 over random shapes, and the same bits whatever is computed beside a row."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pasta_jax.cpu import calls, programs

pytest.importorskip("numba")
CPU = Path("/proc/cpuinfo")
FEATURES = CPU.read_text() if CPU.exists() else ""
pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="kernels for CPU")


@pytest.fixture(autouse=True, scope="module")
def _ready():
  programs.require()


def bfloat(rng, *shape) -> np.ndarray:
  return rng.normal(size=shape).astype(jnp.bfloat16)


def wide(x) -> np.ndarray:
  return np.asarray(x, np.float64)


def matrix_of(rng, form: str, *shape) -> tuple[np.ndarray, np.ndarray]:
  """(kernel, scale) of a format."""
  if form == "bfloat16":
    return bfloat(rng, *shape), np.zeros(0, np.float32)
  kernel = rng.integers(-127, 128, shape).astype(np.int8)
  return kernel, rng.uniform(1e-3, 1e-2, shape[1:]).astype(np.float32)


def dense(kernel, scale) -> np.ndarray:
  return wide(kernel) * (wide(scale) if scale.size else 1)


FORMS = ("bfloat16", "int8")


@settings(deadline=None, max_examples=60)
@given(
  rows=st.integers(1, 75), n=st.integers(1, 90), out=st.integers(64, 900), form=st.sampled_from(FORMS),
  seed=st.integers(0, 99),
)  # fmt: skip
def test_products_equal_float64(rows: int, n: int, out: int, form: str, seed: int):
  """Any number of rows and columns: whole panels or not, more rows than one group, one tile or several."""
  rng = np.random.default_rng(seed)
  x, (kernel, scale) = bfloat(rng, rows, 2 * n), matrix_of(rng, form, 2 * n, out)
  expected = wide(x) @ dense(kernel, scale)
  actual = wide(calls.multiply(x, kernel, scale))
  bound = np.abs(wide(x)) @ np.abs(dense(kernel, scale))  # rounding grows with the terms, not with their sum
  assert np.all(np.abs(actual - expected) <= 1e-6 * bound + 1e-30)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_has_the_same_bits_beside_any_others(form: str):
  rng = np.random.default_rng(0)
  x, (kernel, scale) = bfloat(rng, 40, 576), matrix_of(rng, form, 576, 1000)
  every = np.asarray(calls.multiply(x, kernel, scale))
  for rows in (1, 2, 3, 4, 5, 8, 9, 33):
    np.testing.assert_array_equal(calls.multiply(x[:rows], kernel, scale), every[:rows])
  alone = jax.jit(jax.vmap(lambda row: calls.multiply(row, kernel, scale)))(x)
  np.testing.assert_array_equal(alone, every)
  twice = jax.jit(jax.vmap(jax.vmap(lambda row: calls.multiply(row, kernel, scale))))(x.reshape(5, 8, 576))
  np.testing.assert_array_equal(twice.reshape(40, 1000), every)


@pytest.mark.parametrize("form", FORMS)
def test_rows_with_a_matrix_each(form: str):
  rng = np.random.default_rng(1)
  x = bfloat(rng, 3, 32)
  kernels, scales = zip(*(matrix_of(rng, form, 32, 70) for _ in range(3)))
  run = jax.vmap(calls.multiply)
  actual = run(x, np.stack(kernels), np.stack(scales))
  for row, kernel, scale, y in zip(x, kernels, scales, actual):
    np.testing.assert_allclose(y, wide(row) @ dense(kernel, scale), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("activation", calls.ACTIVATIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 7, 24])
def test_gated_products_equal_float64(rows: int, form: str, activation: str):
  rng = np.random.default_rng(2)
  x, (kernel, scale) = bfloat(rng, rows, 48), matrix_of(rng, form, 48, 2, 200)
  which = np.full(1, calls.ACTIVATIONS[activation], np.int32)
  gate, up = np.moveaxis(np.einsum("ri,ipo->rpo", wide(x), dense(kernel, scale)), 1, 0)
  steep = gate if activation == "silu" else 2 * np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
  with np.errstate(over="ignore"):
    expected = gate / (1 + np.exp(-steep)) * up
  actual = calls.gated(x, kernel, scale, which)
  assert actual.dtype == jnp.bfloat16
  np.testing.assert_allclose(wide(actual), expected, rtol=5e-3, atol=1e-4 * np.abs(expected).max())
  batched = jax.vmap(lambda row: calls.gated(row, kernel, scale, which))(x)
  np.testing.assert_array_equal(np.asarray(batched), np.asarray(actual))


@pytest.mark.parametrize("rows", [1, 5])
def test_norms_equal_float64(rows: int):
  rng = np.random.default_rng(3)
  x, scale = rng.normal(size=(rows, 96)).astype(np.float32) * 7, rng.normal(size=96).astype(np.float32)
  expected = wide(x) / np.sqrt(np.mean(wide(x) ** 2, axis=1, keepdims=True) + 1e-5) * scale
  actual = calls.normalise(x, scale, np.full(1, 1e-5, np.float32))
  np.testing.assert_allclose(wide(actual), expected, rtol=4e-3)
  assert np.abs(wide(actual) - expected).mean() < 2e-3 * np.abs(expected).mean()
  batched = jax.vmap(lambda row: calls.normalise(row, scale, np.full(1, 1e-5, np.float32)))(x)
  np.testing.assert_array_equal(np.asarray(batched), np.asarray(actual))


def pool_of(rng, requests: int, width: int, heads: int, groups: int, size: int, entries: int, share: float):
  """(keys, values, mask, q, k, v) of `calls.attend`."""
  return (
    bfloat(rng, requests, heads, size, entries), bfloat(rng, requests, heads, entries, size),
    rng.random((requests, width, entries)) < share, bfloat(rng, requests, width, heads, groups, size) / 4,
    bfloat(rng, requests, width, heads, size), bfloat(rng, requests, width, heads, size),
  )  # fmt: skip


def attention(keys, values, mask, q, k, v, softcap: float) -> np.ndarray:
  """In float64."""
  keys = np.concatenate(
    [np.broadcast_to(wide(keys)[:, None], (*q.shape[:3], *keys.shape[2:])), wide(k)[..., None]], axis=-1
  )
  values = np.concatenate(
    [np.broadcast_to(wide(values)[:, None], (*q.shape[:3], *values.shape[2:])), wide(v)[..., None, :]],
    axis=-2,
  )
  scores = wide(q) @ keys
  scores = softcap * np.tanh(scores / softcap) if softcap else scores
  seen = np.concatenate([mask, np.ones((*mask.shape[:2], 1), bool)], axis=-1)[:, :, None, None]
  weights = np.where(seen, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
  return weights @ values / weights.sum(axis=-1, keepdims=True)


@settings(deadline=None, max_examples=40)
@given(
  requests=st.integers(1, 3), width=st.integers(1, 9), heads=st.integers(1, 3), groups=st.integers(1, 4),
  size=st.sampled_from([64, 128]), panels=st.integers(1, 9), share=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
  softcap=st.sampled_from([0.0, 2.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_attention_equals_float64(requests, width, heads, groups, size, panels, share, softcap, seed):
  """Pools of whole chunks or not; branches that see nothing, a few entries, all; requests side by side."""
  operands = pool_of(np.random.default_rng(seed), requests, width, heads, groups, size, 64 * panels, share)
  expected = attention(*operands, softcap)
  actual = wide(calls.attend(*operands, softcap))
  # Weights are rounded to bfloat16 for the product with the values, and so is the result.
  np.testing.assert_allclose(actual, expected, atol=2e-2 * np.abs(expected).max())
  assert np.abs(actual - expected).mean() < 3e-3 * max(np.abs(expected).mean(), 1e-3)


def test_attention_does_not_depend_on_the_pool_or_on_other_branches():
  rng = np.random.default_rng(5)
  keys, values, mask, q, k, v = pool_of(rng, 1, 7, 3, 3, 64, 640, 0.4)
  mask[..., 400:] = False
  every = np.asarray(calls.attend(keys, values, mask, q, k, v, 0.0))
  for lanes in (slice(0, 1), slice(2, 6), slice(6, 7)):
    one = calls.attend(keys, values, mask[:, lanes], q[:, lanes], k[:, lanes], v[:, lanes], 0.0)
    np.testing.assert_array_equal(np.asarray(one), every[:, lanes])
  small = calls.attend(keys[..., :448], values[:, :, :448], mask[..., :448], q, k, v, 0.0)
  np.testing.assert_array_equal(np.asarray(small), every)
  keys[..., 400:], values[:, :, 400:] = np.nan, 7  # entries that nobody sees
  np.testing.assert_array_equal(np.asarray(calls.attend(keys, values, mask, q, k, v, 0.0)), every)


@pytest.mark.parametrize("lead", [(), (3,)])
def test_new_entries_are_written_where_they_belong(lead: tuple):
  rng = np.random.default_rng(6)
  keys, values = ([bfloat(rng, *lead, *shape) for _ in range(2)] for shape in ((2, 8, 32), (2, 32, 8)))
  rows = [bfloat(rng, *lead, 4, 2, 8) for _ in range(4)]
  used = np.asarray([3, 28, 0][: lead[0]] if lead else 17, np.int32)
  run = calls.append if not lead else jax.vmap(calls.append)
  after = np.zeros((*lead, 4), np.int32)
  written = jax.jit(run)([*keys, *values], rows, used, after)
  for i in np.ndindex(lead):
    for old, new, row in zip(keys, written[:2], rows[:2]):
      expected = old[i].copy()
      expected[..., used[i] : used[i] + 4] = row[i].transpose(1, 2, 0)
      np.testing.assert_array_equal(np.asarray(new)[i], expected)
    for old, new, row in zip(values, written[2:], rows[2:]):
      expected = old[i].copy()
      expected[:, used[i] : used[i] + 4] = row[i].transpose(1, 0, 2)
      np.testing.assert_array_equal(np.asarray(new)[i], expected)


WRONG = {
  "other dtypes": lambda: calls.multiply(np.ones((1, 64), np.float32), np.ones((64, 64), np.float32), NONE),
  "other shapes": lambda: calls.multiply(np.ones((1, 62), jnp.bfloat16), np.ones((64, 64), jnp.bfloat16), NONE),
  "a scale for each column": lambda: calls.multiply(np.ones((1, 64), jnp.bfloat16), np.ones((64, 64), np.int8), NONE),
  "do not fit their pool": lambda: calls.append(
    [np.zeros((1, 8, 32), jnp.bfloat16), np.zeros((1, 32, 8), jnp.bfloat16)],
    [np.zeros((4, 1, 8), jnp.bfloat16)] * 2, np.int32(29), np.zeros(4, np.int32),
  ),
}  # fmt: skip
NONE = np.zeros(0, np.float32)


@pytest.mark.parametrize("words", WRONG)
def test_a_call_that_cannot_be_computed_is_an_error(words: str):
  with pytest.raises(Exception, match=words):
    jax.block_until_ready(WRONG[words]())


NARROW = {
  "NUMBA_CPU_NAME": "haswell",
  "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+popcnt,+sse4.2",
}


@pytest.mark.skipif("avx512f" not in FEATURES, reason="its own instructions are what the other tests use")
def test_machines_without_avx512(tmp_path):
  """The tests above in a process that compiles for AVX2."""
  tests = f"{__file__}::"
  chosen = [tests + n for n in ("test_products_equal_float64", "test_a_row_has_the_same_bits_beside_any_others",
            "test_gated_products_equal_float64", "test_attention_equals_float64")]  # fmt: skip
  done = subprocess.run(
    [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", *chosen],
    env={**os.environ, **NARROW, "NUMBA_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
  assert "passed" in done.stdout and "skipped" not in done.stdout


ONE_CORE = """
import os, sys
os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})
import numpy as np
from test_kernels import *
programs.require()
rng = np.random.default_rng(9)
x, (kernel, scale) = bfloat(rng, 9, 256), matrix_of(rng, "int8", 256, 1500)
np.savez(sys.argv[1], product=calls.multiply(x, kernel, scale),
         attention=np.asarray(calls.attend(*pool_of(rng, 2, 5, 3, 2, 64, 512, 0.5), 0.0), np.float32))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux")
def test_the_number_of_threads_changes_no_bit(tmp_path):
  path = tmp_path / "one.npz"
  subprocess.run([sys.executable, "-c", ONE_CORE, str(path)], check=True, cwd=Path(__file__).parent)
  rng = np.random.default_rng(9)
  x, (kernel, scale) = bfloat(rng, 9, 256), matrix_of(rng, "int8", 256, 1500)
  alone = np.load(path)
  np.testing.assert_array_equal(calls.multiply(x, kernel, scale), alone["product"])
  attended = calls.attend(*pool_of(rng, 2, 5, 3, 2, 64, 512, 0.5), 0.0)
  np.testing.assert_array_equal(np.asarray(attended, np.float32), alone["attention"])
