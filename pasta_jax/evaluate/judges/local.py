"""The judge that needs no network: an answer's likelihood under the baseline model, and its plain defects.

It sees whether a text reads as the baseline model would write it (a chunk that contradicts or repeats its
neighbour, or that starts in the middle, is unlikely there), and whether it loops, was cut off, or has a
length that the prompt forbids. It does not see whether an answer is true or useful. It prefers bland text and
the baseline's own greedy answers, which are close to the likeliest ones that it knows; its figures are
therefore a lower bound on the quality of other systems, good for comparing two of them, and no replacement
for a judge that reads. `python -m pasta_jax.evaluate.judges.agreement` measures how often it agrees with
people.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from pasta_jax.decode.generator import Model, adapter_digest
from pasta_jax.decode.record import current, loops
from pasta_jax.evaluate.judges.judge import Answer, Pair, say_lost
from pasta_jax.evaluate.judges.likelihood import Likelihood
from pasta_jax.utils.progress import progress_bar
from pasta_jax.utils.records import Records
from pasta_jax.utils.shared_records import SharedRecords

PER_NAT = 4.0  # logits of preference per nat per token of likelihood
PER_DEFECT = 1.0  # logits of preference per defect
EMPTY_LOG_P = -10.0  # log p per token of an answer without tokens

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
  """Whether the text has another length than the prompt asks for in words, sentences or paragraphs.

  A quarter more or less is accepted; a bare number ("two sentences") means exactly that many.
  """
  for match in _LIMIT.finditer(prompt):
    number = match[2].lower()
    wanted = int(_WORDS.get(number, number if number.isdigit() else 0))
    count = _COUNT[match["unit"].lower().rstrip("s")](text)
    how = (match["how"] or "").lower()
    low = (
      0.0
      if how
      in ("at most", "no more than", "not more than", "up to", "under", "less than", "fewer than", "within")
      else 0.75 * wanted
    )
    high = float("inf") if how in ("at least", "more than", "over") else 1.25 * wanted
    if not low <= count <= high:
      return True
  return False


def repetition(text: str, n: int = 4) -> float:
  """Share of the text's word n-grams that occur earlier in it."""
  words = text.lower().split()
  ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
  return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def defects(prompt: str, text: str, finished: bool, tokens: Sequence[int]) -> list[str]:
  """Names of an answer's plain defects."""
  tests = {
    "empty": not text.strip(),
    "cut off": not finished,
    "loops": loops(tokens),
    "repeats": repetition(text) > 0.2,
    "length": contradicts_length(prompt, text),
  }
  return [name for name, applies in tests.items() if applies]


def preference(system: Mapping, baseline: Mapping) -> float:
  """P(the system's answer is better) from two scores (`log_p` per token, `defects`), in (0, 1)."""
  gain = PER_NAT * (system["log_p"] - baseline["log_p"])
  system_repeats, baseline_repeats = (
    bool({"loops", "repeats"} & set(answer["defects"])) for answer in (system, baseline)
  )
  if system_repeats != baseline_repeats:  # repeated text is likely, and worth nothing
    gain = min(gain, 0.0) if system_repeats else max(gain, 0.0)
  gain -= PER_DEFECT * (len(system["defects"]) - len(baseline["defects"]))
  return 1 / (1 + float(np.exp(-gain)))


class LocalJudge:
  """Scores each answer once, under the model that `load` returns; the scores are kept with the judgements."""

  name = "local"

  def __init__(self, load: Callable[[], Model], settings: dict):
    self._load = load
    self.settings = settings | {"per nat": PER_NAT, "fault": PER_DEFECT}  # names that old runs have too
    self._likelihood: Likelihood | None = None
    self._model: Model | None = None

  @classmethod
  def from_config(cls, config) -> Self:
    """The judge whose model is the baseline system's, in `eval.judge_dtype`."""
    entry = config.systems[config.eval.baseline]
    return cls(
      lambda: Model(config, adapter=entry.adapter, dtype=config.eval.judge_dtype),
      {
        "source": config.model.source,
        "adapter": adapter_digest(entry.adapter),
        "dtype": config.eval.judge_dtype,
      },
    )

  def score(self, pairs: Sequence[Pair], folder: Path) -> None:
    """Scores each answer once, into `folder/scores.jsonl`."""
    records = SharedRecords(folder / "scores.jsonl", self.settings)
    todo = {k: a for k, a in _answers(pairs).items() if k not in records.rows}
    records.make([*todo], lambda keys, add: self._score({k: todo[k] for k in keys}, add))

  def compare(self, pairs: Sequence[Pair], folder: Path, on_judged: Callable[[int, dict], None]) -> None:
    """Judges the pairs whose likelihoods are numbers; answers that have no score yet get one."""
    records, answers = Records(folder / "scores.jsonl", self.settings), _answers(pairs)
    if todo := {k: a for k, a in answers.items() if k not in records.rows}:
      self._score(todo, records.add)
    scores = {k: current(records.rows[k]) for k in answers}
    lost = []
    for i, p in enumerate(pairs):
      system, baseline = scores[_key(p.system)], scores[_key(p.baseline)]
      if not all(
        isinstance(s["log_p"], int | float) and math.isfinite(s["log_p"]) for s in (system, baseline)
      ):  # a file has null for NaN
        lost.append("likelihood is no number")
        continue
      on_judged(
        i,
        {
          "preference": preference(system, baseline),
          "log_p": [system["log_p"], baseline["log_p"]],
          "defects": [system["defects"], baseline["defects"]],
        },
      )
    say_lost(self.name, len(pairs), lost)

  def _score(self, answers: dict[str, Answer], add: Callable[[dict], None]) -> None:
    """Adds the score of each answer, by its key."""
    if self._likelihood is None or self._model is None:
      self._model = self._load()
      self._likelihood = Likelihood(self._model)
    vocabulary = self._model.vocabulary
    keys = list(answers)
    texts = [
      (*vocabulary.tokenizer.encode(a.text), *(vocabulary.tags.eos[:1] if a.finished else ()))
      for a in answers.values()
    ]
    prompts = [self._model.encode(a.conversation) for a in answers.values()]
    bar, task = progress_bar("likelihoods", len(keys))

    def on_finish(i: int, log_p: float) -> None:
      answer = answers[keys[i]]
      add(
        {
          "id": keys[i],
          "log_p": log_p / len(texts[i]) if texts[i] else EMPTY_LOG_P,
          "tokens": len(texts[i]),
          "defects": defects(answer.prompt, answer.text, answer.finished, texts[i]),
        }
      )
      bar.advance(task)

    with bar:
      self._likelihood(prompts, texts, on_finish)


def _answers(pairs: Sequence[Pair]) -> dict[str, Answer]:
  """The answers of pairs, each once, by `_key`."""
  return {_key(a): a for p in pairs for a in (p.system, p.baseline)}


def _key(answer: Answer) -> str:
  """The same for the same answer to the same conversation."""
  whole = json.dumps([[dict(m) for m in answer.conversation], answer.text, answer.finished])
  return hashlib.sha256(whole.encode()).hexdigest()[:24]
