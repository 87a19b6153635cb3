"""Prompts of benchmarks: AlpacaEval, MT-Bench, JSON lines."""

import json
from pathlib import Path

import pytest

from pasta_jax.data.prompts import conversation, read_prompts
from pasta_jax.utils.jsonl import DataError, write_jsonl

PROMPTS = [
  {"id": "a", "prompt": "Plan a trip.", "category": "writing"},
  {"id": "b", "prompt": "Why <b>?", "category": "why"},
  {"id": "c", "turns": ["Name three birds.", "Which of them is the largest?"], "category": "writing"},
]


@pytest.fixture
def path(tmp_path: Path) -> str:
  write_jsonl(tmp_path / "prompts.jsonl", PROMPTS)
  return str(tmp_path / "prompts.jsonl")


def test_prompts_by_limit_category_and_id(path: str):
  ids = lambda **chosen: [turn.id for turn in read_prompts(path, **chosen)]
  assert ids() == ["a", "b", "c/1", "c/2"]
  assert ids(categories=["writing"]) == ["a", "c/1", "c/2"]
  assert ids(categories=["writing", "why"], limit=2) == ["a", "b"]
  assert ids(among={"b", "c", "none"}) == ["b"]  # a prompt of several turns is not selected by its own id
  assert ids(among={"a", "b"}, limit=1) == ["a"]


def test_turns_of_mt_bench(tmp_path: Path):
  path = tmp_path / "mt.jsonl"
  write_jsonl(path, [{"question_id": 81, "category": "writing", "turns": ["One.", "Two."]}])
  first, second = read_prompts(str(path))
  assert (first.id, second.id, second.category) == ("81/1", "81/2", "writing")
  assert first.earlier == () and second.earlier == (first,)
  assert [m["content"] for m in conversation(second, {"81/1": "An answer."})] == [
    "One.",
    "An answer.",
    "Two.",
  ]


def test_the_list_of_alpaca_eval(tmp_path: Path):
  path = tmp_path / "alpaca.json"
  path.write_text(json.dumps([{"instruction": "Plan.", "dataset": "helpful_base"}, {"instruction": "Go."}]))
  found = read_prompts(str(path))
  assert [(t.id, t.prompt, t.category) for t in found] == [("0", "Plan.", "helpful_base"), ("1", "Go.", "")]


@pytest.mark.parametrize(
  "row, message",
  [
    ({"prompt": " "}, "row 2 has no text"),
    ({"turns": []}, "row 2 has no text"),
    ({"turns": ["a", 3]}, "row 2 has no text"),
    ({"prompt": None, "turns": None}, "row 2 has no text"),
    ({"turns": ["a"] * 20_000}, "row 2 has 20,000 turns, more than 100"),
    ({"prompt": "x\ud83d"}, "row 2 has half of a surrogate pair"),
    ({"id": "a", "prompt": "x"}, "two prompts have the id 'a'"),
  ],
)
def test_unusable_rows_are_one_line(tmp_path: Path, row: dict, message: str):
  path = tmp_path / "prompts.jsonl"
  write_jsonl(path, [PROMPTS[0], row])
  with pytest.raises(DataError, match=message) as error:
    read_prompts(str(path))
  assert "\n" not in str(error.value)


def test_unusable_files_and_settings_are_one_line(path: str, tmp_path: Path):
  (tmp_path / "empty.jsonl").write_text("")
  (tmp_path / "object.json").write_text("{}")
  for read, message in (
    (lambda: read_prompts("", part="dataset"), "--config.dataset.prompts=FILE"),
    (lambda: read_prompts(path, categories=["x", "why"]), "has no category x: it has why, writing"),
    (lambda: read_prompts(str(tmp_path / "none.json")), "no such data file"),
    (lambda: read_prompts(str(tmp_path / "empty.jsonl")), "contains no prompt"),
    (lambda: read_prompts(str(tmp_path / "object.json")), "expected a list of objects"),
  ):
    with pytest.raises(DataError, match=message) as error:
      read()
    assert "\n" not in str(error.value)


def test_null_is_absent_and_other_fields_may_hold_anything(tmp_path: Path):
  nothing = dict.fromkeys(("id", "question_id", "prompt", "instruction", "turns", "category", "dataset"))
  rows = [
    nothing | {"prompt": "a"},
    nothing | {"instruction": "b"},
    nothing | {"turns": ["c"], "category": "x\ud83d"},
  ]
  write_jsonl(tmp_path / "p.jsonl", rows)
  (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "p.jsonl").read_bytes())
  found = read_prompts(str(tmp_path / "p.jsonl"))
  assert [(t.id, t.prompt, t.category) for t in found] == [
    ("0", "a", ""),
    ("1", "b", ""),
    ("2", "c", "x\ud83d"),
  ]
