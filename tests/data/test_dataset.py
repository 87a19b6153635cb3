"""Built data sets as they may be found: nothing that a folder names is imported, damage is one line."""

import json
import shutil
from pathlib import Path

import pytest

from pasta_jax.data import dataset
from pasta_jax.utils.jsonl import DataError

ROWS = [
  {"id": f"r{i}", "prompt": f"p {i}", "response": "One. Two. Three.", "syncs": [5 * (i % 2)],
   "chunks": [{"start": 0, "end": 4, "topic": "a"}] * (i % 2)}
  for i in range(12)
]  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp("[a],*b")
  rows = [*ROWS, {**ROWS[0], "id": "x\ud83d", "source": "page \ud83d"}]
  dataset.write(dataset.Responses({"train": rows, "validation": rows[:2]}, {}, data_dir=str(folder)))
  return folder / "responses" / "1.0.0"


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
  return shutil.copytree(built, tmp_path / "copy")


def change(path: Path, edit) -> None:
  value = json.loads(path.read_text())
  edit(value)
  path.write_text(json.dumps(value))


def test_rows_and_splits(built: Path):
  rows = dataset.read(built)
  assert len(rows) == 13 and len(dataset.read(built, "validation")) == 2
  by_id = {r["id"]: r for r in rows}
  assert by_id["x\\ud83d"]["source"] == "page \\ud83d"  # half a surrogate pair, escaped
  assert "annotator" not in (built / "features.json").read_text()
  for row in ROWS:
    assert by_id[row["id"]] == row | {"source": ""}


def test_rows_keep_the_name_of_their_annotator(tmp_path: Path):
  """Where any has one; data sets without stay as they were."""
  one = {**ROWS[1], "annotator": "é model"}
  needy = {**ROWS[3], "annotator": "b", "chunks": [{**ROWS[3]["chunks"][0], "needs": "siblings"}]}
  for number, rows in enumerate(([ROWS[0], one], [ROWS[0], one, needy])):
    folder = tmp_path / str(number)
    dataset.write(dataset.Responses({"train": rows}, {}, data_dir=str(folder)))
    found = dataset.read(folder / "responses" / "1.0.0")
    assert sorted(found, key=lambda r: r["id"]) == [r | {"source": ""} for r in rows]


def test_no_module_that_a_folder_names_is_imported(folder: Path, tmp_path: Path, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Text: pass\n")
  features, info = folder / "features.json", folder / "dataset_info.json"

  def name_it(value):
    value["featuresDict"]["features"]["prompt"]["pythonClassName"] = "evil.Text"

  change(info, lambda value: value.update(moduleName="evil"))
  assert len(dataset.read(folder)) == 13
  change(features, name_it)
  with pytest.raises(DataError, match="copy is not a data set of --mode=build: features.json names other"):
    dataset.read(folder)
  assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
  "edit, message",
  [
    (lambda v: v.update(name="mnist"), "name must be 'responses', not 'mnist'"),
    (lambda v: v.update(version="2.0.0"), "version must be '1.0.0'"),
    (lambda v: v.update(fileFormat="tfrecord"), "fileFormat must be 'array_record'"),
    (lambda v: v["splits"][0].update(filepathTemplate="../{SPLIT}"), "splits.0.filepathTemplate must be"),
    (lambda v: v["splits"][0].update(shardLengths=[13]), "splits.0.shardLengths.0 must be a valid string"),
    (lambda v: v["splits"][0].update(shardLengths=["²"]), "is damaged: split 'train'"),
    (lambda v: v["splits"][0].update(shardLengths=["9" * 5000]), "is damaged: split 'train'"),
    (lambda v: v["splits"][0].update(shardLengths=["12"]), "has 13 rows; dataset_info.json says 12"),
    (lambda v: v["splits"][0].update(shardLengths=["6", "7"]), "no such data file: .*-00000-of-00002"),
    (lambda v: v["splits"][0].update(name="../train"), "has no split 'train', only ../train, validation"),
    (lambda v: v.pop("splits"), "splits field required"),
  ],
)
def test_another_description_is_refused(folder: Path, edit, message: str):
  change(folder / "dataset_info.json", edit)
  with pytest.raises(DataError, match=message) as error:
    dataset.read(folder)
  assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
  "name", ["dataset_info.json", "features.json", "responses-train.array_record-00000-of-00001"]
)
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "noise", "deep"])
def test_damaged_files_are_one_line(folder: Path, name: str, damage: str):
  path = folder / name
  data = path.read_bytes()
  middle = data.index(b"One. Two") if b"One. Two" in data else len(data) // 2
  path.write_bytes(
    {
      "gone": b"", "empty": b"", "cut": data[: len(data) // 2], "deep": b"[" * 200_000,
      "noise": data[:middle] + bytes(255 - b for b in data[middle : middle + 200]) + data[middle + 200 :],
    }[damage]
  )  # fmt: skip
  if damage == "gone":
    path.unlink()
  with pytest.raises(DataError) as error:
    dataset.read(folder)
  assert str(folder) in str(error.value) and "\n" not in str(error.value)
