"""Instructions from files of several forms: every row is used, or counted and named."""

import gzip
import json
from pathlib import Path

import pytest

from pasta_jax.data.sources import LONGEST, decontaminate, ngrams, read_instructions
from pasta_jax.utils.jsonl import DataError, read_rows


def write(path: Path, *rows) -> Path:
  path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
  return path


def test_forms_that_are_known_by_name(tmp_path: Path):
  turns = lambda *said: [{"from": who, "value": text} for who, text in said]
  source = read_instructions(
    write(
      tmp_path / "a.jsonl",
      {"id": 7, "prompt": "p", "response": "r", "more": 1},
      {"instruction": "i", "input": "", "output": "o"},
      {"instruction": "i", "input": "given", "output": "o"},
      {"conversations": turns(("system", "Be kind."), ("human", "h"), ("gpt", "g"))},
      {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
    )
  )
  assert [(r["prompt"], r["response"]) for r in source.rows] == [
    ("p", "r"),
    ("i", "o"),
    ("i\n\ngiven", "o"),
    ("Be kind.\n\nh", "g"),
    ("u", "a"),
  ]
  assert [r["id"] for r in source.rows] == ["7", "a-2", "a-3", "a-4", "a-5"] and source.rows[0]["more"] == 1
  assert not source.faults
  (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
  assert len(read_instructions(tmp_path / "b.jsonl.gz").rows) == 5
  (tmp_path / "c.json").write_text(json.dumps([{"instruction": "i", "output": "o"}]))
  assert read_instructions(tmp_path / "c.json").rows[0]["prompt"] == "i"


def test_bad_rows_are_counted_and_named(tmp_path: Path):
  good = {"id": "a", "prompt": "p", "response": "r"}
  source = read_instructions(
    write(
      tmp_path / "a.jsonl",
      good,
      b"{",
      b'{"prompt": "\xff", "response": "r"}',
      [1],
      good,
      {"prompt": " ", "response": "r"},
      {"prompt": "p", "response": None},
      {"prompt": "p", "response": "x" * (LONGEST + 1)},
      {"conversations": [{"from": "human", "value": "h"}]},
      {"conversations": "x"},
      {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}] * 2},
      b'{"prompt": "\\ud800", "response": "r"}',
      b"",
      {"prompt": "p", "response": ""},
    )
  )
  assert [r["id"] for r in source.rows] == ["a"]
  assert source.counts() == {
    "not JSON": 1,
    "not UTF-8": 1,
    "not an object": 1,
    "an id that another row has": 1,
    "no prompt": 1,
    "no response": 2,
    f"more than {LONGEST:,} characters": 1,
    "a conversation of several turns": 2,
    "a malformed conversation": 1,
    "invalid Unicode": 1,
  }
  assert source.faults["not JSON"] == ["a.jsonl, row 2"]
  assert source.faults["an id that another row has"] == ["a.jsonl, row 5 (a)"]


def test_unusable_files_are_one_line(tmp_path: Path):
  (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}" * 1000)[:30])
  (tmp_path / "list.json").write_text("[{")
  for name, message in (
    ("none.jsonl", "no such data file"),
    ("cut.jsonl.gz", "cut.jsonl.gz: "),
    ("list.json", "list.json: "),
  ):
    with pytest.raises(DataError, match=message):
      read_instructions(tmp_path / name)
  with pytest.raises(DataError, match=r"contains no row with an instruction and a response \(1 no prompt\)"):
    read_instructions(write(tmp_path / "bad.jsonl", {"response": "r"}))
  with pytest.raises(DataError, match="it is empty"):
    read_instructions(write(tmp_path / "empty.jsonl"))


def test_rows_that_share_words_with_an_evaluation_are_named(tmp_path: Path):
  long = "Please tell me which of the seven wonders of the world still stands today."
  source = read_instructions(
    write(
      tmp_path / "a.jsonl",
      {"prompt": f"Well: {long.upper()}", "response": "r"},
      {"prompt": "Write a poem!", "response": "r"},
      {"prompt": "Write a poem about one of the seven wonders of the world.", "response": "r"},
    )
  )
  decontaminate(source, [long, "write a poem"])
  assert [r["id"] for r in source.rows] == ["a-3"]
  assert source.faults == {"shares words with an evaluation prompt": ["a-1", "a-2"]}
  assert ngrams("A b, c!", 2) == {"a b", "b c"} and ngrams("?") == set()


def test_null_is_absent(tmp_path: Path):
  """Joining files of several forms leaves the fields of each as null in the rows of the others."""
  nothing = dict.fromkeys(
    ("id", "prompt", "response", "instruction", "input", "output", "conversations", "messages")
  )
  turn = lambda who, text: {"from": None, "value": None, "role": who, "content": text}
  source = read_instructions(
    write(
      tmp_path / "a.jsonl",
      nothing | {"prompt": "p", "response": "r"},
      nothing | {"instruction": "i", "output": "o", "id": "own"},
      nothing | {"messages": [turn("user", "u"), turn("assistant", "a")], "chunks": None, "syncs": None},
      nothing,
    )
  )
  assert [(r["id"], r["prompt"], r["response"]) for r in source.rows] == [
    ("a-1", "p", "r"),
    ("own", "i", "o"),
    ("a-3", "u", "a"),
  ]
  assert source.counts() == {"no prompt": 1} and "chunks" not in source.rows[2]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str):
  row = {"prompt": "p", "response": "r"}
  data = (
    b"\xef\xbb\xbf" + (json.dumps([row, row]) if name == "a.json" else f"{json.dumps(row)}\n" * 2).encode()
  )
  (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
  source = read_instructions(tmp_path / name)
  assert len(source.rows) == 2 and not source.faults
  assert read_rows(tmp_path / name)[0] == row


def test_rows_that_no_reader_can_hold_are_counted_and_named(tmp_path: Path):
  good = {"prompt": "p", "response": "r"}
  source = read_instructions(
    write(
      tmp_path / "a.jsonl",
      good,
      b'{"prompt": "p", "response": "r", "n": ' + b"9" * 5000 + b"}",
      b'{"prompt": "p", "response": "r", "n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
      b'{"prompt": "p", "response": "r\\udc00"}',
      b'{"prompt": "p", "response": "r", "source": "page \\ud83d cut", "n": NaN}',
    )
  )
  assert [r["id"] for r in source.rows] == ["a-1", "a-5"] and source.rows[1]["source"] == "page \ud83d cut"
  assert source.faults == {
    "not usable JSON": ["a.jsonl, row 2"],
    "nested too deeply": ["a.jsonl, row 3"],
    "invalid Unicode": ["a.jsonl, row 4"],
  }
