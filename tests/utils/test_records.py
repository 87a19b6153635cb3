"""Records of finished work: kept over kills, never mixed with those of other settings."""

import dataclasses
from pathlib import Path

import pytest

from pasta_jax.utils import shared_records
from pasta_jax.utils.jsonl import DataError, write_jsonl
from pasta_jax.utils.records import Records, agree, merge_parts, part_of, read_records, settings_beside
from pasta_jax.utils.shared_records import SharedRecords

SETTINGS = {"source": "m", "decode.top_k": 0}


@dataclasses.dataclass(frozen=True)
class Asked:
  id: str
  prompt: str


def test_a_resumed_run_repeats_only_what_is_missing(tmp_path: Path):
  path = tmp_path / "folder" / "x.jsonl"
  asked = [Asked("a", "p"), Asked("b", "q"), Asked("c", "r")]
  records = Records(path, SETTINGS)
  for r in asked[:2]:
    records.add(dataclasses.asdict(r))
  path.write_bytes(path.read_bytes()[:-3])  # killed while it wrote
  assert [r["id"] for r in read_records(path)] == ["a"]
  again = Records(path, SETTINGS)
  assert again.missing(asked) == asked[1:]
  again.add(dataclasses.asdict(asked[1]))
  assert read_records(path) == [dataclasses.asdict(r) for r in asked[:2]]


def test_parts_of_several_processes_are_merged(tmp_path: Path):
  """Also where a kill cut off a line, or came between merging and deleting; but not under other settings."""
  path = tmp_path / "x [1].jsonl"
  Records(path, SETTINGS).add({"id": "a"})
  rows = [{"id": "b"}, {"id": "c"}]
  for index, row in enumerate(rows, 1):
    write_jsonl(part_of(path, index), [row])
  with open(part_of(path, 12), "w") as file:
    file.write('{"id": "d"}\n{"id": "e')
  again = part_of(path, 1).read_bytes()
  with pytest.raises(DataError, match="made with source='m', not 'other'"):
    Records(path, {"source": "other"})
  assert [*Records(path, SETTINGS).rows] == ["a", "b", "c", "d"]
  part_of(path, 1).write_bytes(again)
  merge_parts(path)
  assert [r["id"] for r in read_records(path)] == ["a", "b", "c", "d"]
  assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, settings_beside(path).name]


def test_parts_without_a_merged_row_keep_their_settings(tmp_path: Path):
  """The first process was killed before it had a row of its own."""
  path = tmp_path / "x.jsonl"
  Records(path, SETTINGS)
  write_jsonl(part_of(path, 1), [{"id": "a"}])
  with pytest.raises(DataError, match="made with source='m', not 'other'"):
    Records(path, {"source": "other"})


def test_one_process_shares_with_nobody(tmp_path: Path):
  records = SharedRecords(tmp_path / "x.jsonl", SETTINGS)
  asked: list[list[str]] = []

  def work(some, add):
    asked.append([*some])
    for i in some:
      add({"id": i})

  records.make(["a", "b"], work)
  records.make([], work)
  assert asked == [["a", "b"]] and [*records.rows] == ["a", "b"] == [
    r["id"] for r in read_records(records.path)
  ]


def test_a_folder_that_another_host_does_not_see_is_named(tmp_path: Path, monkeypatch):
  monkeypatch.setattr(shared_records, "PATIENCE", 0.2)
  with pytest.raises(DataError, match="x is not here, though .* all processes need the same --workdir"):
    shared_records._await(tmp_path / "x", 1)


def test_the_newest_row_of_an_id_counts(tmp_path: Path):
  records = Records(tmp_path / "x.jsonl", {})
  for value in (1, 2):
    records.add({"id": "a", "value": value})
  assert read_records(records.path) == [{"id": "a", "value": 2}] == list(records.rows.values())


def test_rows_of_other_settings_are_refused(tmp_path: Path):
  path = tmp_path / "x.jsonl"
  Records(path, SETTINGS)
  Records(path, {"source": "other"}).add({"id": "a"})  # no row yet: the settings may change
  for settings, message in (
    ({"source": "m"}, "made with source='other', not 'm'"),
    ({"source": "other", "new": (1, 2)}, r"made with new=None, not \[1, 2\]"),
    ({}, "made with source='other', not None"),
  ):
    with pytest.raises(DataError, match=message) as error:
      Records(path, settings)
    assert "\n" not in str(error.value)
  assert Records(path, {"source": "other"}).rows == {"a": {"id": "a"}}
  agree(path, settings_beside(path), {"source": "other"})


def test_another_prompt_of_the_same_id_is_refused(tmp_path: Path):
  records = Records(tmp_path / "x.jsonl", {})
  records.add({"id": "a", "prompt": "p"})
  with pytest.raises(DataError, match="a response to another prompt with the id 'a'"):
    records.missing([Asked("a", "another")])
