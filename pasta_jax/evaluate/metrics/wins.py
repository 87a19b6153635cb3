"""Figures of judgements, with the doubt that belongs to them. No model and no files here.

A reading is the probability, in [0, 1], that one of two answers is the better one: a win above 1/2, a tie at exactly
1/2. A pair's observation is one number, its `preference`: over both orders, if it was read in both. Rates of
preferences get bootstrap intervals over prompts, counts exact ones (Clopper and Pearson 1934).
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
LEANS = 0.75  # a judge with this share of readings for one place decides by the place


class Mean(NamedTuple):
  """A mean over prompts and its 95 % interval: NaN without values, an interval needs two."""

  value: float
  low: float
  high: float
  n: int  # prompts with a value


class Share(NamedTuple):
  """`found` of `n`, and the exact 95 % interval of the share; NaN for n = 0."""

  found: int
  n: int
  share: float
  low: float
  high: float


@functools.lru_cache(maxsize=4)
def resamples(n: int, seed: int = 0) -> np.ndarray:
  """How often each of `n` prompts is in each resample: [RESAMPLES, n]."""
  return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float32)


def mean(values: np.ndarray, seed: int = 0) -> Mean:
  """Of values [N], NaN where a prompt has none, with a bootstrap interval over prompts.

  Figures over the same N prompts are computed on the same resamples.
  """
  known = ~np.isnan(values)
  if not known.any():
    return Mean(np.nan, np.nan, np.nan, 0)
  value, n = float(values[known].mean()), int(known.sum())
  if n < 2:
    return Mean(value, np.nan, np.nan, n)
  counts = resamples(len(values), seed)[:, known]
  drawn = counts.sum(axis=1)
  means = (counts @ values[known])[drawn > 0] / drawn[drawn > 0]
  low, high = np.percentile(means, [2.5, 97.5])
  return Mean(value, float(low), float(high), n)


def difference(one: np.ndarray, other: np.ndarray) -> Mean:
  """Of two systems' values [N], paired by prompt: over the prompts where both have one."""
  return mean(one - other)


def share(count: int, n: int) -> Share:
  """A share with its exact interval."""
  if not n:
    return Share(0, 0, np.nan, np.nan, np.nan)
  from scipy.stats import binomtest  # here: it takes most of a second to load

  interval = binomtest(count, n).proportion_ci(0.95, method="exact")
  return Share(count, n, count / n, float(interval.low), float(interval.high))


def verdict(reading: float) -> int:
  """1 for a win, 0 for a tie, -1 for a loss."""
  return int(np.sign(reading - 0.5))


class Outcomes(NamedTuple):
  wins: int
  ties: int  # also pairs whose two orders were read differently
  losses: int


def outcomes(preferences: Iterable[float]) -> Outcomes:
  found = [verdict(p) for p in preferences]
  return Outcomes(found.count(1), found.count(0), found.count(-1))


class Position(NamedTuple):
  """What the place of an answer does to a judge's readings."""

  changed: Share  # pairs with another verdict in the other order, of those read in both
  first: Share  # readings for the answer shown first, of those that tell: see `position`
  readings_first: (
    Share  # readings for the answer shown first, of all that are no tie; not independent: no interval
  )
  first_preference: float  # mean preference for the answer shown first, of all readings; 1/2 without a bias

  @property
  def lean(self) -> str:
    """The place that the judge prefers beyond chance: "first", "second", or ""."""
    return "first" if self.first.low > 0.5 else "second" if self.first.high < 0.5 else ""

  @property
  def decides(self) -> bool:
    """Whether the place decides more than the text."""
    readings = self.readings_first.share
    return bool(self.lean) and max(readings, 1 - readings) >= LEANS


def _orders(row: Mapping) -> tuple[float | None, float | None]:
  """Preferences for the system's answer, shown first and shown second; None where it was not asked."""
  shown_first, shown_second = (*(row.get("orders") or ()), None, None)[:2]
  return shown_first, shown_second


def position(rows: Iterable[Mapping]) -> Position:
  """Position bias in rows of judgements; rows without `orders` do not count.

  A pair read in both orders tells a preference for a place if it has a winner in both and they differ; a pair read
  in one order if it has a winner, since orders are balanced over prompts. Each such pair is one observation.
  """
  changed = both = 0
  told: list[bool] = []  # True: for the answer shown first
  for_first: list[float] = []  # preferences for the answer shown first, of every reading
  for row in rows:
    shown_first, shown_second = _orders(row)
    readings = [p for p in (shown_first, None if shown_second is None else 1 - shown_second) if p is not None]
    for_first += readings
    verdicts = {verdict(p) for p in readings}  # for the answer shown first
    if shown_first is not None and shown_second is not None:
      both += 1
      changed += verdict(shown_first) != verdict(shown_second)
    if len(verdicts) == 1 and 0 not in verdicts:
      told.append(verdicts == {1})
  winners = [p for p in for_first if p != 0.5]
  firsts = sum(p > 0.5 for p in winners)
  all_readings = Share(firsts, len(winners), firsts / len(winners) if winners else np.nan, np.nan, np.nan)
  preference = float(np.mean(for_first)) if for_first else np.nan
  return Position(share(changed, both), share(sum(told), len(told)), all_readings, preference)


def repeats(rows: Iterable[Mapping]) -> Share:
  """Repeated readings with the verdict of the reading that they repeat: `orders[first]`."""
  again = [(r["repeated"], r["orders"][r["first"]]) for r in rows if r.get("repeated") is not None]
  return share(sum(verdict(one) == verdict(other) for one, other in again), len(again))


def defects(found: Sequence[Sequence[str]]) -> dict[str, Share]:
  """Answers with each defect, by its name, of answers with the defects `found`; the commonest first.

  The first entry, "any", counts the answers that have one.
  """
  names = {name for of_one in found for name in of_one}
  counted = {name: share(sum(name in of_one for of_one in found), len(found)) for name in names}
  ordered = sorted(counted.items(), key=lambda item: (-item[1].found, item[0]))
  return {"any": share(sum(map(bool, found)), len(found)), **dict(ordered)}
