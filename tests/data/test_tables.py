"""Parquet and Arrow files and folders of them: every value is JSON, only the files of a data set are read,
and nothing of a damaged or bloated file is."""

import datetime
import decimal
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from pasta_jax.data.sources import read_instructions
from pasta_jax.data.tables import read_tables
from pasta_jax.utils.json_io import parse_json, to_json
from pasta_jax.utils.jsonl import DataError

DAY = datetime.datetime(2024, 5, 1, 12, 30, tzinfo=datetime.UTC)
UUID = b"0123456789abcdef"
COLUMNS = {  # by name: an array of one value, and what a row has
  "text": (pa.array(["é"]), "é"),
  "integer": (pa.array([7]), 7),
  "timestamp": (pa.array([DAY]), "2024-05-01T12:30:00+00:00"),
  "year 292,277": (pa.array([2**62], pa.timestamp("us")), None),
  "no such zone": (pa.array([1], pa.timestamp("s", "No/Where")), None),
  "date": (pa.array([DAY.date()]), "2024-05-01"),
  "decimal": (pa.array([decimal.Decimal("1.50")]), "1.50"),
  "text in bytes": (pa.array([b"abc"]), "abc"),
  "bytes": (pa.array([b"\x89PNG"]), "iVBORw=="),
  "identifier": (pa.ExtensionArray.from_storage(pa.uuid(), pa.array([UUID], pa.binary(16))),
                 "30313233-3435-3637-3839-616263646566"),
  "duration": (pa.array([datetime.timedelta(hours=1)]), "1:00:00"),
  "NaN": (pa.array([math.nan]), None),
  "infinity": (pa.array([-math.inf], pa.float32()), None),
  "number": (pa.array([0.5]), 0.5),
  "word of a list": (pa.array(["a"]).dictionary_encode(), "a"),
  "nested": (pa.array([{"at": DAY, "l": [math.nan, 1.0]}]), {"at": "2024-05-01T12:30:00+00:00", "l": [None, 1.0]}),
  "pairs": (pa.array([[("k", b"\xff")]], pa.map_(pa.string(), pa.binary())), [["k", "/w=="]]),
  "null": (pa.array([None]), None),
}  # fmt: skip


def write(path: Path, table: pa.Table) -> Path:
  if path.suffix == ".parquet":
    pyarrow.parquet.write_table(table, path, compression="zstd")
  else:
    new = pa.ipc.new_file if path.stem.endswith("file") else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as out:
      out.write_table(table)
  return path


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
def test_every_column_becomes_json(tmp_path: Path, name: str):
  columns = {k: v for k, v in COLUMNS.items() if k != "duration" or name != "a.parquet"}
  (row,) = read_tables(write(tmp_path / name, pa.table({k: v for k, (v, _) in columns.items()})))
  assert row == {k: plain for k, (_, plain) in columns.items()}
  assert parse_json(to_json(row)) == row


def test_the_files_of_a_folder(tmp_path: Path):
  table = pa.table({"prompt": ["a", "b", "c"], "response": ["x", "y", "z"]})
  saved, spark, plain = (tmp_path / n for n in ("saved", "out.parquet", "plain"))
  for folder in (saved, spark, plain):
    folder.mkdir()
  write(saved / "data-00000-of-00001.arrow", table)
  write(plain / "a.arrow", table)
  for folder in (saved, plain):  # what `map` and `filter` leave beside the data
    write(folder / "cache-468e6c4a890d5277.arrow", table)
    write(folder / "tmp1234.arrow", table)
  state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "0", "_indices": None}
  (saved / "state.json").write_text(json.dumps(state))
  write(spark / "part-00000-ab.snappy.parquet", table)
  (spark / "_SUCCESS").touch()
  (spark / ".part-00000-ab.snappy.parquet.crc").write_bytes(b"crc")
  write(spark / ".part-00001-ab.snappy.parquet", table)  # not finished
  for folder in (saved, spark, plain):
    assert [r["prompt"] for r in read_instructions(folder).rows] == ["a", "b", "c"]
  for content, message in (
    ('{"_data_files": [{"filename": "../plain/a.arrow"}]}', "no .arrow file beside it"),
    ('{"_data_files": [{"filename": "/etc/passwd"}]}', "no .arrow file beside it"),
    ('{"_data_files": [{"filename": "data-1.arrow"}]}', "no such data file: .*data-1.arrow"),
    ('{"_data_files": []}', "names no data file"),
    ('{"_data_files": 3}', "state.json: _data_files must be a valid list"),
    ("[]", "state.json: not a JSON object"),
    ("{", "state.json: not JSON"),
    (json.dumps(state | {"_indices_data_files": [{"filename": "i.arrow"}]}), "selects rows by indices"),
  ):
    (saved / "state.json").write_text(content)
    with pytest.raises(DataError, match=message) as error:
      list(read_tables(saved))
    assert str(saved) in str(error.value) and "\n" not in str(error.value)


BLOATED = {  # files of a few kilobytes that would fill a memory
  "rows.parquet": lambda: pa.table({"prompt": pa.nulls(30_000_000, pa.int8())}),
  "text.parquet": lambda: pa.table({"prompt": pa.DictionaryArray.from_arrays([0] * 2000, ["x" * 100_000])}),
  "value.parquet": lambda: pa.table({"prompt": ["x" * (65 << 20)]}),
  "rows.arrow": lambda: pa.table({"prompt": pa.Array.from_buffers(pa.null(), 2**31 - 1, [None])}),
  "text.arrow": lambda: pa.table({"prompt": pa.DictionaryArray.from_arrays([0] * 20_000, ["x" * 100_000])}),
}


@pytest.mark.parametrize("name", BLOATED)
def test_what_expands_out_of_proportion_is_refused(tmp_path: Path, name: str):
  path = write(tmp_path / name, BLOATED[name]())
  assert path.stat().st_size < 1 << 20
  with pytest.raises(DataError, match=f"{name} expands to far more than its size"):
    sum(1 for _ in read_tables(path))


READ = """
import sys
from pathlib import Path
from pasta_jax.data.tables import read_tables
for name in sys.argv[1:]:
  try:
    print(len(repr(list(read_tables(Path(name))))) > 0)
  except ValueError as error:
    assert name in str(error), str(error)
    print(error)
print("alive")
"""


def test_damaged_arrow_files_cannot_crash(tmp_path: Path):
  """Offsets that point outside a buffer end a process that reads values before it validates them."""
  table = pa.table(
    {"prompt": [f"prompt {i}" * 5 for i in range(40)], "response": ["r" * i for i in range(40)]}
  )
  whole = write(tmp_path / "whole.arrow", table).read_bytes()
  rng = random.Random(0)
  names = []
  for i in range(60):
    data = bytearray(whole)
    for _ in range(3):
      at = rng.randrange(len(data) - 4)
      data[at : at + 4] = rng.choice([b"\xff\xff\xff\x7f", b"\0\0\0\x40", rng.randbytes(4)])
    names.append(str(tmp_path / f"{i}.arrow"))
    Path(names[-1]).write_bytes(data)
  run = subprocess.run([sys.executable, "-c", READ, *names], capture_output=True, text=True, timeout=120)
  assert run.returncode == 0 and run.stdout.endswith("alive\n"), run.stderr
