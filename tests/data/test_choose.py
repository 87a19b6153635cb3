"""The rows that several forms train on: one file, the same examples in the same order."""

import pytest
from helpers.folders import model_config, write_model

from configs.ablations import forms
from pasta_jax.config import from_flags, with_changes
from pasta_jax.data.choose import choose, write
from pasta_jax.utils.jsonl import read_jsonl, write_jsonl
from pasta_jax.weights.checkpoint import load_checkpoint

LONG = "so many words that are not the head of it"


def row(name: str, *parts: str) -> dict:
  starts = [sum(len(p) + 1 for p in parts[:i]) for i in range(len(parts))]
  chunks = [{"start": a, "end": a + len(p), "topic": "t"} for a, p in zip(starts, parts)]
  return {"id": name, "prompt": name, "response": " ".join(parts), "chunks": chunks, "syncs": []}


ROWS = [
  row("plain") | {"response": "Yes."},
  row("short", *["Unbelievable incomprehensibility, once more."] * 4),  # little is left after a head
  row("two", f"One: {LONG}", f"Two: {LONG}"),
  row("alone", f"One: {LONG}"),  # too slow: nothing runs beside it
  row("plain too") | {"response": "No."},
  row("three", f"One: {LONG}", f"Two: {LONG}", f"Three: {LONG}"),
  row("long", *[f"One: {LONG}"] * 60),
]  # fmt: skip


def test_every_form_trains_on_the_rows_of_the_file_in_its_order(tmp_path):
  source = str(write_model(tmp_path / "model", model_config()))
  write_jsonl(tmp_path / "data.jsonl", ROWS)
  config = lambda form, data, **changes: with_changes(
    from_flags(forms.get_config(form)),
    {"model.source": source, "train.data": str(tmp_path / data)}
    | {f"train.{name}": value for name, value in changes.items()},
  )
  all_of_them = dict(min_speedup=0.0, plain_share=1.0)
  said = write(
    config("topic", "data.jsonl", min_speedup=1.1, plain_share=0.25), tmp_path / "a" / "topic.jsonl"
  )
  assert said.endswith(
    "4 of 7 rows (left out: 1 too long, 1 too slow, 0 with more or thinner chunks than wanted, "
    "1 beyond the share of plain ones)"
  )
  assert [r["id"] for r in read_jsonl(tmp_path / "a" / "topic.jsonl")] == ["short", "two", "three", "plain"]
  write(config("head", "a/topic.jsonl", **all_of_them), tmp_path / "rows.jsonl")
  rows = read_jsonl(tmp_path / "rows.jsonl")
  assert rows == [ROWS[i] for i in (2, 5, 1, 0)]  # for heads, "short" has no chunks
  vocabulary = load_checkpoint(source, progress=False).vocabulary
  for form in forms.FORMS:
    assert choose(config(form, "rows.jsonl", **all_of_them), rows, vocabulary).rows == [0, 1, 2, 3], form
  with pytest.raises(ValueError, match="no row of train.data=.* is left"):
    write(config("topic", "data.jsonl", length=3), tmp_path / "none.jsonl")
  assert not (tmp_path / "none.jsonl").exists()
