"""The judge that needs no network: how likely each answer is under the sequential baseline model, and plain
faults.

What it can see: whether the text hangs together as the baseline model would write it (a chunk that
contradicts its neighbour, repeats it, or starts in the middle is unlikely there), whether it loops, was cut
off, or has a length that the prompt forbids. What it cannot see: whether an answer is true or useful. It
leans towards bland text, and towards the baseline itself, whose own greedy answers are close to the likeliest
ones it knows; so it is a lower bound on the quality of others, good for comparing two of them, and no
replacement for a judge that reads. How far it agrees with people is measured by `python -m
pasta_jax.evaluate.judges.agreement`.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pasta_jax.decode.generator import Model
from pasta_jax.decode.record import loops
from pasta_jax.evaluate.judges.judge import Answer, Pair
from pasta_jax.evaluate.judges.likelihood import Likelihood
from pasta_jax.utils.progress import progress_bar
from pasta_jax.utils.records import Records

PER_NAT = 4.0  # logits of preference for a nat a token of likelihood
FAULT = 1.0  # and for each fault
NOTHING = -10.0  # log p a token of an answer without any

_WORDS = {
  w: i for i, w in enumerate("zero one two three four five six seven eight nine ten eleven twelve".split())
}
_NUMBER = r"(\d{1,4}|" + "|".join(_WORDS) + r")"
_LIMIT = re.compile(
  r"\b(?P<how>at least|at most|no more than|not more than|up to|under|less than|fewer than|more than|over|"
  r"exactly|within|in|about|around)?\s*(?:a |an )?"
  + _NUMBER
  + r"[ -](?P<unit>words?|sentences?|paragraphs?)\b",
  re.IGNORECASE,
)
_COUNT = {
  "word": lambda t: len(t.split()),
  "sentence": lambda t: len(re.findall(r"[.!?](?:\s|$)", t)) or bool(t.strip()),
  "paragraph": lambda t: len([p for p in re.split(r"\n\s*\n", t) if p.strip()]),
}


def contradicts_length(prompt: str, text: str) -> bool:
  """Whether the text's length is not what the prompt asks for in words, sentences or paragraphs.

  A quarter more or less is let pass; a bare number ("two sentences") is taken as exact.
  """
  for match in _LIMIT.finditer(prompt):
    number = match[2].lower()
    wanted = int(_WORDS.get(number, number if number.isdigit() else 0))
    there = _COUNT[match["unit"].lower().rstrip("s")](text)
    how = (match["how"] or "").lower()
    low = (
      0.0
      if how
      in ("at most", "no more than", "not more than", "up to", "under", "less than", "fewer than", "within")
      else 0.75 * wanted
    )
    high = float("inf") if how in ("at least", "more than", "over") else 1.25 * wanted
    if not low <= there <= high:
      return True
  return False


def repetition(text: str, n: int = 4) -> float:
  """Share of the text's runs of n words that came before in it."""
  words = text.lower().split()
  runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
  return 1 - len(set(runs)) / len(runs) if runs else 0.0


def faults(prompt: str, text: str, finished: bool, tokens: Sequence[int]) -> list[str]:
  """Names of what is plainly wrong with an answer."""
  found = {
    "empty": not text.strip(),
    "cut off": not finished,
    "loops": loops(tokens),
    "repeats": repetition(text) > 0.2,
    "length": contradicts_length(prompt, text),
  }
  return [name for name, there in found.items() if there]


def preference(system: Mapping, baseline: Mapping) -> float:
  """P(the system's answer is better) from two scores (`log_p` a token, `faults`), in (0, 1)."""
  gain = PER_NAT * (system["log_p"] - baseline["log_p"])
  loops_ = [bool({"loops", "repeats"} & set(answer["faults"])) for answer in (system, baseline)]
  if loops_[0] != loops_[1]:  # what is said again is likely, and worth nothing
    gain = min(gain, 0.0) if loops_[0] else max(gain, 0.0)
  gain -= FAULT * (len(system["faults"]) - len(baseline["faults"]))
  return 1 / (1 + float(np.exp(-gain)))


class LocalJudge:
  """Scores each answer once, under the model that `load` gives; scores are kept beside the judgements."""

  name = "local"

  def __init__(self, load: Callable[[], Model], settings: dict):
    self._load = load
    self.settings = settings | {"per nat": PER_NAT, "fault": FAULT}
    self._likelihood: Likelihood | None = None
    self._generator: Model | None = None

  def compare(self, pairs: Sequence[Pair], folder: Path, done: Callable[[int, dict], None]) -> None:
    """Preferences of all pairs, by `done(i, {"preference": …})`; scores go to `folder/scores.jsonl`."""
    scores = Records(folder / "scores.jsonl", self.settings)
    answers = {_key(a): a for p in pairs for a in (p.system, p.baseline)}
    self._score({k: v for k, v in answers.items() if k not in scores.rows}, scores)
    for i, p in enumerate(pairs):
      system, baseline = (scores.rows[_key(a)] for a in (p.system, p.baseline))
      done(
        i,
        {
          "preference": preference(system, baseline),
          "log_p": [system["log_p"], baseline["log_p"]],
          "faults": [system["faults"], baseline["faults"]],
        },
      )

  def _score(self, answers: dict[str, Answer], scores: Records) -> None:
    if not answers:
      return
    if self._likelihood is None or self._generator is None:
      self._generator = self._load()
      self._likelihood = Likelihood(self._generator)
    vocabulary = self._generator.vocabulary
    names = list(answers)
    texts = [
      (*vocabulary.tokenizer.encode(a.text), *(vocabulary.tags.eos[:1] if a.finished else ()))
      for a in answers.values()
    ]
    prompts = [self._generator.encode(a.conversation) for a in answers.values()]
    bar, task = progress_bar("likelihoods", len(names))

    def done(i: int, log_p: float) -> None:
      answer = answers[names[i]]
      scores.add(
        {
          "id": names[i],
          "log_p": log_p / len(texts[i]) if texts[i] else NOTHING,
          "tokens": len(texts[i]),
          "faults": faults(answer.prompt, answer.text, answer.finished, texts[i]),
        }
      )
      bar.advance(task)

    with bar:
      self._likelihood(prompts, texts, done)


def _key(answer: Answer) -> str:
  """The same for the same answer to the same conversation."""
  whole = json.dumps([[dict(m) for m in answer.conversation], answer.text, answer.finished])
  return hashlib.sha256(whole.encode()).hexdigest()[:24]
