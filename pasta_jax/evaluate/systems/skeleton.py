"""Skeleton-of-Thought (Ning et al. 2023, arXiv 2307.15337): an outline, then all of its points in one batch.

Nothing is trained: the model is prompted for a short outline, and a request of its own then writes each
point. The points do not see each other. If the outline has fewer than two points, the question is answered by
one ordinary request, and the outline's time is lost.
"""

import re
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

from pasta_jax.config import identity
from pasta_jax.decode.generator import Model
from pasta_jax.decode.interpreter import Interpreter
from pasta_jax.decode.record import ResponseRecord, count_text_tokens, loops, text_tokens
from pasta_jax.decode.scheduler import Scheduler, decode, precompile
from pasta_jax.decode.trace import Trace, to_json
from pasta_jax.evaluate.systems.system import Conversation, OnProgress, check_length

OUTLINE = """\
List the main points of a good answer to this question as a short numbered list, three to five words a point.

Question: {question}"""
DEMONSTRATIONS = (  # without them a small model answers the question instead of planning
  (
    "How can I sleep better at night?",
    (
      "Keep a regular schedule",
      "Make the bedroom dark",
      "Avoid coffee and screens",
      "Exercise during the day",
    ),
  ),
  (
    "What are the advantages of public libraries?",
    ("Free access to books", "Places to study", "Help for job seekers", "Events for children"),
  ),
)
POINT = """\
Question: {question}

Outline of the answer:
{outline}

Write out point {number} of the outline in one or two sentences. Write nothing about the other points."""
_ITEM = re.compile(r"(?:^|\n|(?<=\S) )[ \t]*(\d{1,2})[.)][ \t]+(\S.*?)(?=\n|\Z| \d{1,2}[.)] )")
BATCHES = (2, 4, 8, 16)  # points decoded at once in timed responses: each size is compiled once


def parse_outline(text: str, most: int) -> list[str]:
  """The first `most` points of a numbered outline, without duplicates, up to the first gap in the numbers."""
  points: list[str] = []
  for expected, (number, point) in enumerate(_ITEM.findall(text)[:most], 1):
    if int(number) != expected:
      break
    point = point.strip().strip("*").rstrip(" :.*")
    if point and point.lower() not in map(str.lower, points):
      points.append(point)
  return points


def _numbered(points: Sequence[str]) -> str:
  return "\n".join(f"{i}. {p}" for i, p in enumerate(points, 1))


