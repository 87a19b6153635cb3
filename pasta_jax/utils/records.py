"""Rows of JSON lines that a run adds to and a resumed run does not make again, and the settings they were
made with."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pasta_jax.data.examples import DataError, read_jsonl
from pasta_jax.utils.files import write_json_atomic


class Request(Protocol):
  """What a row answers (`evaluate.prompts.Request` is one)."""

  @property
  def id(self) -> str: ...
  @property
  def prompt(self) -> str: ...


Asked = TypeVar("Asked", bound=Request)


def agree(what: Path, beside: Path, settings: dict[str, Any]) -> None:
  """Writes the settings that `what` is made with to `beside`; DataError, naming one, where others stand
  there."""
  settings = json.loads(json.dumps(settings))
  before = json.loads(beside.read_text()) if beside.exists() else settings
  for name in dict.fromkeys([*before, *settings]):
    if before.get(name) != settings.get(name):
      raise DataError(
        f"{what} was made with {name}={before.get(name)!r}, not {settings.get(name)!r}: choose "
        "another --workdir, or the settings of that run"
      )
  write_json_atomic(beside, settings)


def settings_beside(path: Path) -> Path:
  """Where the settings of a file of rows stand."""
  return path.with_suffix(".settings.json")


class Records:
  """Rows by `id` in `path`. `settings` is what they depend on; rows made with others are not mixed with them.

  Raises DataError, naming the setting, when `path` holds such rows.
  """

  def __init__(self, path: Path, settings: dict[str, Any]):
    self.path = path
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = settings_beside(path)
    if path.exists():  # a run that was killed may have left a line without its end
      written = path.read_bytes()
      os.truncate(path, written.rfind(b"\n") + 1)
    self.rows = {r["id"]: r for r in read_jsonl(path)} if path.exists() else {}
    if not self.rows:
      beside.unlink(missing_ok=True)
    agree(path, beside, settings)

  def add(self, row: dict) -> None:
    self.rows[row["id"]] = row
    with open(self.path, "a", encoding="utf-8") as file:
      file.write(json.dumps(row, ensure_ascii=False) + "\n")

  def missing(self, requests: Sequence[Asked]) -> list[Asked]:
    return missing(self.path, self.rows, requests)


def missing(path: Path, rows: Mapping[str, dict], requests: Sequence[Asked]) -> list[Asked]:
  """Requests without a row in `path`. Raises DataError where a row answers another prompt of the same id."""
  for r in requests:
    if (row := rows.get(r.id)) and row["prompt"] != r.prompt:
      raise DataError(
        f"{path} holds a response to another prompt with the id {r.id!r}: choose another --workdir"
      )
  return [r for r in requests if r.id not in rows]


def read_records(path: Path) -> list[dict]:
  """The rows of a file of records, the newest of each id; [] where there is none.

  A line that is still being written, or that a kill cut off, is left out.
  """
  if not path.exists():
    return []
  whole = path.read_bytes()
  lines = whole[: whole.rfind(b"\n") + 1].decode("utf-8").split("\n")[:-1]
  return list({row["id"]: row for row in map(json.loads, lines)}.values())
