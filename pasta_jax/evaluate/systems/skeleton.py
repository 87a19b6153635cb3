"""Skeleton-of-Thought (Ning et al. 2023, arXiv 2307.15337): an outline first, then its points side by side.

Nothing is trained: the model is prompted for a short outline, and each of its points is then written by a
request of its own, all of them in one batch. The points do not see each other. Where no outline of two points
or more comes back, the question is answered as it is, behind an outline that was written in vain.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence

from pasta_jax.decode.generator import Model
from pasta_jax.decode.record import loops
from pasta_jax.decode.scheduler import Scheduler, decode
from pasta_jax.decode.trace import Trace, to_json

OUTLINE = """\
List the main points of a good answer to this question as a short numbered list, three to five words a point.

Question: {question}"""
DEMONSTRATIONS = (  # without them a small model answers in place of planning
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
BATCHES = (2, 4, 8, 16)  # points at once, by the clock: each size is compiled once


def parse_outline(text: str, most: int) -> list[str]:
  """The points of a numbered outline, at most `most`, each once; what follows a gap in the numbers is left
  out."""
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
  """Answers conversations in two stages. `batch_size`: how many are answered at once; 1: by the clock."""

  def __init__(
    self, generator: Model, *, max_points: int, outline_tokens: int, point_tokens: int, batch_size: int
  ):
    self.generator, self.batch_size, self._most = generator, batch_size, max_points
    self._outlines = generator.interpreter(False, max_new_tokens=outline_tokens)
    self._points = generator.interpreter(False, max_new_tokens=point_tokens)
    self._plain = generator.interpreter(False)
    self._decoders: dict[tuple[int, int], Scheduler] = {}

  def answer(self, conversations: Sequence[Sequence[Mapping[str, str]]]) -> list[dict]:
    """A record for each conversation, as those of `decode.record.to_record`, with `trace`."""
    return self.timed_answer(conversations)[1]

  def timed_answer(self, conversations: Sequence[Sequence[Mapping[str, str]]]) -> tuple[float, list[dict]]:
    """(seconds from the first prefill to the last token, records)."""
    outline_prompts = [self._outline_prompt(c) for c in conversations]
    started = time.perf_counter()
    outlines = self._run(self._outlines, outline_prompts)
    points = [parse_outline("1." + t.text, self._most) for t in outlines]
    points = [p if len(p) > 1 else [] for p in points]
    asked = [self._point_prompt(c, p, n) for c, p in zip(conversations, points) for n in range(len(p))]
    written = iter(self._run(self._points, asked))
    plain = [c for c, p in zip(conversations, points) if not p]
    whole = iter(self._run(self._plain, [self.generator.encode(c) for c in plain]))
    seconds = time.perf_counter() - started
    return seconds, [
      self._record(outline, p, [next(written) for _ in p] or [next(whole)])
      for outline, p in zip(outlines, points)
    ]

  def compiled(self) -> int:
    """How many programs have been compiled so far."""
    return sum(i.compiled() for i in (self._outlines, self._points, self._plain))

  def extra_tokens(self) -> int:
    """Tokens that an outline's request is longer than its question."""
    return len(self._outline_prompt([{"role": "user", "content": "?"}])) - len(self.generator.encode("?"))

  def _run(self, interpreter, prompts: list[list[int]]) -> list[Trace]:
    if not prompts:
      return []
    if self.batch_size == 1 and len(prompts) == 1:
      return [decode(interpreter, prompts[0], self.generator.sampling)]
    requests = (
      self.batch_size if self.batch_size > 1 else next((b for b in BATCHES if b >= len(prompts)), BATCHES[-1])
    )
    key = (id(interpreter), requests)
    if key not in self._decoders:
      self._decoders[key] = Scheduler(interpreter, batch_size=requests, branch_width=1)
    return self._decoders[key].run(prompts, self.generator.sampling, one_pool_size=self.batch_size == 1)

  def _prompt(self, before, text: str, begin: str) -> list[int]:
    """The messages `before`, a request, and the beginning of the answer to it."""
    messages = [*before, {"role": "user", "content": text}]
    return [*self.generator.encode(messages), *self.generator.vocabulary.tokenizer.encode(begin)]

  def _outline_prompt(self, conversation) -> list[int]:
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

  def _point_prompt(self, conversation, points: list[str], n: int) -> list[int]:
    request = POINT.format(question=conversation[-1]["content"], outline=_numbered(points), number=n + 1)
    return self._prompt(conversation[:-1], request, f"{n + 1}. {points[n]}:")

  def _record(self, outline: Trace, points: list[str], answers: list[Trace]) -> dict:
    """The longest path is the outline's steps and those of the longest point behind it."""
    text = answers[0].text
    if points:
      text = "\n".join(
        f"{n}. {point}: {a.text.strip()}" for n, (point, a) in enumerate(zip(points, answers), 1)
      )
    cut = any(a.finish_reason != "stop" for a in answers)
    reading = self.generator.vocabulary.tokenizer.encode(text)
    text_tokens = len(reading) + int(not cut)
    path = outline.cost.longest_path + max(a.cost.longest_path for a in answers)
    total = outline.cost.total_tokens + sum(a.cost.total_tokens for a in answers)
    return {
      "text": text,
      "finish_reason": "length" if cut else "stop",
      "text_tokens": text_tokens,
      "total_tokens": total,
      "steps": outline.steps + max(a.steps for a in answers),
      "longest_path": path,
      "theoretical_speedup": text_tokens / max(path, 1),
      "parallelism": total / max(path, 1),
      "peak_parallelism": len(answers),
      "promises": len(points),
      "depth": int(bool(points)),
      "ill_formed": 0,
      "refused": 0,
      "topic_twice": False,
      "loops": loops(reading),
      "lengths": [],
      "trace": self._joined(outline, points, answers),
    }

  def _joined(self, outline: Trace, points: list[str], answers: list[Trace]) -> dict:
    """The two stages as one trace to draw: the outline is the main thread, its points begin where it ends."""
    saved = to_json(outline)
    [main] = saved["threads"]
    behind = max(main["rounds"], default=0)
    for n, answer in enumerate(answers):
      [thread] = to_json(answer)["threads"]
      saved["threads"].append(
        thread
        | {
          "path": [n],
          "parent": 0,
          "topic": points[n] if points else "the whole answer",
          "fork_index": len(main["tokens"]) - 1,
          "rounds": [r + behind for r in thread["rounds"]],
        }
      )
    return saved

  def precompile(self, lengths: Sequence[int], note: Callable[[str], None]) -> None:
    """Compiles what outlines and plain answers need; the points' shapes follow from the outlines
    (`compiled`)."""
    extra_outline = self.extra_tokens()
    sampling = self.generator.sampling
    for length in lengths:
      note(f"outlines of prompts of {length}")
      self._outlines.precompile(length, sampling)
      self._outlines.precompile(length + extra_outline, sampling)
      self._plain.precompile(length, sampling)
