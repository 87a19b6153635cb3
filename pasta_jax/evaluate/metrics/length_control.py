r"""Length-controlled win rate, as AlpacaEval 2 defines it (Dubois et al. 2024, arXiv 2404.04475).

Judges favour long answers. A logistic model splits a judge's preference for a model over the baseline on
prompt i,

    logit p_i = phi * tanh(d_i / std(d)) + psi * gamma_i + theta,      d_i = baseline's characters - model's,

into length, the prompt's difficulty gamma, and the model itself; the length-controlled win rate is the
model's mean prediction without the length term.

The original fits phi and psi together with rows of a "gamed" baseline (the baseline told to be verbose or
concise, at a tenth of the weight each), which are not public. Those rows keep phi and psi near their values
for these two models; here a Gaussian prior at their published coefficients has the same effect (`GAMED`). The
difficulties are not public either: `fit_difficulty` fits those under which the published coefficients of some
models explain these models' preferences.

    python -m pasta_jax.evaluate.metrics.length_control --preferences=… --leaderboard=… --weights=… \\
      [--output=difficulty.jsonl]

compares the result with a leaderboard.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pydantic
import rich.console
import rich.table
import scipy.optimize
import scipy.special
from absl import app, flags

from pasta_jax.utils.json_io import or_nan
from pasta_jax.utils.jsonl import DataError, read_jsonl, write_jsonl
from pasta_jax.utils.terminal import as_text
from pasta_jax.utils.text import one_line
from pasta_jax.utils.typed import Parsed, checked

R = TypeVar("R", bound=Parsed)

# Gaussian priors on (phi, psi): centre and curvature. GAMED's centre is the mean of the published weights
# of gpt4_1106_preview told to be verbose and concise; its rows count as 161 (2 x 805 at a tenth), each with
# about E[x^2] p (1 - p) = 0.5 * 0.25 of curvature. It describes GPT-4-turbo's bias for length; nothing is
# known of other judges.
GAMED = (-1.61, 0.76), 20.0
NOTHING_KNOWN = (0.0, 0.0), 1.0
DIFFICULTY_SPREAD = 1.5  # standard deviation of the difficulties' own prior
Prior = tuple[tuple[float, float], float]


@dataclasses.dataclass(frozen=True)
class LengthControl:
  """A fitted model of one judge, system and baseline. Win rates in per cent."""

  win_rate: float
  win_rate_error: float  # standard error
  length_controlled: float
  length_controlled_error: float  # standard deviation over resampled prompts; NaN where none were drawn
  phi: float
  psi: float  # 0 without difficulties
  theta: float


def length_feature(baseline: np.ndarray, system: np.ndarray) -> np.ndarray:
  """tanh of the standardised difference of lengths in characters, [..., N]; 0 where a length is NaN."""
  difference = baseline - system
  spread = np.nanstd(difference, axis=-1, ddof=1, keepdims=True)
  with np.errstate(invalid="ignore", divide="ignore"):
    feature = np.tanh(difference / spread)
  return np.nan_to_num(feature)


def length_controlled(
  preference: np.ndarray,
  baseline: np.ndarray,
  system: np.ndarray,
  difficulty: np.ndarray | None = None,
  *,
  prior: Prior = NOTHING_KNOWN,
  resamples: int = 0,
) -> LengthControl:
  """Win rates of a system from preferences [N] in [0, 1] (1: the system's answer is better; NaN: not judged).

  `baseline` and `system` [N] are the answers' characters, `difficulty` [N] the prompts' gamma. `resamples`
  bootstrap samples give the length-controlled rate its error. `prior`: GAMED for GPT-4-turbo against
  gpt4_1106_preview. Raises ValueError where fewer than three prompts were judged.
  """
  judged = ~np.isnan(preference)
  if judged.sum() < 3:
    raise ValueError("a length-controlled win rate needs at least three judged prompts")
  y = preference[judged]
  feature = length_feature(baseline, system)[judged]
  gamma = np.zeros(len(y)) if difficulty is None else difficulty[judged]
  everywhere = np.zeros(len(preference)) if difficulty is None else difficulty
  x = np.stack([feature, gamma, np.ones(len(y))], axis=1)
  predict = lambda w: 100 * scipy.special.expit(w[1] * everywhere + w[2])
  w = _fit(x, y, prior)
  rng = np.random.default_rng(0)
  draws = (rng.integers(len(y), size=len(y)) for _ in range(resamples))
  rates = [predict(_fit(x[d], y[d], prior)).mean() for d in draws]
  return LengthControl(
    100 * float(y.mean()),
    100 * float(np.std(y, ddof=1)) / math.sqrt(len(y)),
    float(predict(w).mean()),
    float(np.std(rates)) if rates else math.nan,
    *map(float, w),
  )


def _fit(x: np.ndarray, y: np.ndarray, prior: Prior) -> np.ndarray:
  """(phi, psi, theta) of maximum posterior for features x [N, 3] and preferences y [N]."""
  (phi, psi), strength = prior
  centre, precision = np.array([phi, psi, 0.0]), np.array([strength, strength, 1e-3])
  if not x[:, 1].any():
    centre[1] = 0.0

  def objective(w):
    z = x @ w
    value = np.sum(np.logaddexp(0, z) - y * z) + 0.5 * np.sum(precision * (w - centre) ** 2)
    return value, x.T @ (scipy.special.expit(z) - y) + precision * (w - centre)

  return scipy.optimize.minimize(objective, centre, jac=True, method="L-BFGS-B").x


def fit_difficulty(
  preference: np.ndarray, baseline: np.ndarray, system: np.ndarray, weights: np.ndarray
) -> np.ndarray:
  """gamma [N] from preferences [M, N] and lengths of M models with known (phi, psi, theta): weights [M, 3].

  A one-dimensional logistic regression per prompt, by Newton's method.
  """
  known = ~np.isnan(preference)
  phi, psi, theta = (weights[:, k : k + 1] for k in range(3))
  fixed = phi * length_feature(baseline[None], system) + theta
  gamma = np.zeros(preference.shape[1])
  for _ in range(100):
    p = scipy.special.expit(fixed + psi * gamma)
    gradient = np.sum(np.where(known, psi * (preference - p), 0), axis=0) - gamma / DIFFICULTY_SPREAD**2
    curvature = np.sum(np.where(known, psi**2 * p * (1 - p), 0), axis=0) + 1 / DIFFICULTY_SPREAD**2
    step = np.clip(gradient / curvature, -1, 1)
    gamma += step
    if np.abs(step).max() < 1e-9:
      break
  return gamma


# Comparison with a leaderboard.


@dataclasses.dataclass(frozen=True)
class Preferences:
  """Real preferences of a judge for M models against one baseline on N prompts."""

  ids: list[str]
  models: list[str]
  preference: np.ndarray  # [M, N], NaN where missing
  system: np.ndarray  # [M, N] characters
  baseline: np.ndarray  # [N] characters


class _Preference(Parsed):
  id: str | int
  baseline_chars: float
  preference: dict[str, float | None]  # by model; null: not judged
  output_chars: dict[str, float | None]


class _Difficulty(Parsed):
  id: str | int
  difficulty: float


class _Weights(Parsed):
  """Published (phi, psi, theta) of the model `id`."""

  id: str
  phi: float = pydantic.Field(alias="np.tanh(std_delta_len)")
  psi: float = pydantic.Field(alias="instruction_difficulty")
  theta: float = pydantic.Field(alias="not_gamed_baseline.astype(float)")


class _Published(Parsed):
  """A model's rates on a leaderboard."""

  leaderboard: str
  model: str
  win_rate: float
  length_controlled_winrate: float | str | None = None  # some have none


def _rows(path: str | Path, kind: type[R]) -> list[R]:
  """The rows of a file. Raises DataError, one line, that names file, row and field."""
  try:
    return [checked(kind, row, f"{path}, row {number}") for number, row in enumerate(read_jsonl(path), 1)]
  except ValueError as error:
    raise DataError(str(error)) from None


def read_preferences(path: str | Path) -> Preferences:
  """Reads rows with `id`, `baseline_chars`, and by model `preference` and `output_chars`."""
  rows = _rows(path, _Preference)
  models = list(dict.fromkeys(m for r in rows for m in r.preference))
  return Preferences(
    [str(r.id) for r in rows],
    models,
    np.array([[or_nan(r.preference.get(m)) for r in rows] for m in models]),
    np.array([[or_nan(r.output_chars.get(m)) for r in rows] for m in models]),
    np.array([r.baseline_chars for r in rows]),
  )


def read_difficulty(path: str | Path) -> dict[str, float]:
  """Each prompt's difficulty, by id."""
  return {str(r.id): r.difficulty for r in _rows(path, _Difficulty)}


def read_weights(path: str | Path) -> dict[str, tuple[float, float, float]]:
  """Published (phi, psi, theta) by model."""
  return {r.id: (r.phi, r.psi, r.theta) for r in _rows(path, _Weights)}


def check(
  preferences: Preferences,
  leaderboard: dict[str, dict],
  weights: dict[str, tuple],
  *,
  difficulty: np.ndarray | None = None,
  held_out: bool = True,
) -> list[dict]:
  """For each model of the leaderboard: computed and published win rates, and their differences in points.

  Difficulties are fitted on all models with published weights; `held_out_error` is the error with
  difficulties fitted on all other models.
  """
  known = [i for i, m in enumerate(preferences.models) if m in weights]

  def fitted(chosen: Sequence[int]) -> np.ndarray:
    return fit_difficulty(
      preferences.preference[chosen],
      preferences.baseline,
      preferences.system[chosen],
      np.array([weights[preferences.models[i]] for i in chosen]),
    )

  whole = fitted(known) if difficulty is None else difficulty
  rows = []
  for i, model in enumerate(preferences.models):
    if model not in leaderboard:
      continue
    published = leaderboard[model]
    compute = lambda gamma, i=i: length_controlled(
      preferences.preference[i], preferences.baseline, preferences.system[i], gamma, prior=GAMED
    )
    result = compute(whole)
    row = {
      "model": model,
      "win_rate": result.win_rate,
      "published": published["win_rate"],
      "error": result.win_rate - published["win_rate"],
      "length_controlled": result.length_controlled,
      "published_length_controlled": published["length_controlled_winrate"],
      "length_controlled_error": result.length_controlled - published["length_controlled_winrate"],
    }
    if held_out and difficulty is None:
      others = compute(fitted([k for k in known if k != i]))
      row["held_out_error"] = others.length_controlled - published["length_controlled_winrate"]
    rows.append(row)
  return rows


def main(argv: list[str]) -> None:
  del argv
  values = flags.FLAGS
  try:
    preferences, weights = read_preferences(values.preferences), read_weights(values.weights)
    leaderboard = {
      r.model: {"win_rate": r.win_rate, "length_controlled_winrate": r.length_controlled_winrate}
      for r in _rows(values.leaderboard, _Published)
      if r.leaderboard == values.leaderboard_name and r.length_controlled_winrate not in ("", None)
    }
  except (ValueError, OSError) as error:
    sys.exit(f"error: {one_line(str(error))}")
  rows = check(preferences, leaderboard, weights)
  table = rich.table.Table(title=f"{len(rows)} models, {len(preferences.ids)} prompts")
  table.add_column("model")
  for name in (
    "win rate",
    "published",
    "error",
    "length-controlled",
    "published",
    "error",
    "error, held out",
  ):
    table.add_column(name, justify="right")
  for r in rows:
    table.add_row(as_text(r["model"]), *(f"{r[k]:.2f}" for k in list(r)[1:]))
  console = rich.console.Console()
  console.print(table)
  for name in ("error", "length_controlled_error", "held_out_error"):
    errors = np.abs([r[name] for r in rows])
    console.print(
      f"{name.replace('_', ' ')}: within 0.01 {np.sum(errors < 0.01)}, within 1.5 {np.sum(errors < 1.5)} "
      f"of {len(rows)}; largest {errors.max():.2f}"
    )
  if values.output:
    known = [i for i, m in enumerate(preferences.models) if m in weights]
    gamma = fit_difficulty(
      preferences.preference[known],
      preferences.baseline,
      preferences.system[known],
      np.array([weights[preferences.models[i]] for i in known]),
    )
    rows = [{"id": i, "difficulty": round(float(g), 6)} for i, g in zip(preferences.ids, gamma)]
    write_jsonl(Path(values.output), rows)


if __name__ == "__main__":
  flags.DEFINE_string(
    "preferences", None, "JSON lines: id, baseline_chars, preference and output_chars by model", required=True
  )
  flags.DEFINE_string(
    "leaderboard", None, "JSON lines: leaderboard, model, win_rate, length_controlled_winrate", required=True
  )
  flags.DEFINE_string(
    "leaderboard_name", "weighted_alpaca_eval_gpt4_turbo", "rows of that file to compare with"
  )
  flags.DEFINE_string("weights", None, "JSON lines: the published coefficients by model", required=True)
  flags.DEFINE_string(
    "output", None, "write the fitted difficulties to this file, for --config.eval.difficulty"
  )
  app.run(main)
