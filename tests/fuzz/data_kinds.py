"""Kinds of damaged input for the readers of data: rows of every form, tables, built data sets."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from fuzz.harness import Kind
from pasta_jax.data.examples import mix, program_of, read_annotated
from pasta_jax.data.prompts import read_prompts
from pasta_jax.data.sources import read_instructions
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


def _turns(who: str, what: str, *said: str) -> list[dict]:
  roles = ("system", "human", "gpt") if who == "from" else ("system", "user", "assistant")
  return [{who: role, what: text} for role, text in zip(roles, said)]


INSTRUCTIONS = [
  {"id": 1, "prompt": "a", "response": TEXT, "date": None, "score": 0.5, "tags": ["x", {"y": [1]}]},
  {"instruction": "b", "input": "c", "output": TEXT},
  {"conversations": _turns("from", "value", "Be brief.", "d", TEXT)},
  {"messages": _turns("role", "content", "", "e", TEXT), "prompt": None},
]
PROMPTS = [
  {"id": "a", "prompt": "x", "category": "c"},
  {"question_id": 2, "turns": ["y", "z"]},
  {"instruction": "w"},
]
PREFERENCES = [
  {"id": 1, "system": "pasta", "preference": 0.5},
  {"instruction": "x", "generator_1": "baseline", "generator_2": "pasta", "preference": 1.5},
]
LABELS = [{"id": "a", "prompt": "x", "chosen": "y", "rejected": "z", "category": None}]
LENGTHS = [
  {"id": "a", "baseline_chars": 9, "preference": {"m": 0.5, "n": None}, "output_chars": {"m": 3, "n": 4}}
]


def _rows(path: Path, rows: list[dict]) -> None:
  lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
  content = {".json": json.dumps(rows, indent=1).encode(), ".gz": gzip.compress(lines, mtime=0)}
  path.write_bytes(content.get(path.suffix, lines))


def _arrow(path: Path) -> None:
  """Columns of many types, in the format that the name asks for."""
  rows = [row | {"score": 0.5, "raw": b"\xff", "none": None} for row in ANNOTATED]
  table = pa.Table.from_pylist(rows)
  table = table.append_column("at", pa.array(range(len(rows)), pa.timestamp("us")))
  table = table.append_column("word", pa.array([row["source"] for row in rows]).dictionary_encode())
  if path.suffix == ".parquet":
    pyarrow.parquet.write_table(table, path)
    return
  new = pa.ipc.new_file if path.stem == "file" else pa.ipc.new_stream
  with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as out:
    out.write_table(table)


def saved(folder: Path) -> None:
  """A folder as `datasets` saves it."""
  (folder / "saved").mkdir()
  _arrow(folder / "saved" / "data-00000-of-00001.arrow")
  state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "0", "_split": "train"}
  (folder / "saved" / "state.json").write_text(json.dumps(state))


def built(folder: Path) -> None:
  from pasta_jax.data import dataset  # here: TFDS takes a second

  splits = {"train": ANNOTATED, "validation": ANNOTATED[:2]}
  dataset.write(dataset.Responses(splits, {}, data_dir=str(folder)))


def read_source(path: Path) -> None:
  """As --mode=annotate and --mode=build do: rows, their programs, and JSON of them."""
  for row in read_instructions(path).rows:
    parse_json(to_json(row))
    try:
      program_of(row)
    except DataError:
      pass  # --mode=build counts it


def read_training(path: str) -> None:
  for row in mix([path]):
    program_of(row)


def read_figures(folder: Path) -> None:
  for name in ("preferences.json", "preferences.jsonl"):
    FileJudge(str(folder / name), "baseline")
  pairs_of_labels(str(folder / "labels.jsonl"))
  read_preferences(folder / "lengths.jsonl")
  read_difficulty(folder / "difficulty.jsonl")


def _of(files: dict[str, list[dict]], load: Callable[[Path], object], **more) -> Kind:
  """Rows in files of several forms."""
  return Kind(
    lambda folder: [_rows(folder / n, rows) for n, rows in files.items()], load, list(files), **more
  )


def _named(*names: str) -> dict[str, Callable[[Path], object]]:
  """`make` and `load` of tables."""
  return {
    "make": lambda folder: [_arrow(folder / n) for n in names],
    "load": lambda folder: [read_source(folder / n) for n in names],
  }


_SOURCES = dict.fromkeys(("rows.jsonl", "rows.json", "rows.jsonl.gz"), INSTRUCTIONS)
_FIGURES = {
  **dict.fromkeys(("preferences.jsonl", "preferences.json"), PREFERENCES),
  "labels.jsonl": LABELS,
  "lengths.jsonl": LENGTHS,
  "difficulty.jsonl": [{"id": 1, "difficulty": 0.5}],
}
KINDS = {
  "instructions": _of(_SOURCES, lambda folder: [read_source(folder / n) for n in _SOURCES], share=2),
  "annotated": _of({"a.jsonl": ANNOTATED}, lambda folder: read_training(str(folder / "a.jsonl"))),
  "annotated_gz": _of({"a.jsonl.gz": ANNOTATED}, lambda folder: read_annotated(str(folder / "a.jsonl.gz"))),
  "prompts": _of(
    dict.fromkeys(("p.jsonl", "p.json"), PROMPTS),
    lambda folder: [read_prompts(str(folder / n)) for n in ("p.jsonl", "p.json")],
  ),
  "figures": _of(_FIGURES, read_figures),
  "parquet": Kind(**_named("rows.parquet"), damage=["*.parquet"], share=2),
  "arrow": Kind(**_named("stream.arrow", "file.arrow"), damage=["*.arrow"], share=2),
  "datasets_folder": Kind(saved, lambda folder: read_source(folder / "saved"), ["saved/*"]),
  "built": Kind(built, lambda folder: read_training(f"{folder}/responses/1.0.0"), ["responses/1.0.0/*"], 2),
}
