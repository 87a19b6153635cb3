"""Length-controlled win rates: planted effects, and what must hold of any preferences."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from pasta_jax.evaluate.metrics.length_control import (
  check,
  fit_difficulty,
  length_controlled,
  length_feature,
  read_preferences,
  read_weights,
)
from pasta_jax.utils.jsonl import read_jsonl


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def planted(phi, psi, theta, n=4000, seed=0, longer=0.0):
  """(preference, baseline's lengths, system's, difficulty) drawn from the model; `longer`: characters more,
  on average."""
  rng = np.random.default_rng(seed)
  baseline = rng.gamma(4, 300, n)
  system = np.maximum(baseline + longer + rng.normal(0, 400, n), 1)
  gamma = rng.normal(0, 1, n)
  p = sigmoid(phi * length_feature(baseline, system) + psi * gamma + theta)
  return (rng.uniform(size=n) < p).astype(float), baseline, system, gamma


@pytest.mark.parametrize("theta", [-1.5, 0.0, 1.0])
@pytest.mark.parametrize("longer", [-400.0, 0.0, 400.0])
def test_a_planted_effect_is_found(theta, longer):
  """However much longer the answers are, the rate is what equal lengths would give."""
  y, baseline, system, gamma = planted(-1.6, 0.8, theta, longer=longer)
  fit = length_controlled(y, baseline, system, gamma)
  assert fit.length_controlled == pytest.approx(100 * sigmoid(0.8 * gamma + theta).mean(), abs=3)
  assert (fit.phi, fit.psi, fit.theta) == pytest.approx((-1.6, 0.8, theta), abs=0.2)
  if longer:  # the plain rate does not forgive length
    assert (fit.win_rate > fit.length_controlled) == (longer > 0) and abs(
      fit.win_rate - fit.length_controlled
    ) > 5
  without = length_controlled(y, baseline, system)
  assert without.psi == 0 and without.length_controlled == pytest.approx(fit.length_controlled, abs=5)


def test_what_must_hold():
  y, baseline, system, gamma = planted(-1.0, 0.5, 0.3, n=300)
  fit = length_controlled(y, baseline, system, gamma, resamples=50)
  assert fit.win_rate == pytest.approx(100 * y.mean())
  assert (
    fit.win_rate_error == pytest.approx(100 * y.std(ddof=1) / np.sqrt(300))
    and 1 < fit.length_controlled_error < 5
  )
  some = y.copy()
  some[:100] = np.nan
  assert length_controlled(some, baseline, system, gamma).win_rate == pytest.approx(100 * y[100:].mean())
  for longer in (1.0, 1.4):  # a judge that does not care for length: no prior taste is put upon it
    even = length_controlled(np.full(300, 0.5), baseline, longer * baseline)
    assert even.win_rate == 50 and even.length_controlled == pytest.approx(50, abs=0.1)
  with pytest.raises(ValueError, match="three judged prompts"):
    length_controlled(np.array([1.0, 0.0, np.nan]), *np.ones((2, 3)))
  assert not length_feature(np.ones(5), np.ones(5)).any()


def test_difficulties_are_found_from_many_models():
  rng = np.random.default_rng(1)
  m, n = 40, 200
  gamma = rng.normal(0, 1, n)
  weights = np.stack([rng.normal(-1.6, 0.2, m), rng.uniform(0.5, 1.5, m), rng.normal(-0.5, 1.5, m)], axis=1)
  baseline, system = rng.gamma(4, 300, n), rng.gamma(4, 300, (m, n))
  z = weights[:, :1] * length_feature(baseline[None], system) + weights[:, 1:2] * gamma + weights[:, 2:]
  preference = sigmoid(z)
  found = fit_difficulty(preference, baseline, system, weights)
  assert np.corrcoef(found, gamma)[0, 1] > 0.99
  preference[:, 0] = np.nan
  assert fit_difficulty(preference, baseline, system, weights)[0] == 0  # nothing known: the prior's mean


def test_the_check_against_a_leaderboard(tmp_path):
  """Published rates made by the model itself are found again; a wrong one shows."""
  rng = np.random.default_rng(2)
  n, models = 600, {f"m{k}": (-1.6, 0.8, t) for k, t in enumerate((-2.0, -1.0, 0.0, 0.5, 1.0, -0.5))}
  gamma, baseline = rng.normal(0, 1, n), rng.gamma(4, 300, n)
  rows = [
    {"id": str(i), "baseline_chars": baseline[i], "preference": {}, "output_chars": {}} for i in range(n)
  ]
  published = {}
  for name, (phi, psi, theta) in models.items():
    system = np.maximum(baseline + rng.normal(200, 400, n), 1)
    p = sigmoid(phi * length_feature(baseline, system) + psi * gamma + theta)
    for row, value, length in zip(rows, p, system):
      row["preference"][name], row["output_chars"][name] = value, length
    published[name] = {
      "win_rate": 100 * p.mean(),
      "length_controlled_winrate": 100 * sigmoid(psi * gamma + theta).mean(),
    }
  published["m3"]["length_controlled_winrate"] += 10
  path = tmp_path / "preferences.jsonl"
  path.write_text("".join(json.dumps(r) + "\n" for r in rows))
  found = {r["model"]: r for r in check(read_preferences(path), published, models)}
  for name, row in found.items():
    assert row["error"] == pytest.approx(0, abs=1e-9)
    assert row["length_controlled_error"] == pytest.approx(-10 if name == "m3" else 0, abs=1)
    assert row["held_out_error"] == pytest.approx(-10 if name == "m3" else 0, abs=1.5)


@pytest.mark.skipif(
  "PASTA_SHARED_DATA" not in os.environ, reason="the real preferences are not in this repository"
)
def test_the_real_leaderboard():
  """PASTA_SHARED_DATA names the folder that holds eval/: plain rates exact to 0.01, at least 18 of 21 within
  1.5."""
  folder = Path(os.environ["PASTA_SHARED_DATA"]) / "eval"
  board = {r["model"]: r for r in read_jsonl(folder / "alpaca_eval_leaderboards.jsonl")
           if r["leaderboard"] == "weighted_alpaca_eval_gpt4_turbo"}  # fmt: skip
  rows = check(read_preferences(folder / "alpaca_eval2_gpt4turbo_preferences.jsonl.gz"), board,
               read_weights(folder / "alpaca_eval2_lc_glm_weights.jsonl"))  # fmt: skip
  assert len(rows) == 21 and all(abs(r["error"]) < 0.01 for r in rows)
  for kind in ("length_controlled_error", "held_out_error"):
    assert sum(abs(r[kind]) < 1.5 for r in rows) >= 18, kind
