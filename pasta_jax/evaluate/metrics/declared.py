"""Whether declared lengths mean something: figures of finished chunks, with the doubt that belongs to them.

`lengths` are, by answer, the pairs (tokens that the promise declares, tokens of the chunk) of its finished chunks
(`decode.record.ResponseRecord.lengths`). Chunks of one answer are alike, so that intervals are 95 %, by bootstrap over
answers: over those that have a chunk which counts. No model and no files here.
"""

import collections
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pasta_jax.evaluate.metrics import wins

Pair = tuple[int, int]  # tokens: declared, true
NEAR = 10  # tokens before and after a declared length
PLACES = ("earlier", "before", "after", "later")  # where chunks end: `place`


class Estimate(NamedTuple):
  """A figure and its 95 % interval: NaN where it has no value, an interval needs two answers."""

  value: float
  low: float
  high: float


def rank_correlation(lengths: Sequence[Sequence[Pair]], *, within: bool) -> Estimate:
  """Spearman's correlation of declared and true lengths, from -1 to 1; NaN if either is the same everywhere.

  Ranks are among all chunks that count, ties have their mean rank, and resamples are ranked anew. Without `within`,
  every chunk counts, and the figure is the correlation of the ranks: an answer whose chunks are all long raises it if
  its promises say so. With `within`, the chunks of answers that have at least two count; each answer's mean rank is
  subtracted from its ranks, declared and true, and the figure is Σ xy / √(Σ x² Σ y²) of what is left, over all
  chunks. An answer whose declared, or true, lengths are all equal adds nothing to Σ xy, but its other lengths stay
  in the denominator: numbers that do not tell an answer's chunks apart lower the figure.
  """
  counted = [pairs for pairs in lengths if len(pairs) >= (2 if within else 1)]
  if not counted:
    return Estimate(math.nan, math.nan, math.nan)
  declared, true = (
    np.unique([pair[k] for pairs in counted for pair in pairs], return_inverse=True)[1] for k in (0, 1)
  )
  answer = np.repeat(np.arange(len(counted)), [len(pairs) for pairs in counted])
  groups = answer if within else np.zeros_like(answer)

  def correlation(weights: np.ndarray) -> float:
    """`weights`: how often each chunk is there, [chunks]."""
    x, y = (_centred(_ranks(places, weights), groups, weights) for places in (declared, true))
    spread = (weights @ x**2) * (weights @ y**2)
    return float(weights @ (x * y) / math.sqrt(spread)) if spread > 1e-6 else math.nan

  value = correlation(np.ones(len(answer)))
  if len(counted) < 2 or math.isnan(value):
    return Estimate(value, math.nan, math.nan)
  return Estimate(
    value, *_between([correlation(times[answer]) for times in wins.resamples(len(counted)).astype(float)])
  )


def _ranks(places: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """The mean rank of each chunk, less a half; `places` index the values in ascending order, both are [chunks]."""
  of_value = np.bincount(places, weights)
  return (np.cumsum(of_value) - of_value / 2)[places]


def _centred(ranks: np.ndarray, groups: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Ranks less the mean of their group, all [chunks]; those of groups without weight are arbitrary."""
  total = np.maximum(np.bincount(groups, weights), 1)
  return ranks - (np.bincount(groups, weights * ranks) / total)[groups]


def share_of_chunks(lengths: Sequence[Sequence[Pair]], found: Callable[[int, int], bool]) -> Estimate:
  """The share of chunks for which `found(declared, true)`; NaN without chunks."""
  counted = [pairs for pairs in lengths if pairs]
  if not counted:
    return Estimate(math.nan, math.nan, math.nan)
  hits = np.array([sum(found(*pair) for pair in pairs) for pairs in counted], float)
  chunks = np.array([len(pairs) for pairs in counted], float)
  value = float(hits.sum() / chunks.sum())
  if len(counted) < 2:
    return Estimate(value, math.nan, math.nan)
  times = wins.resamples(len(counted)).astype(float)
  return Estimate(value, *_between((times @ hits) / (times @ chunks)))


def _between(resampled: Sequence[float] | np.ndarray) -> tuple[float, float]:
  """The 95 % interval of a figure's resamples, of those that have one."""
  low, high = np.nanpercentile(resampled, [2.5, 97.5])
  return float(low), float(high)


def commonest(lengths: Sequence[Sequence[Pair]]) -> int:
  """The length that most promises declare, the shortest of several; there must be a chunk."""
  counts = collections.Counter(declared for pairs in lengths for declared, _ in pairs)
  return min(counts, key=lambda declared: (-counts[declared], declared))


def place(declared: int, true: int) -> str:
  """Where a chunk ends: its last token is one of the `NEAR` up to its number, number included ("before"), one of the
  `NEAR` after it ("after"), or it is "earlier" or "later" than both.

  Both are equally wide: many more chunks in the first than in the second are a sign that they end because of their
  number.
  """
  late = true - declared
  return "earlier" if late <= -NEAR else "before" if late <= 0 else "after" if late <= NEAR else "later"


def summarise(lengths: Sequence[Sequence[Pair]]) -> dict[str, float]:
  """All figures of a system's answers, shares as fractions, `KEY_low` and `KEY_high` beside them; {} without chunks.

  `finished_chunks` counts them, `commonest_length` is in tokens, `commonest_length_share` is of promises whose chunk
  finished, and `ends_PLACE_share` are shares of chunks. The interval of `commonest_length_share` is that of the same
  length in all resamples.
  """
  if not any(lengths):
    return {}
  most = commonest(lengths)
  ends = lambda name: lambda declared, true: place(declared, true) == name
  estimates = {
    "length_correlation": rank_correlation(lengths, within=False),
    "length_correlation_within": rank_correlation(lengths, within=True),
    "commonest_length_share": share_of_chunks(lengths, lambda declared, _: declared == most),
    **{f"ends_{name}_share": share_of_chunks(lengths, ends(name)) for name in PLACES},
  }
  out: dict[str, float] = {
    "finished_chunks": sum(map(len, lengths)),
    "answers_with_two_chunks": sum(len(pairs) >= 2 for pairs in lengths),
    "commonest_length": most,
  }
  for key, found in estimates.items():
    out |= {key: found.value, f"{key}_low": found.low, f"{key}_high": found.high}
  return {key: value for key, value in out.items() if not math.isnan(value)}
