"""Preferences from other judges, read from files: of people, or of AlpacaEval's own tools."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import pydantic

from pasta_jax.evaluate.errors import EvalError
from pasta_jax.evaluate.judges.judge import Pair
from pasta_jax.utils.jsonl import read_rows
from pasta_jax.utils.typed import Parsed, checked


class _Preference(Parsed):
  id: str | int
  system: str
  preference: Annotated[float, pydantic.Field(ge=0, le=1)]


class _Annotation(Parsed):
  """AlpacaEval's."""

  instruction: str
  generator_1: str | None = None
  generator_2: str
  preference: Annotated[float, pydantic.Field(ge=0, le=2)] | None  # null: not judged


class FileJudge:
  """Preferences of a file.

  Either JSON lines with `id`, `system` and `preference` in [0, 1] (1: the system is better), or AlpacaEval's
  annotations: a JSON list with `instruction`, `generator_2` and `preference` from 1 to 2 (0: even), against
  `baseline`. Raises EvalError, one line, for a file that cannot be used.
  """

  def __init__(self, path: str, baseline: str):
    if not Path(path).is_file():
      raise EvalError(f"judgements in {path} cannot be read: no such file")
    try:
      digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
      raise EvalError(f"judgements in {path} cannot be read: {error.strerror}") from None
    self.name = f"{Path(path).name.split('.')[0]}-{digest[:6]}"  # other content is another judge
    self.settings = {"sha256": digest}
    self._preferences: dict[tuple[str, str], float] = {}  # by system, and prompt or id
    try:
      for number, row in enumerate(read_rows(path), 1):
        self._add(row, f"{path}, row {number}", baseline)
    except ValueError as error:
      raise EvalError(f"judgements cannot be used: {error}") from None

  def _add(self, row: dict, where: str, baseline: str) -> None:
    if "generator_2" not in row:
      found = checked(_Preference, row, where)
      self._preferences[found.system, str(found.id)] = found.preference
      return
    annotation = checked(_Annotation, row, where)
    if annotation.generator_1 not in (None, baseline):
      raise ValueError(f"{where}: against {annotation.generator_1!r}, not the baseline {baseline!r}")
    if annotation.preference is not None:
      value = (annotation.preference or 1.5) - 1
      self._preferences[annotation.generator_2, annotation.instruction] = max(value, 0.0)

  def compare(self, pairs: Sequence[Pair], folder: Path, on_judged: Callable[[int, dict], None]) -> None:
    del folder
    for i, p in enumerate(pairs):
      for key in ((p.name, p.id), (p.name, p.system.prompt)):
        if key in self._preferences:
          on_judged(i, {"preference": self._preferences[key]})
          break
