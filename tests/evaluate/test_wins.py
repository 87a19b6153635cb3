"""Figures of judgements: by hand, against known intervals, and over simulated evaluations."""

import numpy as np
import pytest

from pasta_jax.evaluate.metrics import wins


def row(first=None, second=None, **more) -> dict:
  return {"orders": [first, second], **more}


@pytest.mark.parametrize(
  "count, n, low, high",
  [  # Clopper and Pearson's, from R's binom.test
    (0, 10, 0.0, 0.30849710),
    (5, 10, 0.18708603, 0.81291397),
    (7, 20, 0.15390920, 0.59218853),
    (10, 10, 0.69150290, 1.0),
    (1, 100, 0.00025314603, 0.05445939),
  ],
)
def test_exact_intervals(count, n, low, high):
  found = wins.share(count, n)
  assert found[:2] == (count, n) and found.share == count / n
  assert (found.low, found.high) == pytest.approx((low, high), abs=1e-7)


def test_nothing_has_no_interval():
  assert np.isnan(wins.share(0, 0)[2:]).all()
  assert np.isnan(wins.mean(np.array([np.nan, np.nan]))[:3]).all()
  one = wins.mean(np.array([0.75, np.nan]))
  assert one.value == 0.75 and one.n == 1 and np.isnan(one.low)


def test_means_leave_out_what_is_not_judged():
  found = wins.mean(np.array([1.0, np.nan, 0.0, 1.0, 1.0]))
  assert found.value == 0.75 and found.n == 4 and 0 <= found.low < 0.75 < found.high <= 1
  one, other = np.array([1.0, 0.5, np.nan, 0.0]), np.array([0.5, 0.5, 1.0, np.nan])
  assert wins.difference(one, other)[::3] == (0.25, 2)


def test_the_interval_is_that_of_the_normal_approximation_for_many_prompts():
  values = np.random.default_rng(5).random(2000)
  found = wins.mean(values)
  half = 1.96 * values.std() / 2000**0.5
  assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=half / 10)


def test_wins_ties_and_losses():
  assert wins.outcomes([0.51, 1.0, 0.5, 0.5, 0.5, 0.0]) == (2, 3, 1)


def test_position_by_hand():
  rows = [
    row(0.9, 0.8),  # the system wins in both orders
    row(0.2, 0.1),  # the baseline does
    row(0.7, 0.4),  # the answer shown first
    row(0.3, 0.6),  # the answer shown second
    row(0.6, 0.5),  # another verdict, but no winner in both
    row(0.9, None),  # one order: first
    row(None, 0.9),  # one order: second
    {"preference": 1.0},  # of a judge that does not say
  ]
  found = wins.position(rows)
  assert found.changed[:2] == (3, 5)
  assert found.first[:2] == (2, 4) and found.lean == "" and not found.decides
  # First: 0.9, 0.8 read as 0.2 for the first …
  readings = [0.9, 0.2, 0.2, 0.9, 0.7, 0.6, 0.3, 0.4, 0.6, 0.5, 0.9, 0.1]
  assert found.first_preference == pytest.approx(np.mean(readings))
  assert found.readings_first[:2] == (6, 11)


@pytest.mark.parametrize("orders", ["both", "one"])
@pytest.mark.parametrize("place", ["first", "second"])
def test_a_judge_that_always_takes_one_place_is_found_out(orders, place):
  p = 0.9 if place == "first" else 0.1
  rows = [row(p, 1 - p) if orders == "both" else row(p) if k % 2 else row(None, 1 - p) for k in range(20)]
  found = wins.position(rows)
  assert found.lean == place and found.decides
  assert found.changed.found == (20 if orders == "both" else 0)


def test_neither_a_biased_reader_nor_a_coin_decides_by_the_place():
  rng = np.random.default_rng(0)
  # A reader that knows the better answer in 8 of 10 pairs, and takes the first one in the others.
  biased = wins.position([row(0.9, 0.1) if k % 5 == 0 else row(0.9, 0.9) for k in range(100)])
  assert biased.lean == "first" and not biased.decides and biased.changed.share == 0.2
  coin = wins.position([row(*rng.choice([0.1, 0.9], 2)) for _ in range(100)])
  assert not coin.decides and 0.3 < coin.changed.share < 0.7


def test_repeats():
  rows = [
    row(0.9, repeated=0.6) | {"first": 0},
    row(None, 0.2, repeated=0.9) | {"first": 1},
    row(0.9, 0.8, repeated=0.7) | {"first": 1},
    row(0.5, repeated=0.5) | {"first": 0},
    row(0.9),  # not repeated
    row(0.9, repeated=None) | {"first": 0},  # nor read
    row(0.9, 0.2, repeated=0.9) | {"first": 0},
    row(0.9, 0.2, repeated=0.9) | {"first": 1},
  ]
  assert wins.repeats(rows)[:2] == (4, 6)
  assert wins.repeats([]).n == 0


def test_defects():
  found = wins.defects([["said twice", "cut off"], ["cut off"], [], []])
  assert list(found) == ["any", "cut off", "said twice"]
  assert [s[:2] for s in found.values()] == [(2, 4), (2, 4), (1, 4)]
  assert found["said twice"].low == pytest.approx(0.0063094, abs=1e-6)


def test_a_planted_difference_is_found_and_its_interval_covers_it():
  """Two systems of which one wins 10 points more, on prompts that are hard or easy for both."""
  prompts, planted, covered, above, found = 300, 0.1, 0, 0, []
  for seed in range(100):
    rng = np.random.default_rng(seed)
    easy = rng.uniform(0.1, 0.7, prompts)
    same = rng.random(prompts)  # what both systems share of a prompt's luck
    luck = lambda rng=rng, same=same: np.where(rng.random(prompts) < 0.5, same, rng.random(prompts))
    one, other = (luck() < easy + planted / 0.9) * 1.0, (luck() < easy) * 1.0
    for values in (one, other):
      values[rng.random(prompts) < 0.1] = 0.5  # ties take a tenth of every difference
    result = wins.difference(one, other)
    found.append(result.value)
    covered += result.low <= planted <= result.high
    above += result.low > 0
  assert 90 <= covered <= 99
  assert np.mean(found) == pytest.approx(planted, abs=0.01)
  assert above > 75
