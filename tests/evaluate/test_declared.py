"""Figures of declared lengths: by hand, against SciPy's, and over planted correlations."""

import numpy as np
import pytest
from scipy import stats

from pasta_jax.evaluate.metrics import declared


def correlated(rho: float, answers: int, chunks: int, seed: int = 0) -> list[list[tuple[int, int]]]:
  """Answers whose chunks' declared and true lengths are monotone in normal variables of correlation `rho`."""
  normal = np.random.default_rng(seed).multivariate_normal([0, 0], [[1, rho], [rho, 1]], (answers, chunks))
  return [[(int(40 + 1000 * d), int(40 + 1000 * t)) for d, t in answer] for answer in normal]


def test_ranks_are_spearmans_with_ties():
  rng = np.random.default_rng(1)
  lengths = [[(int(d), int(d + t)) for d, t in rng.integers(1, 6, (n, 2))] for n in rng.integers(0, 7, 40)]
  pairs = [pair for of_answer in lengths for pair in of_answer]
  found = declared.rank_correlation(lengths, within=False)
  assert found.value == pytest.approx(stats.spearmanr(pairs).statistic, abs=1e-12)
  assert found.low < found.value < found.high


def test_the_correlation_within_answers_by_hand():
  # Of the chunks that count, declared 10, 20, 30, 30 have the ranks 1, 2, 3.5, 3.5; true 5, 9, 7, 1: 2, 4, 3, 1.
  lengths = [[(10, 5), (20, 9)], [(99, 2)], [], [(30, 7), (30, 1)]]
  # Less their answers' means: x = −.5, .5, 0, 0 and y = −1, 1, 1, −1.
  assert declared.rank_correlation(lengths, within=True).value == pytest.approx(1 / (0.5 * 4) ** 0.5)


@pytest.mark.parametrize("rho", [0.0, 0.6, -0.9])
def test_a_planted_correlation_is_found_in_answers_of_equal_kind(rho):
  spearman = 6 / np.pi * np.arcsin(rho / 2)
  for within in (False, True):
    found = declared.rank_correlation(correlated(rho, answers=400, chunks=5), within=within)
    assert found.value == pytest.approx(spearman, abs=0.04)
    assert found.low <= spearman <= found.high


def test_the_interval_covers_a_planted_correlation_about_as_often_as_it_says():
  spearman = 6 / np.pi * np.arcsin(0.5 / 2)
  covered = 0
  for seed in range(40):
    found = declared.rank_correlation(correlated(0.5, answers=60, chunks=4, seed=seed), within=True)
    covered += found.low <= spearman <= found.high
  assert 33 <= covered < 40


def test_numbers_that_only_tell_answers_apart_correlate_over_all_chunks_and_not_within():
  rng = np.random.default_rng(2)
  lengths = []
  for _ in range(300):
    size = int(rng.choice([20, 60, 120]))  # an answer's chunks are short or long, and so are its numbers
    lengths.append([tuple(size + rng.integers(-5, 6, 2)) for _ in range(4)])
  pooled, within = (declared.rank_correlation(lengths, within=w) for w in (False, True))
  assert pooled.value > 0.85 and pooled.low > 0.8
  assert abs(within.value) < 0.1 and within.low < 0 < within.high


def test_numbers_that_only_tell_chunks_apart_correlate_within_although_answers_differ_the_other_way():
  lengths = [[(100 - k, 10 * k), (101 - k, 10 * k + 1)] for k in range(1, 30)]
  assert declared.rank_correlation(lengths, within=False).value < -0.95
  assert declared.rank_correlation(lengths, within=True).value > 0.99


def test_an_answer_with_one_number_for_all_chunks_stays_counted():
  telling = [[(10, 12), (30, 28)], [(10, 12), (30, 28)]]
  one_number = [[(20, 5), (20, 40)]]
  assert declared.rank_correlation(telling, within=True).value == pytest.approx(1)
  assert 0.3 < declared.rank_correlation(telling + one_number, within=True).value < 0.9
  assert np.isnan(declared.rank_correlation(one_number, within=True).value)


def test_intervals_are_over_answers():
  """Chunks that are copies of each other say nothing new."""
  once = [[pair] for [pair] in correlated(0.4, answers=80, chunks=1)]
  copies = [[pair] * 20 for [pair] in once]
  one, many = (declared.rank_correlation(lengths, within=False) for lengths in (once, copies))
  assert many == pytest.approx(one)
  is_long = lambda _, true: true > 40
  assert declared.share_of_chunks(copies, is_long) == pytest.approx(declared.share_of_chunks(once, is_long))


def test_places_are_equally_wide():
  places = [declared.place(40, true) for true in range(1, 80)]
  assert {p: places.count(p) for p in declared.PLACES} == {
    "earlier": 30,
    "before": 10,
    "after": 10,
    "later": 29,
  }
  assert [declared.place(40, true) for true in (30, 31, 40, 41, 50, 51)] == [
    "earlier", "before", "before", "after", "after", "later",
  ]  # fmt: skip


def test_all_figures_of_a_system():
  lengths = [[(40, 38), (40, 75)], [], [(40, 45), (20, 20), (20, 3)]]
  found = declared.summarise(lengths)
  assert (found["finished_chunks"], found["answers_with_two_chunks"], found["commonest_length"]) == (5, 2, 40)
  assert found["commonest_length_share"] == 0.6
  assert (
    found["commonest_length_share_low"] == pytest.approx(1 / 3) and found["commonest_length_share_high"] == 1
  )
  assert [found[f"ends_{p}_share"] for p in declared.PLACES] == [0.2, 0.4, 0.2, 0.2]
  assert declared.commonest([[(50, 1), (30, 1)], [(30, 1), (50, 1)]]) == 30
  assert found["length_correlation"] == pytest.approx(
    stats.spearmanr([40, 40, 40, 20, 20], [38, 75, 45, 20, 3])[0]
  )


def test_what_too_few_chunks_do_not_say_is_left_out():
  assert declared.summarise([[], []]) == {}
  one = declared.summarise([[(40, 30), (40, 50)]])
  assert one["commonest_length_share"] == 1 and not [k for k in one if k.endswith(("_low", "_high"))]
  assert "length_correlation" not in one and "length_correlation_within" not in one
