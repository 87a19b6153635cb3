"""Finished work as JSON lines, and beside it the settings that it depends on: a resumed run repeats none of
it, and rows made with other settings are never mixed in.

    responses/pasta.jsonl            one row a request, appended as it finishes
    responses/pasta.settings.json    the settings, flat
"""

import glob
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pasta_jax.config import current_names
from pasta_jax.utils.files import atomic_path, write_atomic
from pasta_jax.utils.json_io import parse_json, read_json, to_json
from pasta_jax.utils.jsonl import DataError, append_row, read_finished_lines


class Prompted(Protocol):
  """What a row is the result of (`data.prompts.PromptTurn` is one)."""

  @property
  def id(self) -> str: ...
  @property
  def prompt(self) -> str: ...


P = TypeVar("P", bound=Prompted)
OTHER_FOLDER = "choose another --workdir, or the settings of that run"


def agree(
  what: Path, beside: Path, settings: dict[str, Any], advice: str = OTHER_FOLDER, *, shared: bool = False
) -> None:
  """Writes the settings that `what` is made with to `beside`; with `shared`, other processes may do so too.

  Raises DataError, naming one setting and giving `advice`, if `beside` exists and differs.
  """
  settings = parse_json(to_json(settings))
  if not beside.exists():
    write_atomic(beside, to_json(settings, indent=2) + "\n", shared=shared)
    return
  before = _read_settings(beside)
  for name in dict.fromkeys([*before, *settings]):
    if before.get(name) != settings.get(name):
      raise DataError(
        f"{what} was made with {name}={before.get(name)!r}, not {settings.get(name)!r}: {advice}"
      )


def _read_settings(path: Path) -> dict[str, Any]:
  return current_names(read_json(path))


def settings_beside(path: Path) -> Path:
  """The file of the settings that belong to a file of rows."""
  return path.with_suffix(".settings.json")


def part_of(path: Path, index: int) -> Path:
  """The file to which process `index` of several adds rows, until they are merged into `path`."""
  return path.with_name(f"{path.name}.part-{index:03d}")


def merge_parts(path: Path, count: int = 1) -> None:
  """Adds the rows of all parts to `path`, atomically, and deletes the parts. A kill between the two is repaired by the
  next call: rows that are there twice are the same. Of `count` processes no part is missed that a shared file system
  does not list yet."""
  known = {part_of(path, index) for index in range(1, count)}
  parts = sorted(
    {p for p in known if p.exists()} | {*path.parent.glob(f"{glob.escape(path.name)}.part-[0-9]*")}
  )
  if not parts:
    return
  with atomic_path(path) as temporary:
    if path.exists():
      shutil.copyfile(path, temporary)
    with open(temporary, "ab") as file:
      for part in parts:
        data = part.read_bytes()
        file.write(data[: data.rfind(b"\n") + 1])  # a kill may have cut off the last line
  for part in parts:
    part.unlink()


class Records:
  """Rows by `id` in the file `path`; `settings` is what they depend on.

  Rows that several processes left in parts are merged into `path`. Raises DataError, as `agree` does, if `path` has
  rows that were made with other settings, or for a damaged file.
  """

  def __init__(self, path: Path, settings: dict[str, Any], advice: str = OTHER_FOLDER):
    self.path = path
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = settings_beside(path)
    if path.exists():  # a kill may have cut off the last line
      os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    merge_parts(path)
    self.rows = {row["id"]: row for row in _with_ids(path)}
    if not self.rows:
      beside.unlink(missing_ok=True)
    agree(path, beside, settings, advice)

  def add(self, row: dict) -> None:
    self.rows[row["id"]] = row
    append_row(self.path, row)

  def missing(self, requests: Sequence[P]) -> list[P]:
    return missing(self.path, self.rows, requests)


def missing(path: Path, rows: Mapping[str, dict], requests: Sequence[P]) -> list[P]:
  """Requests without a row in `path`. Raises DataError if a row's id is that of another prompt."""
  for r in requests:
    if (row := rows.get(r.id)) and row.get("prompt") != r.prompt:
      raise DataError(
        f"{path} has a response to another prompt with the id {r.id!r}: choose another --workdir"
      )
  return [r for r in requests if r.id not in rows]


def read_records(path: Path) -> list[dict]:
  """The rows of a file of records, the newest of each id; [] if there is no file.

  Another process may be writing to the file: a last line without its line break is ignored.
  """
  return list({row["id"]: row for row in _with_ids(path)}.values())


def _with_ids(path: Path) -> list[dict]:
  """The finished rows. Raises DataError if one has no id: it is not a file of records."""
  rows = read_finished_lines(path)
  for number, row in enumerate(rows, 1):
    if not isinstance(row.get("id"), str):
      raise DataError(f"{path}, row {number} has no id: the file is damaged, or not of this program")
  return rows
