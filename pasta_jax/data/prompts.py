"""Prompts of a benchmark: AlpacaEval, MT-Bench, or any file of JSON lines (or one JSON list, if named .json).

A row has `prompt` (AlpacaEval: `instruction`), or `turns` (MT-Bench): the user's messages, in order. Optional
are `id` (MT-Bench: `question_id`), `category` (AlpacaEval: `dataset`), and, for prompts of one turn, `response`
(AlpacaEval: `output`). Null is the same as absent.
"""

import collections
import dataclasses
from collections.abc import Sequence

from pasta_jax.utils.jsonl import DataError, present, read_rows
from pasta_jax.utils.text import is_unicode

MAX_TURNS = 100  # of a prompt: the work grows with their square


@dataclasses.dataclass(frozen=True)
class PromptTurn:
  """One turn of one prompt: what a system answers at a time."""

  id: str  # of the prompt; followed by "/1", "/2", … if the prompt has several turns
  prompt: str  # the user's message of this turn
  category: str
  earlier: tuple["PromptTurn", ...] = ()  # the turns before it
  response: str = ""  # the data set's own; "" if it has none


def read_prompts(
  path: str,
  *,
  limit: int = 0,
  categories: Sequence[str] = (),
  among: set[str] | None = None,
  part: str = "eval",
) -> list[PromptTurn]:
  """The turns of all prompts of a file, in order.

  Args:
    limit: number of prompts, spread evenly over the file; 0: all.
    categories: the categories to keep; none: all.
    among: the ids (of first turns) of the prompts to keep; None: all.
    part: section of the config, for messages.

  Raises DataError, one line, naming file and row.
  """
  if not path:
    raise DataError(f'name a file of JSON lines with "prompt": --config.{part}.prompts=FILE')
  prompts = [_turns(row, number, path) for number, row in enumerate(read_rows(path))]
  if not prompts:
    raise DataError(f"{path} contains no prompt")
  if twice := [i for i, n in collections.Counter(p[-1].id for p in prompts).items() if n > 1]:
    raise DataError(f"{path}: two prompts have the id {twice[0]!r}")
  if wanted := set(categories):
    there = {p[0].category for p in prompts}
    if wanted - there:
      raise DataError(
        f"{path} has no category {', '.join(sorted(wanted - there))}: it has {', '.join(sorted(there))}"
      )
    prompts = [p for p in prompts if p[0].category in wanted]
  if among is not None:
    prompts = [p for p in prompts if p[0].id in among]
  if limit and limit < len(prompts):
    prompts = [prompts[i * len(prompts) // limit] for i in range(limit)]
  return [request for p in prompts for request in p]


def _turns(row: dict, number: int, path: str) -> list[PromptTurn]:
  row = present(row)
  turns = row.get("turns") or [row.get("prompt", row.get("instruction"))]
  if not isinstance(turns, list) or not all(isinstance(t, str) and t.strip() for t in turns):
    raise DataError(f'{path}: row {number + 1} has no text under "prompt", "instruction" or "turns"')
  if len(turns) > MAX_TURNS:
    raise DataError(f"{path}: row {number + 1} has {len(turns):,} turns, more than {MAX_TURNS}")
  if not all(map(is_unicode, turns)):
    raise DataError(f"{path}: row {number + 1} has half of a surrogate pair in its prompt: it is no text")
  name = str(row.get("id", row.get("question_id", number)))
  category = str(row.get("category", row.get("dataset", "")))
  response = row.get("response", row.get("output", "")) if len(turns) == 1 else ""
  if not isinstance(response, str) or not is_unicode(response):
    raise DataError(f'{path}: row {number + 1} has a "response" that is no text')
  requests: list[PromptTurn] = []
  for n, text in enumerate(turns, 1):
    whole = f"{name}/{n}" if len(turns) > 1 else name
    requests.append(PromptTurn(whole, text, category, tuple(requests), response))
  return requests


def conversation(request: PromptTurn, answers: dict[str, str]) -> list[dict[str, str]]:
  """The messages that a system answers; `answers` are its own answers to earlier turns, by id."""
  messages: list[dict[str, str]] = []
  for turn in request.earlier:
    messages += [{"role": "user", "content": turn.prompt}, {"role": "assistant", "content": answers[turn.id]}]
  return [*messages, {"role": "user", "content": request.prompt}]
