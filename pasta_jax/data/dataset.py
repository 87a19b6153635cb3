"""Annotated responses as a TFDS data set in array_record files, with statistics in its metadata.

TensorFlow is needed neither to build nor to read it. Importing this module takes a second (TFDS): import it
only where a data set is read or written.

TFDS writes the files, and could read them too, but it imports whatever module the folder's features.json
names. So `read` takes nothing from the folder but records, whose features are always the ones below.
"""

import contextlib
import itertools
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from pasta_jax.utils.json_io import parse_json, read_json
from pasta_jax.utils.jsonl import DataError, unpacked_limit
from pasta_jax.utils.text import one_line
from pasta_jax.utils.typed import Parsed, checked

Features = tfds.features
_KEPT = ("id", "prompt", "response", "source")
_TEXT = Features.Text()
_CHUNK = {"start": np.int32, "end": np.int32, "topic": _TEXT}


def _features(*, needs: bool, annotator: bool) -> tfds.features.FeaturesDict:
  texts = (*_KEPT, "annotator") if annotator else _KEPT
  chunks = Features.Sequence({**_CHUNK, "needs": _TEXT} if needs else dict(_CHUNK))
  syncs = Features.Sequence(np.int32)
  return Features.FeaturesDict({**dict.fromkeys(texts, _TEXT), "chunks": chunks, "syncs": syncs})


# Of rows, by (whether some chunks need their siblings, whether some rows name their annotator); "" where others do not.
_FEATURES = {(n, a): _features(needs=n, annotator=a) for n, a in itertools.product((False, True), repeat=2)}
_SLICE = 1024  # records that are read at a time


class Responses(tfds.core.GeneratorBasedBuilder):
  """Rows as `data.examples` describes them, by split; `figures` go into the metadata of the data set."""

  VERSION = tfds.core.Version("1.0.0")
  code_path = None  # nothing is downloaded, so there are no checksums beside the code

  def __init__(self, splits: Mapping[str, Sequence[dict]], figures: Mapping[str, Any], **more):
    self._splits, self._figures = splits, figures
    rows = [row for of_split in splits.values() for row in of_split]
    needs = any(c.get("needs") for row in rows for c in row["chunks"])
    self._row_features = _FEATURES[needs, any(row.get("annotator") for row in rows)]
    super().__init__(file_format="array_record", **more)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="Instruction responses whose independent parts are marked: PASTA's training data.",
      metadata=tfds.core.MetadataDict(self._figures),
      features=self._row_features,
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {name: self._generate_examples(rows) for name, rows in self._splits.items()}

  def _generate_examples(self, rows: Sequence[dict]):
    for row in rows:
      keys = self._row_features["chunks"].feature
      chunks = [{key: c.get(key) or "" if key == "needs" else c[key] for key in keys} for c in row["chunks"]]
      kept = {
        key: _storable(row.get(key) or "") for key in self._row_features if key not in ("chunks", "syncs")
      }
      yield kept["id"], {**kept, "chunks": chunks, "syncs": list(row["syncs"])}


def _storable(value: Any) -> str:
  """As text; lone surrogates, which no file can hold, as their escapes."""
  return str(value).encode("utf-8", "backslashreplace").decode()


def write(builder: Responses) -> None:
  """Writes the files of the data set, atomically, without the progress report of TFDS. Raises OSError, one line,
  if they cannot be written."""
  target = Path(builder.data_dir)
  for stale in target.parent.glob("incomplete.*"):  # of a build that was killed
    shutil.rmtree(stale)
  tfds.disable_progress_bar()
  with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(None):
    try:
      builder.download_and_prepare(download_dir=downloads)
    except RuntimeError as error:  # of array_record
      raise OSError(f"{target}: cannot be written ({one_line(str(error), 200)})") from None


class _Split(Parsed):
  name: str
  template: Literal["{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"] = pydantic.Field(
    alias="filepathTemplate"
  )
  lengths: list[str] = pydantic.Field(alias="shardLengths")  # rows of each file


