"""Rows of data files, as JSON lines, plain or gzipped; and the error of a file or row that cannot be used.

`read_jsonl` stops at the first bad line; a caller that counts bad lines and goes on uses `parse_lines`.
"""

import codecs
import gzip
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pasta_jax.utils.files import naming, write_atomic
from pasta_jax.utils.json_io import parse_json, to_json


class DataError(ValueError):
  """A data file or row that cannot be used; the message is one line that names file and row."""


class BadRow(NamedTuple):
  """What is wrong with a row."""

  cause: str  # one of a few, to be counted
  message: str


Parsed = Iterator[tuple[int, dict | BadRow]]  # (line or index from 1, the row or what is wrong with it)

# A packed file may expand to so many times its size, and in any case to `_SMALL` bytes: text expands by 3 to 20
# times, files that were made to fill a memory by 1,000 and more.
_EXPANSION, _SMALL = 100, 64 << 20


def unpacked_limit(path: str | Path) -> int:
  """The most bytes that the content of a packed file may have."""
  return max(_EXPANSION * Path(path).stat().st_size, _SMALL)


def read_bytes(path: str | Path) -> bytes:
  """The content of a file without a byte order mark, unpacked if its name ends in .gz.

  Raises DataError if the file is missing or damaged, or expands out of proportion.
  """
  path = Path(path)
  if not path.is_file():
    raise DataError(f"no such data file: {path}")
  try:
    return (_unpacked(path) if path.suffix == ".gz" else path.read_bytes()).removeprefix(codecs.BOM_UTF8)
  except (OSError, EOFError, zlib.error) as error:  # the last two: a damaged .gz
    raise DataError(f"{path}: {error}") from None


def _unpacked(path: Path) -> bytes:
  limit = unpacked_limit(path)
  with gzip.open(path) as file:
    data = file.read(limit + 1)
  if len(data) > limit:
    raise DataError(f"{path} expands to more than {limit >> 20} MB, far more than its size")
  return data


def present(row: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of a row that have a value: null, which joining files of several forms leaves, is none."""
  return {key: value for key, value in row.items() if value is not None}


def parse_lines(data: bytes) -> Parsed:
  """Each line that is not blank; a bad line does not stop the others."""
  for number, line in enumerate(data.splitlines(), 1):
    if line.strip():
      try:
        yield number, _object(parse_json(line))
      except ValueError as error:
        yield number, BadRow(str(error).partition(" (")[0], str(error))


def parse_list(data: bytes) -> Parsed:
  """Each entry of one JSON list. Raises ValueError if the data is not one."""
  entries = parse_json(data)
  if not isinstance(entries, list):
    raise ValueError("expected a list of objects")
  for number, entry in enumerate(entries, 1):
    yield number, _object(entry)


def _object(value: object) -> dict | BadRow:
  if isinstance(value, dict):
    return value
  return BadRow("not an object", f"expected an object, found {type(value).__name__}")


def _strict(parsed: Iterable[tuple[int, dict | BadRow]], path: str | Path, unit: str) -> list[dict]:
  """All rows. Raises DataError for the first bad one."""
  rows: list[dict] = []
  for number, row in parsed:
    if isinstance(row, BadRow):
      raise DataError(f"{path}, {unit} {number}: {row.message}")
    rows.append(row)
  return rows


def read_jsonl(path: str | Path) -> list[dict]:
  """The rows of a file of JSON lines, plain or gzipped. Raises DataError."""
  return _strict(parse_lines(read_bytes(path)), path, "line")


def read_finished_lines(path: Path) -> list[dict]:
  """The rows of a file that a process may be appending to; [] if there is none.

  A last line without its line break is ignored: it is still being written, or a kill cut it off.
  """
  data = path.read_bytes() if path.exists() else b""
  return _strict(parse_lines(data[: data.rfind(b"\n") + 1]), path, "line")


def read_rows(path: str | Path) -> list[dict]:
  """The rows of a file: one JSON list if its name ends in .json, else JSON lines. Raises DataError."""
  if Path(path).suffix != ".json":
    return read_jsonl(path)
  data = read_bytes(path)
  try:
    parsed = list(parse_list(data))
  except ValueError as error:
    raise DataError(f"{path}: {error}") from None
  return _strict(parsed, path, "row")


def to_jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
  """One JSON object per line, in ASCII (`json_io.to_json`)."""
  return "".join(to_json(row) + "\n" for row in rows)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
  """Replaces the content of `path`, atomically."""
  write_atomic(path, to_jsonl(rows))


def append_row(path: Path, row: Mapping[str, Any]) -> None:
  """Adds a line to `path`."""
  with naming(path), open(path, "a", encoding="utf-8") as file:
    file.write(to_jsonl([row]))
