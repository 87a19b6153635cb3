"""Preferences from other judges, read from files: of people, or of AlpacaEval's own tools."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from pasta_jax.evaluate.errors import EvalError
from pasta_jax.evaluate.judges.judge import Pair
from pasta_jax.utils.jsonl import read_rows


class FileJudge:
  """Preferences of a file.

  Either JSON lines with `id`, `system` and `preference` in [0, 1] (1: the system is better), or AlpacaEval's
  annotations: a JSON list with `instruction`, `generator_2` and `preference` from 1 to 2 (0: even), against
  `baseline`. Raises EvalError, one line, for a file that cannot be used.
  """

  def __init__(self, path: str, baseline: str):
    try:
      digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
      raise EvalError(f"judgements in {path} cannot be read: {error.strerror}") from None
    self.name = f"{Path(path).name.split('.')[0]}-{digest[:6]}"  # other content is another judge
    self.settings = {"sha256": digest}
    self._preferences: dict[tuple[str, str], float] = {}  # by system, and prompt or id
    try:
      for row in read_rows(path):
        if "generator_2" in row:
          if row.get("generator_1", baseline) != baseline:
            raise ValueError(f"they are against {row['generator_1']!r}, not the baseline {baseline!r}")
          if row["preference"] is not None:
            value = float(row["preference"]) or 1.5
            self._preferences[row["generator_2"], row["instruction"]] = min(max(value - 1, 0.0), 1.0)
        else:
          value = float(row["preference"])
          if not 0 <= value <= 1:
            raise ValueError(f"preference {value} of {row['id']!r} is not in [0, 1]")
          self._preferences[row["system"], str(row["id"])] = value
    except (OSError, KeyError, TypeError, ValueError) as error:
      raise EvalError(f"judgements in {path} cannot be used: {error!r}") from None

  def compare(self, pairs: Sequence[Pair], folder: Path, on_judged: Callable[[int, dict], None]) -> None:
    del folder
    for i, p in enumerate(pairs):
      for key in ((p.name, p.id), (p.name, p.system.prompt)):
        if key in self._preferences:
          on_judged(i, {"preference": self._preferences[key]})
          break
