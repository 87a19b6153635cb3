"""Figure 4 of Jin et al. 2025 (arXiv 2502.11517), digitised: ± 0.01 times, ± 0.2 points."""

from typing import NamedTuple

SOURCE = "grey: Jin et al. 2025, Gemma 7B, AlpacaEval, length-controlled win rate by GPT-4"


class Point(NamedTuple):
  """A system of the paper against its Baseline-SFT; speeds are geometric means."""

  label: str
  realised_speedup: float
  speedup_over_baseline: float
  theoretical_parallelism: float
  win_rate: float  # %


POINTS = (
  Point("λ = ∞", 1.21, 1.40, 1.57, 52.3),
  Point("λ = 8", 1.46, 1.78, 1.80, 48.7),
  Point("λ = 4", 1.54, 1.90, 1.91, 47.4),
  Point("λ = 2", 1.62, 2.08, 2.08, 45.5),
  Point("λ = 1", 1.93, 2.43, 2.34, 42.9),
  Point("PASTA-SFT", 1.31, 1.90, 2.36, 32.6),
  Point("APAR", 1.60, 1.79, 1.70, 41.2),
  Point("SoT", 0.73, 0.90, 1.14, 38.4),
)
