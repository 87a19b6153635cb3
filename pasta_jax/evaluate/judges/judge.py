"""What a judge compares, and what every judge offers."""

import collections
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from pasta_jax.evaluate.systems.system import Conversation
from pasta_jax.utils.text import one_line


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
  """Compares answers in pairs."""

  name: str  # of the judge's folder of judgements
  settings: dict[str, Any]  # that its judgements depend on

  def compare(self, pairs: Sequence[Pair], folder: Path, on_judged: Callable[[int, dict], None]) -> None:
    """Calls `on_judged(i, row)` for each pair as it is judged, in any order.

    A row has `preference`: the probability, in [0, 1], that the system's answer is the better one. A pair
    that cannot be judged gets no row. The judge keeps what must survive a kill in `folder`.
    """


def say_lost(name: str, pairs: int, causes: Iterable[str], more: str = "") -> None:
  """A line on stderr: how many of a judge's pairs got no judgement, by cause; none if all got one."""
  counts = collections.Counter(causes)
  if counts:
    listed = ", ".join(f"{cause} {n:,}" for cause, n in counts.items())
    line = f"{name}: {counts.total():,} of {pairs:,} pairs got no judgement ({listed}){more}"
    print(one_line(line), file=sys.stderr)


class NamedJudge(Judge, Protocol):
  """A judge that `registry.JUDGES` names."""

  @classmethod
  def from_config(cls, config) -> Self:
    """The judge with the settings of a config. Raises EvalError or EndpointError, one line."""
