"""Annotated responses as a TFDS data set in array_record files, with statistics in its metadata.

TensorFlow is needed neither to build nor to read it. Importing this module takes a second (TFDS): import it
only where a data set is read or written.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from pasta_jax.utils.jsonl import DataError

Features = tfds.features
_KEPT = ("id", "prompt", "response", "source")


class Responses(tfds.core.GeneratorBasedBuilder):
  """Rows as `data.examples` describes them, by split; `figures` go into the metadata of the data set."""

  VERSION = tfds.core.Version("1.0.0")
  code_path = None  # nothing is downloaded, so there are no checksums beside the code

  def __init__(self, splits: Mapping[str, Sequence[dict]], figures: Mapping[str, Any], **more):
    self._splits, self._figures = splits, figures
    super().__init__(file_format="array_record", **more)

  def _info(self) -> tfds.core.DatasetInfo:
    text = Features.Text()
    return tfds.core.DatasetInfo(
      builder=self,
      description="Instruction responses whose independent parts are marked: PASTA's training data.",
      metadata=tfds.core.MetadataDict(self._figures),
      features=Features.FeaturesDict(
        {
          **dict.fromkeys(_KEPT, text),
          "chunks": Features.Sequence({"start": np.int32, "end": np.int32, "topic": text}),
          "syncs": Features.Sequence(np.int32),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {name: self._generate_examples(rows) for name, rows in self._splits.items()}

  def _generate_examples(self, rows: Sequence[dict]):
    for row in rows:
      chunks = [{key: c[key] for key in ("start", "end", "topic")} for c in row["chunks"]]
      kept = {key: str(row.get(key, "")) for key in _KEPT}
      yield row["id"], {**kept, "chunks": chunks, "syncs": list(row["syncs"])}


def write(builder: Responses) -> None:
  """Writes the files of the data set, atomically, without the progress report of TFDS."""
  target = Path(builder.data_dir)
  for stale in target.parent.glob("incomplete.*"):  # of a build that was killed
    shutil.rmtree(stale)
  tfds.disable_progress_bar()
  with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(None):
    builder.download_and_prepare(download_dir=downloads)


def read(folder: Path, split: str = "train") -> list[dict]:
  """The rows of a built data set, in the order of its files. Raises DataError if the folder is not a data set
  or has no such split."""
  if not (folder / "dataset_info.json").is_file():
    raise DataError(f"{folder} is not a data set of --mode=build: it has no dataset_info.json")
  builder = tfds.builder_from_directory(str(folder))
  if split not in builder.info.splits:
    raise DataError(f"{folder} has no split {split!r}, only {', '.join(builder.info.splits)}")
  return [_row(example) for example in builder.as_data_source(split=split)]


def _row(example: Mapping[str, Any]) -> dict:
  chunks = example["chunks"]
  return {
    **{key: example[key].decode() for key in _KEPT},
    "chunks": [
      {"start": int(a), "end": int(b), "topic": topic.decode()}
      for a, b, topic in zip(chunks["start"], chunks["end"], chunks["topic"])
    ],
    "syncs": [int(s) for s in example["syncs"]],
  }
