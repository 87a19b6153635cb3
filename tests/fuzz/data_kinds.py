"""What data files are mutated from, and how each is read: rows of every form, tables, built data sets.

A kind makes a small valid file or folder, and reads one as the modes do. Reading may raise ValueError or
OSError, one line that names the file; anything else is a fault. Arrow and array_record files are read by
native code, which may end the process: read them in a child.
"""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet

from pasta_jax.data.examples import mix, program_of, read_annotated
from pasta_jax.data.prompts import read_prompts
from pasta_jax.data.sources import read_instructions
from pasta_jax.evaluate.errors import EvalError
from pasta_jax.evaluate.judges.agreement import pairs_of_labels
from pasta_jax.evaluate.judges.files import FileJudge
from pasta_jax.evaluate.metrics.length_control import read_difficulty, read_preferences
from pasta_jax.utils.json_io import parse_json, to_json
from pasta_jax.utils.jsonl import DataError

TEXT = "Three ideas.\n\n1. Walk more: it is free.\n2. Sleep early: it helps.\n3. Drink water: it is near.\n"
CHUNKS = [{"start": 14, "end": 40, "topic": "walk"}, {"start": 40, "end": 66, "topic": "sleep"}]
ANNOTATED = [
  {"id": f"r{i}", "prompt": f"Ideas {i}?", "response": TEXT, "chunks": CHUNKS, "syncs": [66], "source": "é"}
  for i in range(6)
]


class DataKind(NamedTuple):
  """A form of data."""

  name: str  # of the file or folder
  make: Callable[[Path], None]  # writes a valid one
  read: Callable[[Path], object]  # as the modes read it
  native: bool = False  # read by native code


def _turns(who: str, what: str, *said: str) -> list[dict]:
  roles = ("system", "human", "gpt") if who == "from" else ("system", "user", "assistant")
  return [{who: role, what: text} for role, text in zip(roles, said)]


INSTRUCTIONS = [
  {"id": 1, "prompt": "a", "response": TEXT, "date": None, "score": 0.5, "tags": ["x", {"y": [1]}]},
  {"instruction": "b", "input": "c", "output": TEXT},
  {"conversations": _turns("from", "value", "Be brief.", "d", TEXT)},
  {"messages": _turns("role", "content", "", "e", TEXT), "prompt": None},
]
PROMPTS = [{"id": "a", "prompt": "x", "category": "c"}, {"question_id": 2, "turns": ["y", "z"]}, {"instruction": "w"}]
PREFERENCES = [
  {"id": 1, "system": "pasta", "preference": 0.5},
  {"instruction": "x", "generator_1": "baseline", "generator_2": "pasta", "preference": 1.5},
]
LABELS = [{"id": "a", "prompt": "x", "chosen": "y", "rejected": "z", "category": None}]
LENGTHS = [{"id": "a", "baseline_chars": 9, "preference": {"m": 0.5, "n": None}, "output_chars": {"m": 3, "n": 4}}]


def _lines(rows: list[dict]) -> Callable[[Path], None]:
  return lambda path: path.write_text("".join(json.dumps(r) + "\n" for r in rows)) and None


def _list(rows: list[dict]) -> Callable[[Path], None]:
  return lambda path: path.write_text(json.dumps(rows, indent=1)) and None


def _gzip(rows: list[dict]) -> Callable[[Path], None]:
  text = "".join(json.dumps(r) + "\n" for r in rows)
  return lambda path: path.write_bytes(gzip.compress(text.encode(), mtime=0)) and None


def _table() -> pa.Table:
  rows = [r | {"score": 0.5, "raw": b"\xff", "kind": "k"} for r in ANNOTATED]
  table = pa.Table.from_pylist(rows)
  table = table.append_column("at", pa.array(range(len(rows)), pa.timestamp("us")))
  return table.append_column("word", pa.array([r["source"] for r in rows]).dictionary_encode())


def _arrow(new: Callable) -> Callable[[Path], None]:
  def make(path: Path) -> None:
    table = _table()
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as out:
      out.write_table(table)

  return make


def _saved(folder: Path) -> None:
  """A folder as `datasets` saves it."""
  folder.mkdir()
  _arrow(pa.ipc.new_stream)(folder / "data-00000-of-00001.arrow")
  state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "0", "_split": "train"}
  (folder / "state.json").write_text(json.dumps(state))


def _built(folder: Path) -> None:
  from pasta_jax.data import dataset

  scratch = folder.parent / "scratch"
  dataset.write(dataset.Responses({"train": ANNOTATED, "validation": ANNOTATED[:2]}, {}, data_dir=str(scratch)))
  (scratch / "responses" / "1.0.0").rename(folder)


def _instructions(path: Path) -> None:
  """As --mode=annotate and --mode=build do: rows, programs, and JSON that can be written and read back."""
  for row in read_instructions(path).rows:
    try:
      program_of(row)
    except DataError:
      pass  # --mode=build counts it
    parse_json(to_json(row))


def _training(path: Path) -> None:
  for row in mix([str(path)]):
    program_of(row)


def _judge(path: Path) -> None:
  FileJudge(str(path), "baseline")


KINDS = (
  DataKind("rows.jsonl", _lines(INSTRUCTIONS), _instructions),
  DataKind("list.json", _list(INSTRUCTIONS), _instructions),
  DataKind("rows.jsonl.gz", _gzip(INSTRUCTIONS), _instructions),
  DataKind("annotated.jsonl", _lines(ANNOTATED), _training),
  DataKind("annotated.jsonl.gz", _gzip(ANNOTATED), lambda path: read_annotated(str(path))),
  DataKind("prompts.jsonl", _lines(PROMPTS), lambda path: read_prompts(str(path))),
  DataKind("prompts.json", _list(PROMPTS), lambda path: read_prompts(str(path))),
  DataKind("preferences.jsonl", _lines(PREFERENCES), _judge),
  DataKind("preferences.json", _list(PREFERENCES), _judge),
  DataKind("labels.jsonl", _lines(LABELS), lambda path: pairs_of_labels(str(path))),
  DataKind("lengths.jsonl", _lines(LENGTHS), read_preferences),
  DataKind("difficulty.jsonl", _lines([{"id": 1, "difficulty": 0.5}]), read_difficulty),
  DataKind("rows.parquet", lambda path: pyarrow.parquet.write_table(_table(), path), _instructions, native=True),
  DataKind("stream.arrow", _arrow(pa.ipc.new_stream), _instructions, native=True),
  DataKind("file.arrow", _arrow(pa.ipc.new_file), _instructions, native=True),
  DataKind("saved", _saved, _instructions, native=True),
  DataKind("built", _built, _training, native=True),
)
ERRORS = (ValueError, OSError)  # EvalError and DataError among them
assert issubclass(EvalError, ERRORS) and issubclass(DataError, ERRORS)
