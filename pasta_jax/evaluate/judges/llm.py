"""A language model as judge, over HTTP or by file: it compares pairs, names defects and grades lists.

Of a pair it replies with one letter. Its confidence is that letter's probability relative to the others', from
the probabilities of the first token (1 if there are none but the reply is a letter). The two orders of a pair are
one observation: the mean of both confidences, or one half where the verdict changed with the order
(docs/language.md section 6: "confidence-weighted win rate").
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from pasta_jax.evaluate.judges import questions
from pasta_jax.evaluate.judges.judge import Answer, Pair, say_lost
from pasta_jax.evaluate.metrics.wins import verdict
from pasta_jax.utils import distributed
from pasta_jax.utils.callers import caller_of
from pasta_jax.utils.endpoint import Endpoint
from pasta_jax.utils.locks import locked
from pasta_jax.utils.progress import progress_bar
from pasta_jax.utils.protocols import Call, cause_of

OnReply = Callable[[dict], str]  # takes a reply; returns why it could not be used, "" if it could


def combined(orders: Sequence[float]) -> float:
  """The preference of a pair from its reading in one order or both: the mean, one half if the verdict changed."""
  if len(set(map(verdict, orders))) > 1:
    return 0.5
  return sum(orders) / len(orders)


class LlmJudge:
  """Asks a model. Calls are cached in the folder of judgements, or in `cache` for several runs."""

  def __init__(self, endpoint: Endpoint, *, cache: str = "", names_defects: bool = False):
    self.name = endpoint.model.replace("/", "-")
    self.settings = {"kind": endpoint.kind, "model": endpoint.model, "prompt": questions.PAIR_PROMPT}
    self.names_defects = names_defects
    self._endpoint, self._cache = endpoint, cache

  @classmethod
  def from_config(cls, config) -> Self:
    c = config.judge
    endpoint = Endpoint.from_config(c, part="judge")
    if distributed.is_first():  # which makes the calls
      endpoint.require_key()  # before the answers are made that it is to judge
    return cls(endpoint, cache=c.cache, names_defects=c.defects)

  def settings_of(self, prompt: str) -> dict[str, Any]:
    """What replies to another question than that of pairs depend on."""
    return self.settings | {"prompt": prompt}

  def compare(self, pairs: Sequence[Pair], folder: Path, on_judged: Callable[[int, dict], None]) -> None:
    self.read(pairs, [], folder, on_judged, lambda *_: None)

  def read(
    self,
    pairs: Sequence[Pair],
    answers: Sequence[Answer],
    folder: Path,
    on_judged: Callable[[int, dict], None],
    on_named: Callable[[int, list[str]], None],
  ) -> None:
    """Compares pairs (`on_judged(i, row)`) and names the defects of answers (`on_named(i, names)`), all at once.

    A row has `preference`, `orders` (the preference with the system's answer first, and second; None where it was
    not asked), and, where one reading was made once more, `repeated` and its place in `orders`, `first`. Equal texts
    count as even without a call. A pair or an answer whose reply cannot be used gets no row, and is counted in a line
    on stderr.
    """
    work: list[tuple[Call, OnReply]] = []
    lost_pairs: dict[int, str] = {}
    lost_answers: dict[int, str] = {}
    for i, pair in enumerate(pairs):
      if pair.system.text.strip() == pair.baseline.text.strip():
        on_judged(i, {"preference": 0.5, "orders": []})
        continue
      work += _Readings(i, pair, on_judged, lost_pairs).work()
    for i, answer in enumerate(answers):

      def named(reply: dict, i=i) -> str:
        names = questions.read_defects(reply["text"])
        if names is None:
          lost_answers[i] = cause_of(reply, "no list of numbers")
          return lost_answers[i]
        on_named(i, names)
        return ""

      work.append((questions.ask_defects(answer, self._endpoint.max_tokens), named))
    words = self._ask(work, folder)
    say_lost(self.name, len(pairs), lost_pairs.values(), words)
    say_lost(self.name, len(answers), lost_answers.values(), words, what="answers got no list of defects")

  def grade(
    self, lists: Sequence[Sequence[Answer]], folder: Path, on_graded: Callable[[int, list[float]], None]
  ) -> None:
    """Calls `on_graded(i, grades)` for each list whose reply has a grade in [0, 1] for each of its answers."""
    lost: dict[int, str] = {}
    work: list[tuple[Call, OnReply]] = []
    for i, listed in enumerate(lists):

      def graded(reply: dict, i=i, listed=listed) -> str:
        grades = questions.read_grades(reply["text"], len(listed))
        if grades is None:
          lost[i] = cause_of(reply, "not a grade for each answer")
          return lost[i]
        on_graded(i, grades)
        return ""

      work.append((questions.ask_grades(listed, self._endpoint.max_tokens), graded))
    words = self._ask(work, folder)
    say_lost(self.name, len(lists), lost.values(), words, what="lists got no grades")

  def _ask(self, work: Sequence[tuple[Call, OnReply]], folder: Path) -> str:
    """Has all calls answered and the replies read; returns what the line on lost ones adds."""
    if not self._cache:  # in the folder of the run, which the run has locked
      return self._ask_into(work, folder / "calls.jsonl")
    with locked(Path(self._cache + ".lock")):
      return self._ask_into(work, Path(self._cache))

  def _ask_into(self, work: Sequence[tuple[Call, OnReply]], path: Path) -> str:
    caller = caller_of(self._endpoint, path)
    causes: set[str] = set()
    words = ""  # of the server, of the last refusal
    bar, task = progress_bar(self.name, len(work))

    def on_answer(k: int, reply: dict) -> None:
      nonlocal words
      if cause := work[k][1](reply):
        causes.add(cause)
        words = reply.get("refused", words)
      bar.update(task, advance=1, note=f"{caller.paid} calls paid")

    with bar:
      caller.map([call for call, _ in work], on_answer)
    more = "; cut off: give more --config.judge.max_tokens" if "cut off" in causes else ""
    return more + (f"; the last refusal: {words}" if words else "")


class _Readings:
  """The readings of one pair, until all of them have come."""

  def __init__(self, number: int, pair: Pair, on_judged: Callable[[int, dict], None], lost: dict[int, str]):
    self._number, self._pair, self._on_judged, self._lost = number, pair, on_judged, lost
    self._open = pair.readings
    self._orders: list[float | None] = [None, None]  # with the system's answer first, second
    self._repeated: float | None = None

  def work(self) -> list[tuple[Call, OnReply]]:
    """The calls, each with what reads its reply."""
    asked = [(first, 0) for first in self._pair.orders]
    asked += [(self._pair.orders[0], 1)] if self._pair.repeated else []
    return [(self._call(*a), functools.partial(self._read, *a)) for a in asked]

  def _call(self, system_first: bool, repeat: int) -> Call:
    system, baseline = self._pair.system, self._pair.baseline
    return questions.ask_pair(*((system, baseline) if system_first else (baseline, system)), repeat=repeat)

  def _read(self, system_first: bool, repeat: int, reply: dict) -> str:
    cause = ""
    preference = questions.preference_for_first(reply)
    if preference is None:
      cause = cause_of(reply, "no letter")
      if not repeat:
        self._lost[self._number] = cause
    else:
      preference = preference if system_first else 1 - preference
      if repeat:
        self._repeated = preference
      else:
        self._orders[not system_first] = preference
    self._open -= 1
    if not self._open and self._number not in self._lost:
      known = [p for p in self._orders if p is not None]
      row = {"preference": combined(known), "orders": self._orders}
      if self._pair.repeated:
        row |= {"repeated": self._repeated, "first": int(not self._pair.orders[0])}
      self._on_judged(self._number, row)
    return cause
