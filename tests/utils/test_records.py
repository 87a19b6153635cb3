"""Records of finished work: kept over kills, never mixed with those of other settings."""

import dataclasses
from pathlib import Path

import pytest

from pasta_jax.utils.jsonl import DataError
from pasta_jax.utils.records import Records, agree, read_records, settings_beside

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
