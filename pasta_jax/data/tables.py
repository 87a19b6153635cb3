"""Rows of tables: parquet files, Arrow files, and folders of them, as plain JSON values.

A folder is one that Hugging Face's `datasets` saved (its state.json names the files; what was cached later
lies beside them), or any folder of .arrow or .parquet files, such as Spark writes.

Arrow's readers trust a file's offsets and lengths. So every batch is validated before a value of it is read,
and a file that expands far beyond its size is refused.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet
import pydantic

from pasta_jax.utils.json_io import parse_json, read_json, to_json
from pasta_jax.utils.jsonl import DataError, unpacked_limit
from pasta_jax.utils.text import one_line
from pasta_jax.utils.typed import Parsed, checked

_MAGIC = b"ARROW1"  # of an Arrow file; a stream has none
_ROWS = 256  # rows of a batch: what one value that is repeated can fill
_ROW = 100  # bytes that a row takes at least, however little of the file it is


def read_tables(path: Path) -> Iterator[dict[str, Any]]:
  """The rows of a file or folder, in the order of the files' names.

  Raises DataError, one line, if there is no such file or one of them cannot be read.
  """
  files = _files(path) if path.is_dir() else [path]
  for file in files:
    if not file.is_file():
      raise DataError(f"no such data file: {file}")
    yield from _rows(file)


class _DataFile(Parsed):
  filename: str


class _State(Parsed):
  """What state.json of `datasets` says."""

  files: list[_DataFile] = pydantic.Field(alias="_data_files")
  indices: list[_DataFile] | None = pydantic.Field(None, alias="_indices_data_files")


def _files(folder: Path) -> list[Path]:
  """The files of a folder that hold its rows."""
  if (folder / "state.json").is_file():
    return _saved_files(folder)
  for suffix in (".arrow", ".parquet"):
    # Hidden files are checksums and unfinished ones; `datasets` caches what was computed from the rows.
    names = sorted(f for f in folder.glob(f"*{suffix}") if not f.name.startswith((".", "_", "cache-", "tmp")))
    if names:
      return names
  raise DataError(f"{folder} contains no .arrow or .parquet file")


def _saved_files(folder: Path) -> list[Path]:
  """The data files that state.json names. Raises DataError if it names none, or files elsewhere."""
  where = folder / "state.json"
  try:
    state = checked(_State, read_json(where), str(where))
  except ValueError as error:
    raise DataError(str(error)) from None
  names = [f.filename for f in state.files]
  if wrong := [n for n in names if not n.endswith(".arrow") or Path(n).name != n]:
    raise DataError(f"{where} names {wrong[0]!r}, which is no .arrow file beside it")
  if not names:
    raise DataError(f"{where} names no data file")
  if state.indices:
    raise DataError(f"{where} selects rows by indices: save the folder again with a newer `datasets`")
  return [folder / n for n in names]


def _rows(file: Path) -> Iterator[dict[str, Any]]:
  room = unpacked_limit(file)
  try:
    for batch in _batches(file):
      batch.validate(full=True)
      room -= _ROW * batch.num_rows
      for start in range(0, batch.num_rows if room >= 0 else 1, _ROWS):
        for row in _values(batch.slice(start, _ROWS)):
          room -= sum(len(v) for v in row.values() if isinstance(v, str))
          yield row
        if room < 0:
          raise DataError(f"{file} expands to far more than its size")
  except (pa.ArrowException, OSError, ValueError, NotImplementedError) as error:
    if isinstance(error, DataError):
      raise
    raise DataError(f"{file}: {one_line(str(error))}") from None


def _batches(file: Path) -> Iterable[pa.RecordBatch]:
  """The batches of a parquet file, or of an Arrow file or stream."""
  if file.suffix == ".parquet":
    table = pyarrow.parquet.ParquetFile(file)
    about = table.metadata
    unpacked = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
    if max(unpacked, _ROW * about.num_rows) > unpacked_limit(file):
      raise DataError(
        f"{file} expands to far more than its size: {about.num_rows:,} rows, {unpacked >> 20:,} MB"
      )
    yield from table.iter_batches(batch_size=_ROWS)
    return
  with pa.memory_map(str(file)) as source:
    if source.read(len(_MAGIC)) == _MAGIC:
      reader = pyarrow.ipc.open_file(source)
      yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
      source.seek(0)
      yield from pyarrow.ipc.open_stream(source)


def _values(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
  """The rows of a batch; values that are no JSON (dates, decimals, bytes, NaN) as text or null."""
  for values in zip(*map(_column, batch.columns)):
    yield dict(zip(batch.schema.names, values))


def _column(column: pa.Array) -> list[Any]:
  if _is_json(column.type) and _is_finite(column):
    return column.to_pylist()
  return [_plain(value) for value in column]


def _is_json(kind: pa.DataType) -> bool:
  """Whether every value of a type, if it is finite, is a JSON value as Python has it."""
  if pa.types.is_struct(kind):
    return all(_is_json(kind.field(i).type) for i in range(kind.num_fields))
  if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_dictionary(kind):
    return _is_json(kind.value_type)
  t = pa.types
  is_any = (t.is_string, t.is_large_string, t.is_integer, t.is_boolean, t.is_null, t.is_float32, t.is_float64)
  return any(is_it(kind) for is_it in is_any)


def _is_finite(column: pa.Array) -> bool:
  """Whether no number of a column of such a type is NaN or infinite."""
  if pa.types.is_floating(column.type):
    return pc.all(pc.is_finite(column)).as_py() is not False  # None: no numbers
  if pa.types.is_struct(column.type):
    return all(map(_is_finite, column.flatten()))
  if pa.types.is_dictionary(column.type):
    return _is_finite(column.dictionary)
  is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
  return not is_list or _is_finite(column.flatten())


def _plain(value: pa.Scalar) -> Any:
  """A value as JSON has it; None for one that Python has no value for, such as the year 10,000."""
  try:
    return parse_json(to_json(value.as_py()))
  except Exception:  # each type of column raises errors of its own
    return None
