"""Calls by file: requests are written, the run stops, and goes on when their answers lie beside them.

    FOLDER/requests.jsonl     {"custom_id", "method", "url", "body"}: the batch format of OpenAI's API, which vLLM's
                              run_batch reads too; in an order that says nothing about who asks
    FOLDER/answers.jsonl      what came back, in any order: that format's output, Gemini's, or {"custom_id", "text"}
    FOLDER/calls.jsonl        the answers that were read (`answers`)
    FOLDER/unanswered.jsonl   requests of a batch that came back without a readable answer

A batch that came back in part is not waited for: the run goes on without the rest, and says so. Answers that are
added to answers.jsonl later are used by the next run.
"""

import collections
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pasta_jax.utils import protocols
from pasta_jax.utils.answers import Answers
from pasta_jax.utils.endpoint import Endpoint
from pasta_jax.utils.files import write_atomic
from pasta_jax.utils.json_io import parse_json, to_json
from pasta_jax.utils.protocols import Call, Malformed
from pasta_jax.utils.text import one_line

WAITING = 4  # exit code of a run that waits for answers
REQUESTS, ANSWERS, UNANSWERED = "requests.jsonl", "answers.jsonl", "unanswered.jsonl"


class Waiting(Exception):
  """Requests wait to be answered. The message, one line, says where they are and what to do."""


class BatchCaller:
  """Has calls answered by file. The files lie beside `path`, where answers are stored."""

  def __init__(self, endpoint: Endpoint, path: Path):
    self._endpoint, self._folder, self._answers = endpoint, path.parent, Answers(path)
    self.paid = 0

  def map(self, calls: Sequence[Call], on_answer: Callable[[int, dict], None]) -> None:
    """Calls `on_answer(i, answer)` for each call; `protocols.no_answer()` if its batch came back without one.

    Raises Waiting if there are calls that no answered batch contained: they, and those that an earlier batch left
    unanswered, have been written to requests.jsonl.
    """
    todo: dict[str, Call] = {}
    asking: dict[str, list[int]] = {}
    for i, call in enumerate(calls):
      key = self._endpoint.identity(call)
      asking.setdefault(key, []).append(i)
      if key not in self._answers.by_key:
        todo[key] = call
    if todo:
      batch = _keys(self._folder / REQUESTS)
      self._read(batch | todo.keys())
      todo = {key: call for key, call in todo.items() if key not in self._answers.by_key}
      came_back = any(key in self._answers.by_key for key in batch)
      if not came_back or any(key not in batch for key in todo):
        self._ask(todo)
      self._give_up(todo)
    for key, indices in asking.items():
      for i in indices:
        on_answer(i, self._answers.by_key.get(key) or protocols.no_answer())

  def _ask(self, todo: dict[str, Call]) -> None:
    if not todo:
      return
    path = self._folder / REQUESTS
    write_atomic(path, self._lines(todo))
    raise Waiting(
      f"{len(todo):,} requests to {self._endpoint.model} wait in {path}: have them answered, put the answers into "
      f"{path.with_name(ANSWERS)}, and run the same command again"
    )

  def _give_up(self, lost: dict[str, Call]) -> None:
    path = self._folder / UNANSWERED
    if not lost:
      path.unlink(missing_ok=True)
      return
    write_atomic(path, self._lines(lost))
    line = (
      f"{len(lost):,} requests came back without a readable answer and are given up: they are in {path}; add their "
      f"answers to {ANSWERS} and run the same command again to use them"
    )
    print(one_line(line, len(line)), file=sys.stderr)

  def _lines(self, calls: dict[str, Call]) -> str:
    """Requests in the order of their keys, which are hashes."""
    rows = (
      {"custom_id": k, "method": "POST", "url": "/v1/chat/completions", "body": self._endpoint.body(calls[k])}
      for k in sorted(calls)
    )
    return "".join(to_json(row) + "\n" for row in rows)

  def _read(self, expected: set[str]) -> None:
    """Stores the answers of answers.jsonl to the requests `expected`; says on stderr what could not be read."""
    path = self._folder / ANSWERS
    faults: collections.Counter[str] = collections.Counter()
    seen: set[str] = set()
    for line in _lines_of(path):
      try:
        key, answer = read_line(line)
      except Malformed as fault:
        faults[str(fault)] += 1
        continue
      if key in seen:
        faults["a second answer to the same request"] += 1
      elif key in self._answers.by_key:
        pass  # of an earlier stage, or read before
      elif key not in expected:
        faults["an answer to another request"] += 1
      else:
        self._answers.add(key, answer)
        self.paid += 1
      seen.add(key)
    if faults:
      listed = ", ".join(f"{fault} {n:,}" for fault, n in faults.items())
      print(one_line(f"{path}: lines that are not used: {listed}", 1000), file=sys.stderr)


def _keys(path: Path) -> set[str]:
  """The custom_id of each request in a file; none if there is no file."""
  found = set()
  for line in _lines_of(path):
    try:
      found.add(_key_of(parse_json(line)))
    except ValueError:  # a line that somebody changed
      continue
  return found


def _lines_of(path: Path) -> list[str]:
  if not path.is_file():
    return []
  text = path.read_bytes().decode("utf-8-sig", "replace")
  return [line for line in text.split("\n") if line.strip()]


def read_line(line: str) -> tuple[str, dict]:
  """(custom_id, answer) of a line of answers. Raises Malformed with one of a few causes, to be counted."""
  try:
    row = parse_json(line)
  except ValueError:
    raise Malformed("no JSON") from None
  key = _key_of(row)
  if isinstance(row.get("text"), str):
    return key, {"text": protocols.without_thoughts(row["text"]), "log_p": {}, "tokens": []}
  response = row.get("response")
  response = response if isinstance(response, dict) else {}
  body: Any = response.get("body", response)  # OpenAI's is in an envelope
  status = response.get("status_code", 200)
  status = status if isinstance(status, int) and status >= 400 else 200
  if not isinstance(body, dict) or not body:
    body = {"error": row.get("error") or "no response"}
  if fault := protocols.fault_in(body, status):
    if fault.is_of_content:
      return key, protocols.refusal(one_line(str(fault), 300))
    raise Malformed("an error")
  try:
    return key, protocols.read_answer("openai" if "choices" in body else "gemini", body)
  except Malformed:
    raise Malformed("no answer in it") from None


def _key_of(row: Any) -> str:
  """The identity of a request or an answer; Gemini calls it key. Raises Malformed."""
  key = row.get("custom_id", row.get("key")) if isinstance(row, dict) else None
  if not isinstance(key, str):
    raise Malformed("no custom_id")
  return key
