"""Calls by file: requests are written, the run stops, and goes on when their answers lie beside them.

    FOLDER/requests.jsonl     {"custom_id", "method", "url", "body"}: the batch format of OpenAI's API, which vLLM's
                              run_batch reads too; in an order that says nothing about who asks
    FOLDER/answers.jsonl      what came back, in any order: that format's output, Gemini's, or {"custom_id", "text"}
    FOLDER/calls.jsonl        the answers that were read (`answers`)
    FOLDER/unanswered.jsonl   requests of a batch that came back without a readable answer

A batch that came back in part is not waited for: what has no readable answer is given up for good, unless its answer
is added to answers.jsonl later. A call is asked in one batch, and what waits stays in requests.jsonl.
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
from pasta_jax.utils.waiting import Waiting

REQUESTS, ANSWERS, UNANSWERED = "requests.jsonl", "answers.jsonl", "unanswered.jsonl"


class BatchCaller:
  """Has calls answered by file. The files lie beside `path`, where answers are stored."""

  def __init__(self, endpoint: Endpoint, path: Path):
    self._endpoint, self._folder, self._answers = endpoint, path.parent, Answers(path)
    self.paid = 0

  def map(self, calls: Sequence[Call], on_answer: Callable[[int, dict], None]) -> None:
    """Calls `on_answer(i, answer)` for each call; `protocols.no_answer()` if its batch came back without one.

    Raises Waiting if there are calls that no batch contained that came back: they are in requests.jsonl.
    """
    todo: dict[str, Call] = {}
    asking: dict[str, list[int]] = {}
    for i, call in enumerate(calls):
      key = self._endpoint.identity(call)
      asking.setdefault(key, []).append(i)
      if key not in self._answers.by_key:
        todo[key] = call
    if todo:
      todo = self._read(todo)
    if todo:
      count = sum(len(asking[key]) for key in todo)
      line = (
        f"{count:,} calls have no readable answer and are given up: they are in {self._folder / UNANSWERED}; add "
        f"their answers to {ANSWERS} and run the same command again to use them"
      )
      print(one_line(line, len(line)), file=sys.stderr)
    for key, indices in asking.items():
      for i in indices:
        on_answer(i, self._answers.by_key.get(key) or protocols.no_answer())

  def _read(self, todo: dict[str, Call]) -> dict[str, Call]:
    """Reads what came back; returns the calls that are given up. Raises Waiting for those that were not asked yet."""
    batch, given_up = _rows(self._folder / REQUESTS), _rows(self._folder / UNANSWERED)
    failed = self._read_answers({*todo, *batch, *given_up})
    if any(key in self._answers.by_key or key in failed for key in batch):  # it came back
      given_up, batch = given_up | batch, {}
    given_up = {key: row for key, row in given_up.items() if key not in self._answers.by_key}
    _write(self._folder / UNANSWERED, given_up)
    todo = {key: call for key, call in todo.items() if key not in self._answers.by_key}
    if new := {key: self._request(key, call) for key, call in todo.items() if key not in given_up}:
      path = self._folder / REQUESTS
      _write(path, batch | new)
      raise Waiting(
        f"{len(batch | new):,} requests to {self._endpoint.model} wait in {path}: have them answered, put the answers "
        f"into {path.with_name(ANSWERS)}, and run the same command again"
      )
    return todo

  def _request(self, key: str, call: Call) -> dict:
    return {
      "custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": self._endpoint.body(call),
    }  # fmt: skip

  def _read_answers(self, expected: set[str]) -> set[str]:
    """Stores the answers of answers.jsonl to the requests `expected`; says on stderr what could not be read, and
    returns the requests that came back without an answer."""
    path = self._folder / ANSWERS
    faults: collections.Counter[str] = collections.Counter()
    seen: set[str] = set()
    failed: set[str] = set()
    words = ""  # of the first error
    for line in _lines_of(path):
      try:
        key, answer = read_line(line)
      except Unreadable as fault:
        if fault.key in self._answers.by_key:
          continue
        faults[str(fault)] += 1
        failed.add(fault.key)
        words = words or fault.words
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
      listed += f"; the first error: {one_line(words)}" if words else ""
      print(one_line(f"{path}: lines that are not used: {listed}", 1000), file=sys.stderr)
    return failed


def _rows(path: Path) -> dict[str, dict]:
  """The requests of a file by custom_id, without lines that somebody damaged; none if there is no file."""
  found = {}
  for line in _lines_of(path):
    try:
      row = parse_json(line)
    except ValueError:
      continue
    if key := _key_of(row):
      found[key] = row
  return found


def _write(path: Path, rows: dict[str, dict]) -> None:
  """Writes requests in the order of their keys, which are hashes; no file for none."""
  if rows:
    write_atomic(path, "".join(to_json(rows[key]) + "\n" for key in sorted(rows)))
  else:
    path.unlink(missing_ok=True)


def _lines_of(path: Path) -> list[str]:
  if not path.is_file():
    return []
  text = path.read_bytes().decode("utf-8-sig", "replace")
  return [line for line in text.split("\n") if line.strip()]


class Unreadable(Malformed):
  """A line without an answer: the message is one of a few causes, to be counted."""

  def __init__(self, cause: str, key: str = "", words: str = ""):
    super().__init__(cause)
    self.key, self.words = key, words  # "" if unknown; the words of an error


def read_line(line: str) -> tuple[str, dict]:
  """(custom_id, answer) of a line of answers. Raises Unreadable."""
  try:
    row = parse_json(line)
  except ValueError:
    raise Unreadable("no JSON") from None
  if not (key := _key_of(row)):
    raise Unreadable("no custom_id")
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
    raise Unreadable("an error", key, str(fault))
  try:
    return key, protocols.read_answer("openai" if "choices" in body else "gemini", body)
  except Malformed:
    raise Unreadable("no answer in it", key) from None


def _key_of(row: Any) -> str:
  """The identity of a request or an answer; Gemini calls it key. "" if it has none."""
  key = row.get("custom_id", row.get("key")) if isinstance(row, dict) else None
  return key if isinstance(key, str) else ""
