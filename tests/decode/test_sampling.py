"""Lengths that are tokens are one class of choices, against a plain restatement with exact probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasta_jax.decode.sampling import as_arrays, draw
from pasta_jax.decode.settings import SamplingConfig, StepFeatures, specialise

LENGTHS = [2, 3, 5, 6]  # of 8 tokens; not next to each other
# Together .36, above any other token; each on its own is below all of them.
P = np.array([0.30, 0.20, 0.05, 0.15, 0.14, 0.12, 0.04, 0.0])
LOGITS = jnp.log(jnp.asarray(P, jnp.float32) + 1e-12) + 3
DRAWN = 20_000


def chances(lengths, **settings) -> np.ndarray:
  """[8] how often each token is drawn."""
  sampling = SamplingConfig(temperature=1.0, **settings)
  features = specialise(StepFeatures(), sampling)
  keys = jax.random.split(jax.random.key(0), DRAWN)
  one = lambda key: draw(LOGITS, key, jnp.asarray(lengths, jnp.int32), as_arrays(sampling), features)
  return np.bincount(jax.jit(jax.vmap(one))(keys), minlength=8) / DRAWN


def expected(kept: list[int]) -> np.ndarray:
  """Probabilities of the kept tokens alone."""
  p = np.where(np.isin(np.arange(8), kept), P, 0)
  return p / p.sum()


@pytest.mark.parametrize(
  "settings, apart, together",
  [
    ({}, range(7), range(7)),
    ({"top_k": 1}, [0], LENGTHS),
    ({"top_k": 2}, [0, 1], [0, *LENGTHS]),
    ({"top_p": 0.45}, [0, 1], [0, *LENGTHS]),  # what reaches it is kept
    ({"top_p": 0.7}, [0, 1, 3, 4], [0, 1, *LENGTHS]),
    ({"min_p": 0.6}, [0, 1], [0, *LENGTHS]),  # .18 of .30; .216 of .36
    ({"top_k": 3, "min_p": 0.7}, [0], [0, *LENGTHS]),
  ],
)
def test_the_class_counts_as_one_entry(settings, apart, together):
  for lengths, kept in (([], apart), (LENGTHS, together)):
    np.testing.assert_allclose(chances(lengths, **settings), expected(list(kept)), atol=0.015)


def test_plain_sampling_is_unchanged():
  features, key = specialise(StepFeatures(), SamplingConfig(temperature=0.7)), jax.random.key(3)
  sampling = as_arrays(SamplingConfig(temperature=0.7))
  for k in jax.random.split(key, 50):
    both = [draw(LOGITS, k, jnp.asarray(ids, jnp.int32), sampling, features) for ids in ([], LENGTHS)]
    assert both[0] == both[1]


@pytest.mark.parametrize("length, token", [("likeliest", 3), ("median", 3)])
def test_a_greedy_promise_gets_one_of_the_lengths(length, token):
  features, sampling, key = StepFeatures(length=length), as_arrays(SamplingConfig()), jax.random.key(0)
  choose = lambda logits, ids: int(draw(logits, key, jnp.asarray(ids, jnp.int32), sampling, features))
  assert choose(LOGITS, []) == 0  # each on its own loses
  assert choose(LOGITS, LENGTHS) == token
  assert choose(LOGITS.at[0].add(0.3), LENGTHS) == 0  # .40 is above .36
  # Half of the probability of the lengths lies up to the third one, the last is the likeliest.
  skewed = jnp.log(jnp.asarray([0.1, 0.1, 0.2, 0.1, 0.1, 0.1, 0.25, 0.05]))
  assert choose(skewed, LENGTHS) == {"likeliest": 6, "median": 5}[length]