class Skeleton:
  """Answers conversations in two stages.

  `batch_size`: conversations that are answered at once; 1 where responses are timed.
  """

  def __init__(
    self, model: Model, *, max_points: int, outline_tokens: int, point_tokens: int, batch_size: int
  ):
    self.model, self.batch_size, self._max_points = model, batch_size, max_points
    self._outlines = model.interpreter(False, max_new_tokens=outline_tokens)
    self._points = model.interpreter(False, max_new_tokens=point_tokens)
    self._plain = model.interpreter(False)
    self._schedulers: dict[tuple[int, int], Scheduler] = {}

  def answer(self, conversations: Sequence[Conversation]) -> list[dict]:
    """A row for each conversation: a record's JSON with `trace`."""
    return self.timed_answer(conversations)[1]

  def timed_answer(self, conversations: Sequence[Conversation]) -> tuple[float, list[dict]]:
    """(seconds from the first prefill to the last token, rows)."""
    outline_prompts = [self._outline_prompt(c) for c in conversations]
    started = time.perf_counter()
    outlines = self._run(self._outlines, outline_prompts)
    points = [parse_outline("1." + t.text, self._max_points) for t in outlines]
    points = [p if len(p) > 1 else [] for p in points]
    point_prompts = [
      self._point_prompt(c, p, n) for c, p in zip(conversations, points) for n in range(len(p))
    ]
    point_traces = iter(self._run(self._points, point_prompts))
    without_points = [c for c, p in zip(conversations, points) if not p]
    plain_traces = iter(self._run(self._plain, [self.model.encode(c) for c in without_points]))
    seconds = time.perf_counter() - started
    rows = []
    for outline, p in zip(outlines, points):
      answers = [next(point_traces) for _ in p] or [next(plain_traces)]
      rows.append(self.record(outline, p, answers).to_json() | {"trace": joint_trace(outline, p, answers)})
    return seconds, rows

  def compiled(self) -> int:
    """Number of programs compiled so far."""
    return sum(i.compiled() for i in (self._outlines, self._points, self._plain))

  def extra_tokens(self) -> int:
    """Tokens that the prompt for an outline has beyond its question's."""
    return len(self._outline_prompt([{"role": "user", "content": "?"}])) - len(self.model.encode("?"))

  def _run(self, interpreter: Interpreter, prompts: list[list[int]]) -> list[Trace]:
    if not prompts:
      return []
    if self.batch_size == 1 and len(prompts) == 1:
      return [decode(interpreter, prompts[0], self.model.sampling)]
    size = (
      self.batch_size if self.batch_size > 1 else next((b for b in BATCHES if b >= len(prompts)), BATCHES[-1])
    )
    key = (id(interpreter), size)
    if key not in self._schedulers:
      self._schedulers[key] = Scheduler(interpreter, batch_size=size, branch_width=1)
    return self._schedulers[key].run(prompts, self.model.sampling, one_pool_size=self.batch_size == 1)

  def _prompt(self, before: Conversation, text: str, begin: str) -> list[int]:
    """Tokens of the messages `before`, of a request `text`, and of the beginning of its response."""
    messages = [*before, {"role": "user", "content": text}]
    return [*self.model.encode(messages), *self.model.vocabulary.tokenizer.encode(begin)]

  def _outline_prompt(self, conversation: Conversation) -> list[int]:
    shown = [
      message
      for question, points in DEMONSTRATIONS
      for message in (
        {"role": "user", "content": OUTLINE.format(question=question)},
        {"role": "assistant", "content": _numbered(points)},
      )
    ]
    request = OUTLINE.format(question=conversation[-1]["content"])
    return self._prompt([*shown, *conversation[:-1]], request, "1.")

  def _point_prompt(self, conversation: Conversation, points: list[str], n: int) -> list[int]:
    request = POINT.format(question=conversation[-1]["content"], outline=_numbered(points), number=n + 1)
    return self._prompt(conversation[:-1], request, f"{n + 1}. {points[n]}:")

  def record(self, outline: Trace, points: list[str], answers: list[Trace]) -> ResponseRecord:
    """The longest path is the outline's steps and then those of the longest point."""
    text = answers[0].text
    if points:
      text = "\n".join(
        f"{n}. {point}: {a.text.strip()}" for n, (point, a) in enumerate(zip(points, answers), 1)
      )
    finish_reason = "stop" if all(a.finish_reason == "stop" for a in answers) else "length"
    tokens = text_tokens(text, answers, self.model.vocabulary)
    return ResponseRecord(
      text=text,
      finish_reason=finish_reason,
      text_tokens=count_text_tokens(tokens, finish_reason),
      total_tokens=outline.cost.total_tokens + sum(a.cost.total_tokens for a in answers),
      steps=outline.steps + max(a.steps for a in answers),
      longest_path=outline.cost.longest_path + max(a.cost.longest_path for a in answers),
      peak_parallelism=len(answers),
      promises=len(points),
      depth=int(bool(points)),
      ill_formed=0,
      refused=0,
      topic_twice=False,
      loops=loops(tokens),
      lengths=(),
      unseparated=0,  # points are lines of their own
    )

  def precompile(self, lengths: Sequence[int], on_progress: OnProgress) -> None:
    """Compiles outlines and plain answers; which batches of points are needed depends on the outlines
    (`compiled`)."""
    extra_outline = self.extra_tokens()
    sampling = self.model.sampling
    for length in lengths:
      on_progress(f"outlines of prompts of {length}")
      precompile(self._outlines, length, sampling)
      precompile(self._outlines, length + extra_outline, sampling)
      precompile(self._plain, length, sampling)


def joint_trace(outline: Trace, points: list[str], answers: list[Trace]) -> dict:
  """Both stages as the JSON of one trace: the outline is the main thread, the points start where it ends."""
  saved = to_json(outline)
  [main] = saved["threads"]
  outline_rounds = max(main["rounds"], default=0)
  for n, answer in enumerate(answers):
    [thread] = to_json(answer)["threads"]
    saved["threads"].append(
      thread
      | {
        "path": [n],
        "parent": 0,
        "topic": points[n] if points else "the whole answer",
        "fork_index": len(main["tokens"]) - 1,
        "rounds": [r + outline_rounds for r in thread["rounds"]],
      }
    )
  return saved


class SkeletonSystem:
  """Skeleton-of-Thought as a system that is compared."""

  promises: ClassVar[bool] = False

  def __init__(self, skeleton: Skeleton):
    self.model, self._skeleton = skeleton.model, skeleton

  @classmethod
  def from_config(cls, config, entry, model: Model, *, timed: bool) -> Self:
    del entry
    return cls(Skeleton(model, **vars(config.skeleton), batch_size=1 if timed else config.eval.batch_size))

  @staticmethod
  def settings(config) -> dict[str, Any]:
    return {f"skeleton.{k}": v for k, v in identity(config.skeleton).items()}

  def answer(self, conversations: Sequence[Conversation], on_finish: Callable[[int, dict], None]) -> None:
    # A kill loses one group at most; smaller groups leave batches partly empty at the end of each stage.
    group = 4 * self._skeleton.batch_size
    for first in range(0, len(conversations), group):
      for i, row in enumerate(self._skeleton.answer(conversations[first : first + group])):
        on_finish(first + i, row)

  def answer_timed(self, conversation: Conversation) -> dict:
    while True:  # outlines decide which shapes are needed: a time with a compilation in it is not kept
      before = self._skeleton.compiled()
      seconds, [row] = self._skeleton.timed_answer([conversation])
      if self._skeleton.compiled() == before:
        return row | {"seconds": seconds}

  def encode(self, conversation: Conversation) -> list[int]:
    return self.model.encode(conversation)

  def check(self, conversation: Conversation) -> None:
    check_length(self.model, len(self.encode(conversation)) + self._skeleton.extra_tokens())

  def precompile(self, lengths: Sequence[int], on_progress: OnProgress) -> None:
    self._skeleton.precompile(lengths, on_progress)
