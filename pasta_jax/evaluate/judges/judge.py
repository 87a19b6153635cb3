"""What a judge compares, and what every judge offers."""

import collections
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

from pasta_jax.evaluate.systems.system import Conversation
from pasta_jax.utils.text import one_line


def digest(texts: Sequence[str]) -> str:
  """Of texts in their order: what judgements are about."""
  return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Answer:
  """A system's last response, and the conversation before it, with its own earlier responses."""

  conversation: Conversation
  text: str
  finished: bool = True  # False: a limit cut it off

  @property
  def prompt(self) -> str:
    """The user's last message."""
    return self.conversation[-1]["content"]


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two answers to one request, and how often a judge that reads is to read them."""

  id: str
  system: Answer
  baseline: Answer
  name: str = ""  # of the system
  orders: tuple[bool, ...] = (True, False)  # whether the system's answer is the first one, of each reading
  repeated: bool = False  # whether the first reading is made twice

  @property
  def readings(self) -> int:
    return len(self.orders) + self.repeated

  def digest(self) -> str:
    """Changes when one of the texts does."""
    return digest([self.system.text, self.baseline.text])


class Judge(Protocol):
  """Compares answers in pairs."""

  name: str  # of the judge's folder of judgements
  settings: dict[str, Any]  # that its judgements depend on

  def compare(self, pairs: Sequence[Pair], folder: Path, on_judged: Callable[[int, dict], None]) -> None:
    """Calls `on_judged(i, row)` for each pair as it is judged, in any order.

    A row has `preference`: the probability, in [0, 1], that the system's answer is the better one. A pair
    that cannot be judged gets no row. The judge keeps what must survive a kill in `folder`.
    """


@runtime_checkable
class Scorer(Judge, Protocol):
  """A judge that scores answers on a device, which several processes share out."""

  def score(self, pairs: Sequence[Pair], folder: Path) -> None:
    """Keeps in `folder` what `compare` needs of the pairs' answers. All processes must call this."""


@runtime_checkable
class Reader(Judge, Protocol):
  """A judge that reads: it also names the defects of single answers, and grades lists."""

  names_defects: bool  # whether it is asked to, in an evaluation

  def settings_of(self, prompt: str) -> dict[str, Any]:
    """What its replies to another question than that of pairs depend on."""

  def read(
    self,
    pairs: Sequence[Pair],
    answers: Sequence[Answer],
    folder: Path,
    on_judged: Callable[[int, dict], None],
    on_named: Callable[[int, list[str]], None],
  ) -> None:
    """`compare`, and `on_named(i, names)` with the defects of each answer."""

  def grade(
    self, lists: Sequence[Sequence[Answer]], folder: Path, on_graded: Callable[[int, list[float]], None]
  ) -> None:
    """Calls `on_graded(i, grades)` for each list of answers to one request that could be graded: grades in [0, 1], in
    the list's order."""


def say_lost(
  name: str, total: int, causes: Iterable[str], more: str = "", *, what: str = "pairs got no judgement"
) -> None:
  """A line on stderr: how many of what a judge was given it could not judge, by cause; none if all was."""
  counts = collections.Counter(causes)
  if counts:
    listed = ", ".join(f"{cause} {n:,}" for cause, n in counts.items())
    line = f"{name}: {counts.total():,} of {total:,} {what} ({listed}){more}"
    print(one_line(line), file=sys.stderr)


class NamedJudge(Judge, Protocol):
  """A judge that `registry.JUDGES` names."""

  @classmethod
  def from_config(cls, config) -> Self:
    """The judge with the settings of a config. Raises EvalError or EndpointError, one line."""
