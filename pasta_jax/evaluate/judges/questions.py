"""What a language model that judges is asked, and how its replies are read: which answer of a pair is better,
which defects an answer has, which grade each of several answers deserves.

Questions are blind: they have the request and the answers, and nothing about who wrote them.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from pasta_jax.evaluate.judges.judge import Answer
from pasta_jax.utils.json_io import parse_json
from pasta_jax.utils.protocols import Call

_SYSTEM = """\
You judge answers to a request. A good answer is correct and helpful, does what was asked, hangs together \
as one text, and is neither padded nor cut short. Do not prefer an answer for its length or its place."""
_REQUEST = "The request:\n<request>\n{request}\n</request>\n\n"
_ANSWER = "Answer {name}:\n<answer>\n{text}\n</answer>\n\n"
_PAIR = """\
Which answer is better? Reply with one letter and nothing else: A, B, or T if neither is better."""
_GRADES = """\
Grade each answer from 1 (useless) to 10 (could not be better). Equally good answers have the same grade. Reply with \
JSON and nothing else: {{"1": grade of answer 1, …}}, with a grade for each of the {count} answers."""
DEFECTS = {  # name of a defect, and what the judge is told
  "parts do not fit": "its parts do not fit together: one contradicts another, does not go on from it, or refers "
  "to something that is not there",
  "said twice": "it makes the same point twice",
  "cut off": "it ends, or one of its parts ends, in the middle",
  "mixed markers": "its list markers, numbers or headings are mixed up, missing or of different kinds",
  "off the question": "it does not answer what was asked",
  "wrong form": "it has another form or length than was asked for",
  "false": "it says something that is false",
}
_NAME_DEFECTS = (
  "Which of these defects does the answer have?\n"
  + "".join(f"{n}: {text}\n" for n, text in enumerate(DEFECTS.values(), 1))
  + "Reply with the numbers of those that it clearly has, separated by commas, or 0 if none, and nothing else."
)
# What judgements depend on, for the settings that are kept with them.
PAIR_PROMPT = _SYSTEM + _REQUEST + _ANSWER + _PAIR
GRADES_PROMPT = _SYSTEM + _REQUEST + _ANSWER + _GRADES
DEFECTS_PROMPT = _SYSTEM + _REQUEST + _ANSWER + _NAME_DEFECTS

LOWEST, HIGHEST = 1, 10  # grades
_VERDICTS = {"A": 1.0, "B": 0.0, "T": 0.5}
_DEFECT_TOKENS, _GRADE_TOKENS = 32, 12  # of a reply; of each grade in it


def ask_pair(first: Answer, second: Answer, *, repeat: int = 0) -> Call:
  """Which of two answers to one request is better."""
  return Call(_messages([first, second], "AB", _PAIR), repeat=repeat)


def preference_for_first(reply: dict) -> float | None:
  """P(the first answer is better), ties counted as half, from the probabilities of the letters; without
  probabilities 1, 0 or 1/2. None if the reply is no letter, or the letters together have a tenth or less."""
  mass = dict.fromkeys(_VERDICTS, 0.0)
  for token, log_p in reply["log_p"].items():
    letter = token.strip().strip("*\"'().").upper()
    if letter in mass:
      mass[letter] += math.exp(log_p)
  if (total := sum(mass.values())) > 0.1:
    return sum(p * _VERDICTS[letter] for letter, p in mass.items()) / total
  said = None if reply["log_p"] else re.match(r"\W*([ABT])\b", reply["text"])
  return _VERDICTS[said[1]] if said else None


def ask_defects(answer: Answer, max_tokens: int) -> Call:
  """Which defects an answer has."""
  messages = _messages([answer], ["to judge"], _NAME_DEFECTS)
  return Call(messages, max_tokens=max(max_tokens, _DEFECT_TOKENS), letter=False)


def read_defects(text: str) -> list[str] | None:
  """The names of the defects in a reply; None if it is no list of their numbers."""
  numbers = re.fullmatch(r"\s*[\[(]?\s*(\d\s*(?:,\s*\d\s*)*)[\])]?\s*\.?\s*", text)
  if not numbers:
    return [] if re.fullmatch(r"\W*none\W*", text, re.IGNORECASE) else None
  found = {int(n) for n in re.findall(r"\d", numbers[1])}
  names = [*DEFECTS]
  return None if max(found) > len(names) else [names[n - 1] for n in sorted(found) if n]


def ask_grades(answers: Sequence[Answer], max_tokens: int) -> Call:
  """A grade for each of several answers to one request."""
  names = [str(n) for n in range(1, len(answers) + 1)]
  messages = _messages(answers, names, _GRADES.format(count=len(answers)))
  return Call(messages, max_tokens=max(max_tokens, _GRADE_TOKENS * (len(answers) + 2)), letter=False)


def read_grades(text: str, count: int) -> list[float] | None:
  """The grades of answers 1 to `count`, scaled to [0, 1]; None if the reply has not all of them."""
  whole = re.search(r"\{[^{}]*\}", text)
  try:
    found = parse_json(whole[0]) if whole else {}
  except ValueError:
    found = {}
  if not found:  # "1: 7" on lines of their own, or separated by commas
    found = dict(re.findall(r"(?<![\d.])(\d{1,3})\s*[:=]\s*(\d{1,2}(?:\.\d+)?)\b", text))
  grades = [_grade(found.get(str(n))) for n in range(1, count + 1)]
  return None if any(map(math.isnan, grades)) else [(g - LOWEST) / (HIGHEST - LOWEST) for g in grades]


def _grade(value: Any) -> float:
  """A grade as a number, which a reply may have as text; NaN for what is none."""
  if isinstance(value, str) and re.fullmatch(r"\d{1,2}(\.\d+)?", value):
    value = float(value)
  good = isinstance(value, int | float) and not isinstance(value, bool) and LOWEST <= value <= HIGHEST
  return float(value) if good else math.nan


def _messages(answers: Sequence[Answer], names: Sequence[str], question: str) -> list[dict[str, str]]:
  shown = "".join(_ANSWER.format(name=n, text=_text(a)) for n, a in zip(names, answers))
  return [
    {"role": "system", "content": _SYSTEM},
    {"role": "user", "content": _REQUEST.format(request=_request(answers[0])) + shown + question},
  ]


def _request(answer: Answer) -> str:
  """The user's message, or all of them where there are several turns."""
  return _turns([m["content"] for m in answer.conversation if m["role"] == "user"])


def _text(answer: Answer) -> str:
  return _turns([*(m["content"] for m in answer.conversation if m["role"] == "assistant"), answer.text])


def _turns(texts: Sequence[str]) -> str:
  return texts[0] if len(texts) == 1 else "\n\n".join(f"(turn {n}) {t}" for n, t in enumerate(texts, 1))