class _Info(Parsed):
  """What dataset_info.json of a data set of --mode=build says."""

  name: Literal["responses"]
  version: Literal["1.0.0"]
  format: Literal["array_record"] = pydantic.Field(alias="fileFormat")
  splits: list[_Split]


def read(folder: Path, split: str = "train") -> list[dict]:
  """The rows of a built data set, in the order of its files.

  Raises DataError, one line, if the folder is not a data set of --mode=build, has no such split, or is
  damaged.
  """
  info, features = _info(folder)
  chosen = next((s for s in info.splits if s.name == split), None)
  if chosen is None:
    raise DataError(f"{folder} has no split {split!r}, only {', '.join(s.name for s in info.splits)}")
  if "/" in split or not all(n.isdecimal() and len(n) < 10 for n in chosen.lengths):
    raise DataError(f"{folder / 'dataset_info.json'} is damaged: split {split!r}")
  rows: list[dict] = []
  for i, length in enumerate(chosen.lengths):
    path = folder / f"{info.name}-{split}.{info.format}-{i:05d}-of-{len(chosen.lengths):05d}"
    before = len(rows)
    rows += _rows(path, features)
    if len(rows) - before != int(length):
      raise DataError(f"{path} has {len(rows) - before} rows; dataset_info.json says {int(length)}")
  return rows


def _info(folder: Path) -> tuple[_Info, tfds.features.FeaturesDict]:
  """dataset_info.json and the features of rows, after features.json was found to be as `write` leaves it."""
  found: dict[str, Any] = {}
  for name in ("dataset_info.json", "features.json"):
    if not (folder / name).is_file():
      raise DataError(f"{folder} is not a data set of --mode=build: it has no {name}")
    try:
      found[name] = read_json(folder / name)
    except ValueError as error:
      raise DataError(str(error)) from None
  known = (f for f in _FEATURES.values() if found["features.json"] == parse_json(_features_json(f)))
  if (features := next(known, None)) is None:
    raise DataError(f"{folder} is not a data set of --mode=build: features.json names other features")
  try:
    return checked(_Info, found["dataset_info.json"], str(folder / "dataset_info.json")), features
  except ValueError as error:
    raise DataError(f"{folder} is not a data set of --mode=build: {error}") from None


def _features_json(features: tfds.features.FeaturesDict) -> str:
  """features.json as TFDS writes it."""
  with tempfile.TemporaryDirectory() as folder:
    features.save_config(folder)
    return (Path(folder) / "features.json").read_text()


def _rows(path: Path, features: tfds.features.FeaturesDict) -> Iterator[dict]:
  """The rows of a file. Raises DataError if it is missing, damaged, or expands out of proportion."""
  if not path.is_file():
    raise DataError(f"no such data file: {path}")
  room = unpacked_limit(path)
  for number, record in enumerate(_records(path), 1):
    room -= len(record)
    if room < 0:
      raise DataError(f"{path} expands to far more than its size")
    try:
      row = _row(features.deserialize_example_np(record))
    except Exception as error:  # whatever the library raises for bytes that are no example
      raise DataError(f"{path}, row {number}: {one_line(repr(error))}") from None
    yield row


def _records(path: Path) -> Iterator[bytes]:
  try:
    reader = ArrayRecordReader(str(path), "readahead_buffer_size:0")
    try:
      for start in range(0, reader.num_records(), _SLICE):
        yield from reader.read(start, min(start + _SLICE, reader.num_records()))
    finally:
      reader.close()
  except RuntimeError as error:  # what the library raises for any damage
    raise DataError(f"{path}: {one_line(str(error))}") from None


def _row(example: Mapping[str, Any]) -> dict:
  chunks = example["chunks"]
  needs = chunks.get("needs", [b""] * len(chunks["start"]))
  return {
    **{key: example[key].decode() for key in _KEPT},
    **({"annotator": name.decode()} if (name := example.get("annotator")) else {}),
    "chunks": [
      {"start": int(a), "end": int(b), "topic": topic.decode()} | ({"needs": need.decode()} if need else {})
      for a, b, topic, need in zip(chunks["start"], chunks["end"], chunks["topic"], needs)
    ],
    "syncs": [int(s) for s in example["syncs"]],
  }
