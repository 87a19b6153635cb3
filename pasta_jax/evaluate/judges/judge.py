"""What every pairwise judge offers, and judgements that others made, given as files."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pasta_jax.evaluate.errors import EvalError
from pasta_jax.utils.jsonl import read_rows

Conversation = Sequence[Mapping[str, str]]  # messages with `role` and `content`; the last one is the user's


@dataclasses.dataclass(frozen=True)
class Answer:
  """What a system said last, and the conversation before it, with its own earlier answers."""

  conversation: Conversation
  text: str
  finished: bool = True  # False: it was cut off by a limit

  @property
  def prompt(self) -> str:
    """What the user said last."""
    return self.conversation[-1]["content"]


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two answers to one request."""

  id: str
  system: Answer
  baseline: Answer
  name: str = ""  # of the system

  def digest(self) -> str:
    """Changes when one of the texts does."""
    whole = json.dumps([self.system.text, self.baseline.text])
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


class Judge(Protocol):
  """Compares answers pairwise. `name` is that of its folder of judgements, `settings` what these depend
  on."""

  name: str
  settings: dict[str, Any]

  def compare(self, pairs: Sequence[Pair], folder: Path, done: Callable[[int, dict], None]) -> None:
    """`done(i, row)` for each pair as it is judged, in any order.

    A row has `preference`: the probability, in [0, 1], that the system's answer is the better one. A pair
    that cannot be judged gets no row. What should outlive a kill goes to `folder`.
    """


class FileJudge:
  """Preferences that somebody else found: people, or AlpacaEval's own tools.

  Either JSON lines with `id`, `system` and `preference` in [0, 1] (1: the system is better), or AlpacaEval's
  annotations: a JSON list with `instruction`, `generator_2` and `preference` from 1 to 2 (0: even). Those
  must be against `baseline`.
  """

  def __init__(self, path: str, baseline: str):
    try:
      digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
      raise EvalError(f"judgements in {path} cannot be read: {error.strerror}") from None
    self.name = f"{Path(path).name.split('.')[0]}-{digest[:6]}"  # other content is another judge
    self.settings = {"sha256": digest}
    self._found: dict[tuple[str, str], float] = {}
    try:
      rows = read_rows(path)
      for row in rows:
        if "generator_2" in row:
          if row.get("generator_1", baseline) != baseline:
            raise ValueError(f"they are against {row['generator_1']!r}, not the baseline {baseline!r}")
          if row["preference"] is not None:
            value = float(row["preference"]) or 1.5
            self._found[row["generator_2"], row["instruction"]] = min(max(value - 1, 0.0), 1.0)
        else:
          value = float(row["preference"])
          if not 0 <= value <= 1:
            raise ValueError(f"preference {value} of {row['id']!r} is not in [0, 1]")
          self._found[row["system"], str(row["id"])] = value
    except (OSError, KeyError, TypeError, ValueError) as error:
      raise EvalError(f"judgements in {path} cannot be used: {error!r}") from None

  def compare(self, pairs: Sequence[Pair], folder: Path, done: Callable[[int, dict], None]) -> None:
    del folder
    for i, p in enumerate(pairs):
      for key in ((p.name, p.id), (p.name, p.system.prompt)):
        if key in self._found:
          done(i, {"preference": self._found[key]})
          break
