"""A language model as judge: both orders of a pair, confidence from token probabilities.

The judge is asked for one letter. Its confidence is the probability of that letter among the two, from the
first token's probabilities (1 where the endpoint gives none and a letter was said). A pair is asked twice,
with the answers in either order, and its preference is the mean, so that a liking for the first place cancels
(PASTA.md section 6: "confidence-weighted win rate").
"""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from pasta_jax.evaluate.judges.judge import Answer, Pair
from pasta_jax.utils.endpoint import Caller, Endpoint
from pasta_jax.utils.progress import progress_bar

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
  """What the judge reads; the system's answer is A or B."""
  a, b = (pair.system, pair.baseline) if system_first else (pair.baseline, pair.system)
  return [
    {"role": "system", "content": SYSTEM},
    {"role": "user", "content": QUESTION.format(request=_request(a), a=_answer(a), b=_answer(b))},
  ]


def _request(answer: Answer) -> str:
  """What the user said; of several turns, all of them."""
  turns = [m["content"] for m in answer.conversation if m["role"] == "user"]
  return turns[0] if len(turns) == 1 else "\n\n".join(f"(turn {n}) {t}" for n, t in enumerate(turns, 1))


def _answer(answer: Answer) -> str:
  turns = [*(m["content"] for m in answer.conversation if m["role"] == "assistant"), answer.text]
  return turns[0] if len(turns) == 1 else "\n\n".join(f"(turn {n}) {t}" for n, t in enumerate(turns, 1))


def confidence_in_a(answer: dict) -> float | None:
  """P(the judge says A), among A and B; None if it said neither, or something else with nine tenths or
  more."""
  mass = {"A": 0.0, "B": 0.0}
  for token, log_p in answer["log_p"].items():
    letter = token.strip().strip("*\"'().").upper()
    if letter in mass:
      mass[letter] += math.exp(log_p)
  if sum(mass.values()) > 0.1:
    return mass["A"] / sum(mass.values())
  said = None if answer["log_p"] else re.match(r"\W*([AB])\b", answer["text"])
  return {"A": 1.0, "B": 0.0}[said[1]] if said else None


class LlmJudge:
  """Asks an endpoint. Calls are kept in the folder of judgements, or in `cache`, for several runs."""

  def __init__(self, endpoint: Endpoint, *, cache: str = ""):
    self.name = endpoint.model.replace("/", "-")
    self.settings = {"kind": endpoint.kind, "model": endpoint.model, "prompt": SYSTEM + QUESTION}
    self._endpoint, self._cache = endpoint, cache
    self.paid = 0

  def compare(self, pairs: Sequence[Pair], folder: Path, done: Callable[[int, dict], None]) -> None:
    """Pairs of equal texts are even, unasked; a pair to which the judge says neither letter gets no row."""
    caller = Caller(self._endpoint, Path(self._cache) if self._cache else folder / "calls.jsonl")
    asked: list[tuple[int, bool]] = []
    for i, p in enumerate(pairs):
      if p.system.text.strip() == p.baseline.text.strip():
        done(i, {"preference": 0.5, "orders": []})
      else:
        asked += [(i, True), (i, False)]
    heard: dict[int, dict[bool, float | None]] = {}
    bar, task = progress_bar(f"{self.name}", len(asked))

    def answered(k: int, answer: dict) -> None:
      i, system_first = asked[k]
      confidence = confidence_in_a(answer)
      orders = heard.setdefault(i, {})
      orders[system_first] = confidence if system_first or confidence is None else 1 - confidence
      bar.update(task, advance=1, note=f"{caller.paid} calls paid")
      if len(orders) == 2 and None not in orders.values():
        both = [orders[True], orders[False]]
        done(i, {"preference": sum(both) / 2, "orders": both})  # type: ignore[arg-type]

    with bar:
      try:
        caller.map([messages(pairs[i], system_first=first) for i, first in asked], answered)
      finally:
        self.paid += caller.paid
