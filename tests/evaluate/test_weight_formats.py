"""What 8 bits cost: the figures against float64, and those of a tiny model."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax

from pasta_jax.config import Config, with_changes
from pasta_jax.decode.generator import Model
from pasta_jax.evaluate.nats import scored
from pasta_jax.evaluate.weight_formats import compare, differences, summary

ROOT = Path(__file__).parents[2]


def test_figures_equal_float64():
  rng = np.random.default_rng(0)
  exact, noise = rng.normal(size=(9, 50)) * 3, rng.normal(size=(9, 50))
  exact, other = exact.astype("f"), (exact + 2 * noise).astype("f")
  targets = rng.integers(0, 50, 9)
  p, q = (log_softmax(x.astype(np.float64), axis=-1) for x in (exact, other))
  expected = {
    "largest": np.abs(other.astype(np.float64) - exact).max(-1),
    "mean": np.abs(other.astype(np.float64) - exact).mean(-1),
    "kl": (np.exp(p) * (p - q)).sum(-1),
    "same": exact.argmax(-1) == other.argmax(-1),
    "nats": -q[np.arange(9), targets],
  }
  actual = {key: np.asarray(x) for key, x in differences(exact, other, targets).items()}
  assert actual.keys() == expected.keys() and 0 < actual["same"].sum() < 9
  for key, value in expected.items():
    np.testing.assert_allclose(actual[key], value, rtol=1e-4, atol=1e-5, err_msg=key)
  halves = [{k: x[:4] for k, x in actual.items()}, {k: x[4:] for k, x in actual.items()}]
  whole = summary(halves)
  assert whole["tokens"] == 9 and whole["largest"] == pytest.approx(expected["largest"].max(), rel=1e-4)
  assert whole["kl"] == pytest.approx(expected["kl"].mean(), rel=1e-4)


def test_a_tiny_model_in_every_format():
  config = with_changes(Config(), {"model.source": "tiny", "model.adapter": ""})
  rows = [json.loads(line) for line in (ROOT / "data" / "seed.jsonl").read_text().splitlines()[:2]]
  found = compare(config, rows, ["bfloat16", "int8", "fp8"])
  assert list(found) == ["float32", "bfloat16", "int8", "fp8"]
  exact, rough, int8, fp8 = found.values()
  assert exact["largest"] == exact["mean"] == exact["kl"] == 0 and exact["same"] == 1
  read = list(scored(Model(config, dtype="float32"), rows, ["promise"]))
  nats = np.concatenate([row.nats["promise"] for row in read])
  assert exact["tokens"] == len(nats) and exact["nats"] == pytest.approx(nats.mean(), rel=1e-5)
  assert 0 < rough["mean"] < int8["mean"] < fp8["mean"] and 0 < rough["kl"] < fp8["kl"]
  assert (
    int8["megabytes"]
    == fp8["megabytes"]
    < rough["megabytes"]
    == pytest.approx(exact["megabytes"] / 2, rel=0.05)
  )


def test_a_format_that_does_not_exist_is_refused():
  config = with_changes(Config(), {"model.source": "tiny", "model.adapter": ""})
  with pytest.raises(
    ValueError, match="decode.dtype must be one of auto, float32, bfloat16, int8, fp8, not 'int4'"
  ):
    compare(config, [], ["int4"])
