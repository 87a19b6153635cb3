"""A language model as judge: both orders of a pair, confidence from token probabilities.

The judge replies with one letter. Its confidence is that letter's probability relative to the other one's,
from the probabilities of the first token (1 if the endpoint returns no probabilities but the reply is a
letter). Each pair is judged in both orders, and its preference is the mean, which cancels a bias for the
first or the second place (docs/language.md section 6: "confidence-weighted win rate").
"""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from pasta_jax.evaluate.judges.judge import Answer, Pair, say_lost
from pasta_jax.utils.endpoint import Endpoint
from pasta_jax.utils.locks import locked
from pasta_jax.utils.progress import progress_bar
from pasta_jax.utils.protocols import cause_of

SYSTEM = """\
You compare two answers to the same request. The better one is more correct, more helpful and easier to read, \
follows what was asked, hangs together as one text, and is neither padded nor cut short. Do not prefer an answer for \
its length or its place."""
QUESTION = """\
The request:
<request>
{request}
</request>

Answer A:
<answer>
{a}
</answer>

Answer B:
<answer>
{b}
</answer>

Which answer is better? Reply with one letter, A or B, and nothing else."""


def messages(pair: Pair, *, system_first: bool) -> list[dict[str, str]]:
  """The judge's prompt. The system's answer is A, or B if `system_first` is False."""
  a, b = (pair.system, pair.baseline) if system_first else (pair.baseline, pair.system)
  return [
    {"role": "system", "content": SYSTEM},
    {"role": "user", "content": QUESTION.format(request=_request(a), a=_answer(a), b=_answer(b))},
  ]


def _request(answer: Answer) -> str:
  """The user's message, or all of them where there are several turns."""
  turns = [m["content"] for m in answer.conversation if m["role"] == "user"]
  return turns[0] if len(turns) == 1 else "\n\n".join(f"(turn {n}) {t}" for n, t in enumerate(turns, 1))


def _answer(answer: Answer) -> str:
  turns = [*(m["content"] for m in answer.conversation if m["role"] == "assistant"), answer.text]
  return turns[0] if len(turns) == 1 else "\n\n".join(f"(turn {n}) {t}" for n, t in enumerate(turns, 1))


def confidence_in_a(answer: dict) -> float | None:
  """P(A) relative to P(A) + P(B); None if both together have a tenth or less, or the reply is neither."""
  mass = {"A": 0.0, "B": 0.0}
  for token, log_p in answer["log_p"].items():
    letter = token.strip().strip("*\"'().").upper()
    if letter in mass:
      mass[letter] += math.exp(log_p)
  if sum(mass.values()) > 0.1:
    return mass["A"] / sum(mass.values())
  letter_said = None if answer["log_p"] else re.match(r"\W*([AB])\b", answer["text"])
  return {"A": 1.0, "B": 0.0}[letter_said[1]] if letter_said else None


class LlmJudge:
  """Asks an endpoint. Calls are cached in the folder of judgements, or in `cache` for several runs."""

  def __init__(self, endpoint: Endpoint, *, cache: str = ""):
    self.name = endpoint.model.replace("/", "-")
    self.settings = {"kind": endpoint.kind, "model": endpoint.model, "prompt": SYSTEM + QUESTION}
    self._endpoint, self._cache = endpoint, cache

  @classmethod
  def from_config(cls, config) -> Self:
    endpoint = Endpoint.from_config(config.judge, part="judge")
    endpoint.require_key()  # before the answers are made that it is to judge
    return cls(endpoint, cache=config.judge.cache)

  def compare(self, pairs: Sequence[Pair], folder: Path, on_judged: Callable[[int, dict], None]) -> None:
    """Equal texts count as even without a call; a pair whose reply is neither letter gets no row, and is counted
    in a line on stderr."""
    if not self._cache:  # in the folder of the run, which the run has locked
      self._compare(pairs, folder / "calls.jsonl", on_judged)
      return
    with locked(Path(self._cache + ".lock")):
      self._compare(pairs, Path(self._cache), on_judged)

  def _compare(self, pairs: Sequence[Pair], calls: Path, on_judged: Callable[[int, dict], None]) -> None:
    from pasta_jax.utils.calls import Caller  # here: it loads the HTTP client

    caller = Caller(self._endpoint, calls)
    asked: list[tuple[int, bool]] = []
    for i, p in enumerate(pairs):
      if p.system.text.strip() == p.baseline.text.strip():
        on_judged(i, {"preference": 0.5, "orders": []})
      else:
        asked += [(i, True), (i, False)]
    replies: dict[int, dict[bool, float | None]] = {}
    lost: dict[int, str] = {}  # why a pair has no judgement
    words = ""  # of the server, of the last refusal
    bar, task = progress_bar(self.name, len(asked))

    def on_answer(k: int, answer: dict) -> None:
      nonlocal words
      i, system_first = asked[k]
      confidence = confidence_in_a(answer)
      orders = replies.setdefault(i, {})
      orders[system_first] = confidence if system_first or confidence is None else 1 - confidence
      if confidence is None:
        lost[i] = cause_of(answer, "neither letter")
        words = answer.get("refused", words)
      bar.update(task, advance=1, note=f"{caller.paid} calls paid")
      if len(orders) == 2 and None not in orders.values():
        both = [orders[True], orders[False]]
        on_judged(i, {"preference": sum(both) / 2, "orders": both})  # type: ignore[arg-type]

    with bar:
      caller.map([messages(pairs[i], system_first=first) for i, first in asked], on_answer)
    more = "; cut off: give more --config.judge.max_tokens" if "cut off" in lost.values() else ""
    more += f"; the last refusal: {words}" if words else ""
    say_lost(self.name, len(pairs), lost.values(), more)
