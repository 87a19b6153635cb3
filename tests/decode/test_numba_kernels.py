"""Decoding with the kernels for CPU: whole answers, in models wide enough for them."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import tiny

from pasta_jax.config import Config, with_changes
from pasta_jax.cpu import calls, handler, panels, programs, vectors
from pasta_jax.decode.attention import check_kind
from pasta_jax.decode.generator import Model
from pasta_jax.decode.interpreter import Interpreter
from pasta_jax.decode.scheduler import Scheduler, decode
from pasta_jax.decode.settings import Limits, SamplingConfig, StepFeatures
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.model import products
from pasta_jax.weights import build

pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="kernels for CPU")

CONFIG = dataclasses.replace(
  tiny.CONFIG, d_model=128, n_heads=6, n_kv_heads=2, head_dim=64, d_ff=208, window=24,
  local_layers=(True, False),
)  # fmt: skip
WIDE = 96  # columns of the head: more than a panel
VOCABULARY = Vocabulary(tiny.TinyTokenizer(), base_size=WIDE - 6)
GELU = dataclasses.replace(
  CONFIG, activation="gelu", norm_offset=1.0, attention_softcap=30.0, post_norms=True
)
LIMITS = Limits(
  max_new_tokens=60, max_threads=24, max_depth=2, max_topic=4, branch_widths=(1,), kv_buckets=(128,)
)
PROMPTS = [[3, 5, 2], [4, 4], [6, 7, 8, 9], [1], [3, 5, 2, 2], [9, 12, 17], [2, 2, 2], [20, 1, 7]]


def models(dtype: str, kernels: str = "numba", config=CONFIG, n: int = 2) -> list:
  found, wide = [], dataclasses.replace(config, vocab_size=WIDE)
  for seed in range(n):
    graph = nnx.split(tiny.model(config))[0]
    params = build.to_params(nnx.merge(graph, tiny.weights(seed, config=config)))
    for name, axis in (("embed.embedding", 0), ("head.kernel", 1)):  # rows of no token, before the tags
      words, tags = np.split(params[name], [tiny.VOCABULARY.base_size], axis)
      more = np.zeros_like(
        np.repeat(words[:1] if axis == 0 else words[:, :1], WIDE - config.vocab_size, axis)
      )
      params[name] = np.concatenate([words, more, tags], axis)
    weights = dtype if dtype == "int8" else ""
    products = jnp.dtype("bfloat16" if weights else dtype)
    found.append(build.for_decoding(wide, params, None, products, weights=weights, product=kernels))
  return found


def answers(models, widths=(1,), pools=(128,), batch=1, kernels="numba", vocabulary=VOCABULARY, **features):
  """Every thread's path, tokens and log-probabilities, of every model and prompt."""
  limits = dataclasses.replace(LIMITS, branch_widths=widths, kv_buckets=pools)
  features = StepFeatures(attention=kernels, **features)
  it, found = Interpreter(models[0], vocabulary, limits, features), []
  for model in models:
    it.params = nnx.split(model)[1]
    if batch > 1:
      scheduler = Scheduler(it, batch_size=batch, branch_width=widths[-1])
      traces = scheduler.run(PROMPTS, SamplingConfig(), seeds=range(len(PROMPTS)))
    else:
      traces = [decode(it, prompt) for prompt in PROMPTS]
    found += [[(t.path, t.tokens.tolist(), t.log_p) for t in trace.threads] for trace in traces]
  return found


def bits(answers) -> list:
  return [[(path, tokens, log_p.tobytes()) for path, tokens, log_p in threads] for threads in answers]


@pytest.mark.parametrize("dtype, visibility", [("bfloat16", "promise"), ("int8", "live")])
def test_the_same_bits_at_every_width_batch_and_pool(dtype: str, visibility: str):
  """A kernel computes a row in one way, so answers in 16 and 8 bits do not depend on what is decoded beside them."""
  tried = models(dtype)
  expected = bits(answers(tried, visibility=visibility))
  assert sum(len(threads) > 1 for threads in expected) >= len(expected) // 3, "too few promises"
  for widths, pools, batch in (((2,), (256,), 1), ((8,), (64, 512), 1), ((3,), (128,), 4)):
    assert bits(answers(tried, widths, pools, batch, visibility=visibility)) == expected, (
      widths,
      pools,
      batch,
    )


