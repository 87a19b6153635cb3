"""Rows of JSON lines: what is read, what is refused and how it is named."""

import gzip
import json
from pathlib import Path

import pytest

from pasta_jax.utils.jsonl import (
  BadRow,
  DataError,
  append_row,
  parse_lines,
  read_bytes,
  read_finished_lines,
  read_jsonl,
  read_rows,
  write_jsonl,
)

ROWS = [{"id": "é", "text": "a\nb\u2028c\r"}, {"id": 2, "list": [1.5, None]}]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_written_rows_are_read_back(tmp_path: Path, name: str):
  path = tmp_path / name
  write_jsonl(tmp_path / "plain.jsonl", ROWS)
  data = (tmp_path / "plain.jsonl").read_bytes()
  assert data.isascii() and data.count(b"\n") == 2
  path.write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
  assert read_jsonl(path) == ROWS and read_rows(path) == ROWS


def test_line_breaks_and_blank_lines():
  data = b'\n{"id": 1}\r\n \t\r{"id": 2}\n\n{"id": 3}'
  assert list(parse_lines(data)) == [(2, {"id": 1}), (4, {"id": 2}), (6, {"id": 3})]


def test_a_bad_line_does_not_stop_the_others():
  found = list(parse_lines(b'{"id": \n{"id": "\xff"}\n[1]\n"x"\n{"id": 5}\n'))
  assert [row.cause if isinstance(row, BadRow) else row for _, row in found] == [
    "not JSON",
    "not UTF-8",
    "not an object",
    "not an object",
    {"id": 5},
  ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{}\n\n{"a"', ", line 3: not JSON (Expecting ':' delimiter"),
        ("x.jsonl", b'[{"a": 1}]', ", line 1: expected an object, found list"),
        ("x.jsonl", b"{}\n\xff", ", line 2: not UTF-8 (invalid start byte at byte 0)"),
        ("x.json", b'{"a": 1}', ": expected a list of objects"),
        ("x.json", b"[{", ": not JSON (Expecting property name"),
        ("x.json", b"[{}, 3]", ", row 2: expected an object, found int"),
        ("x.jsonl.gz", b"{}", ": Not a gzipped file"),
        ("x.jsonl.gz", gzip.compress(b"{}", mtime=0)[:-4], ": Compressed file ended"),
    ],
)  # fmt: skip
def test_unusable_files_are_one_line(tmp_path: Path, name: str, content: bytes, message: str):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(DataError) as error:
    read_rows(tmp_path / name)
  assert str(error.value).startswith(f"{tmp_path / name}{message}") and "\n" not in str(error.value)


def test_missing_files(tmp_path: Path):
  for read in (read_bytes, read_jsonl, read_rows):
    with pytest.raises(DataError, match="^no such data file: .*none.json$"):
      read(tmp_path / "none.json")
  assert read_finished_lines(tmp_path / "none.json") == []


def test_a_json_list(tmp_path: Path):
  (tmp_path / "x.json").write_text(json.dumps(ROWS))
  assert read_rows(tmp_path / "x.json") == ROWS


def test_an_unfinished_line_is_ignored(tmp_path: Path):
  path = tmp_path / "x.jsonl"
  append_row(path, ROWS[0])
  append_row(path, ROWS[1])
  data = path.read_bytes()
  for cut in range(len(data) + 1):
    path.write_bytes(data[:cut])
    assert read_finished_lines(path) == ROWS[: data[:cut].count(b"\n")]
  path.write_bytes(b"{\n" + data)
  with pytest.raises(DataError, match="line 1: not JSON"):
    read_finished_lines(path)


def test_what_expands_out_of_proportion_is_refused(tmp_path: Path):
  path = tmp_path / "x.jsonl.gz"
  path.write_bytes(gzip.compress(bytes(65 << 20), 1))
  with pytest.raises(DataError, match="x.jsonl.gz expands to more than 64 MB, far more than its size"):
    read_jsonl(path)
  path.write_bytes(gzip.compress(b"{}\n" * (8 << 20), 1))  # within bounds, however well it compresses
  assert len(read_bytes(path)) == 24 << 20