@pytest.mark.parametrize("config", [CONFIG, GELU], ids=["silu", "gelu"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_answers_are_those_of_xla_but_for_rounding(dtype: str, config):
  """Up to where rounding first changes a token."""
  ours, xla = (answers(models(dtype, kernels, config), (2,), kernels=kernels) for kernels in ("numba", "xla"))
  alike, differences = 0, []
  for mine, other in zip(ours, xla):
    if [t[0] for t in mine] != [t[0] for t in other]:
      continue
    for (_, tokens, log_p), (_, tokens2, log_p2) in zip(mine, other):
      tokens, tokens2 = tokens[:-1], tokens2[:-1]  # the last one was not chosen
      same = int(np.argmin([*(a == b for a, b in zip(tokens, tokens2)), False]))
      alike += same
      differences += np.abs(np.asarray(log_p[:same], float) - log_p2[:same]).tolist()
  assert alike > 100, "too little to compare"
  differences = np.asarray(differences)[~np.isnan(differences)]  # what was not chosen has no log-probability
  assert len(differences) > 100 and np.median(differences) < 0.03 and np.max(differences) < 1.0


def test_float32_is_computed_by_xla():
  """The exact one stays as it is, whatever the kernels."""
  assert bits(answers(models("float32"))) == bits(answers(models("float32", "xla"), kernels="xla"))


def test_a_model_that_is_too_narrow_is_computed_by_xla():
  params = build.to_params(nnx.merge(tiny.GRAPH, tiny.weights(0)))
  found = [
    build.for_decoding(tiny.CONFIG, params, None, jnp.bfloat16, product=kernels)
    for kernels in ("numba", "xla")
  ]
  # Norms of 24 channels and products with 32 columns are XLA's, and so is attention with heads of 8.
  mine, other = (
    answers([model], kernels=k, vocabulary=tiny.VOCABULARY) for model, k in zip(found, ("numba", "xla"))
  )
  assert bits(mine) == bits(other)


def test_auto_says_what_it_is(monkeypatch):
  resolve = products.resolve_kernels
  assert resolve("auto", "bfloat16") == resolve("numba", "int8") == "numba"
  assert resolve("xla", "int8") == resolve("auto", "float32") == resolve("numba", "fp8") == "xla"
  with pytest.raises(
    ValueError, match="^decode.kernels=numba is for one CPU, not for a mesh: leave it at auto$"
  ):
    resolve("numba", "bfloat16", object())
  with pytest.raises(ValueError, match="^decode.attention=numba is for one CPU"):
    check_kind("numba", object())
  monkeypatch.setattr(programs, "unusable", lambda: "numba is not installed")
  assert resolve("auto", "bfloat16") == "xla"
  with pytest.raises(ValueError, match="^decode.kernels=numba cannot be used: numba is not installed$"):
    resolve("numba", "bfloat16")
  config = with_changes(
    Config(), {"model.source": "tiny", "model.adapter": "", "decode.kernels": "numba", "decode.dtype": "int8"}
  )
  with pytest.raises(ValueError, match="numba is not installed"):
    Model(config)


@pytest.fixture
def fresh():
  programs.unusable.cache_clear()
  yield
  programs.unusable.cache_clear()


def test_without_numba(monkeypatch, fresh):
  monkeypatch.setitem(sys.modules, "numba", None)
  assert programs.unusable() == "numba is not installed (pip install numba)"


def test_another_interface_of_xla(monkeypatch, fresh):
  monkeypatch.setitem(handler._FIELDS, "XLA_FFI_Buffer", ("struct_size", "data"))
  assert programs.unusable().startswith("XLA_FFI_Buffer has other fields in this jaxlib (struct_size, ")
  monkeypatch.undo()
  monkeypatch.setattr(handler, "_FUNCTIONS", [*handler._FUNCTIONS, "Something"])
  programs.unusable.cache_clear()
  assert "another interface" in programs.unusable()


def test_wrong_numbers_are_found(monkeypatch, fresh):
  right = calls.multiply
  monkeypatch.setattr(calls, "multiply", lambda *operands: right(*operands) * 1.01)
  assert programs.unusable() == "their product in bfloat16 is not NumPy's"


def test_jaxlib_without_its_header(monkeypatch, fresh):
  monkeypatch.setattr(handler, "_header", lambda: "")
  assert programs.unusable().startswith("the header of XLA's foreign functions is not in ")


def test_calls_name_what_kernels_take():
  assert (calls.PANEL, calls.ACTIVATIONS) == (panels.PANEL, {"silu": panels.SILU, "gelu": panels.GELU})
  assert calls.LANES % vectors.LANES == 0


NO_FOLDER = """
from numba.core import caching
caching.CacheImpl._locator_classes = []
"""
CACHED = """
from pasta_jax.cpu import programs
programs.require()
print(sum(kernel.cache_hits for kernel in programs._kept), len(programs._kept))
"""


def test_compiled_kernels_are_kept(tmp_path):
  """A second process compiles nothing. Where nothing can be kept, each one does."""

  def run(folder: Path) -> list[str]:
    script = CACHED if folder.is_dir() else NO_FOLDER + CACHED
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder)}
    done = subprocess.run(
      [sys.executable, "-c", script], check=True, capture_output=True, text=True, env=environment
    )
    return done.stdout.split()

  first, second = run(tmp_path), run(tmp_path)
  assert first[0] == "0" and second == [second[1], second[1]]
  assert run(tmp_path / "missing")[0] == "0"
