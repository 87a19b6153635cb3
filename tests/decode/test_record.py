"""Records of responses: JSON and back, of both schemas."""

import dataclasses

import pytest
from helpers.old_schema import OLD_KEYS, old
from test_language import BYTES

from pasta_jax.decode.record import RENAMED, SCHEMA, ResponseRecord, count_text_tokens, current, to_record
from pasta_jax.decode.trace import from_json
from pasta_jax.lang.positions import PositionRule

RECORD = ResponseRecord(
  text="One. Two.",
  finish_reason="stop",
  text_tokens=60,
  total_tokens=90,
  steps=35,
  longest_path=30,
  peak_parallelism=3,
  promises=2,
  depth=1,
  ill_formed=0,
  refused=0,
  topic_twice=False,
  loops=False,
  lengths=((20, 25), (30, 28)),
  unseparated=1,
)
OLD_ROW = {
  "id": "a",
  "text": "One. Two.",
  "finish_reason": "stop",
  "text_tokens": 60,
  "total_tokens": 90,
  "steps": 35,
  "longest_path": 30,
  "theoretical_speedup": 2.0,
  "parallelism": 3.0,
  "peak_parallelism": 3,
  "promises": 2,
  "depth": 1,
  "ill_formed": 0,
  "refused": 0,
  "topic_twice": False,
  "loops": False,
  "lengths": [[20, 25], [30, 28]],
  "trace": {"threads": [{"tokens": [1, 2]}]},
}


def test_a_record_is_read_back_from_its_json():
  row = RECORD.to_json()
  assert row["schema"] == SCHEMA == 2
  assert (row["theoretical_parallelism"], row["tokens_per_round"]) == (2.0, 3.0)
  assert not set(row) & set(RENAMED)
  assert ResponseRecord.from_json(row | {"id": "a", "seconds": 1.0}) == RECORD
  assert not {"dtype", "kernels", "visibility"} & set(row)  # unknown, and the paper's
  known = dataclasses.replace(RECORD, dtype="int8", kernels="numba", visibility="live", unseparated=None)
  row = known.to_json()
  assert (row["dtype"], row["kernels"], row["unseparated"]) == ("int8", "numba", None)
  assert ResponseRecord.from_json(row) == known


def test_a_row_of_the_old_schema_is_the_same_record():
  assert ResponseRecord.from_json(OLD_ROW) == dataclasses.replace(RECORD, unseparated=None)
  row = current(OLD_ROW)
  assert row["theoretical_parallelism"] == 2.0 and row["tokens_per_round"] == 3.0
  assert row["peak_parallelism"] == 3 and row["trace"] == OLD_ROW["trace"]
  assert not set(row) & set(RENAMED)
  assert current(row) == row and current(RECORD.to_json()) == RECORD.to_json()
  with pytest.raises(ValueError, match="needs longest_path, lengths"):
    ResponseRecord.from_json({k: v for k, v in OLD_ROW.items() if k not in ("longest_path", "lengths")})


def test_no_old_key_means_something_else_today():
  assert RENAMED == {before: after for after, before in OLD_KEYS.items()}
  assert not set(RENAMED) & set(RENAMED.values())
  assert not set(RENAMED) & {f.name for f in dataclasses.fields(ResponseRecord)}
  nested = {"by weight": {"2": {"faults of samples, share": {"curt": 0.5}}}, "training": {"lost": 1.0}}
  assert old(current(nested)) == nested != current(nested)


def test_the_end_token_counts_where_it_was_written():
  assert count_text_tokens([1, 2], "stop") == 3 and count_text_tokens([1, 2], "length") == 2


@pytest.mark.parametrize("written", [b"ab\xff\xfe\xc3 c", "é".encode(), b"ab", b"\xf0\x9f\x92"])
def test_each_written_token_counts_once(written: bytes):
  """Bytes that are no UTF-8 are U+FFFD in the text, each of which is three tokens of this tokenizer."""
  tokens = [*written, BYTES.tags.eos[0]]
  n = len(tokens)
  thread = {"path": [], "parent": -1, "topic": "", "declared": None, "fork_index": 0, "finished": True}
  thread |= {"tokens": tokens, "positions": [*range(n)], "rounds": [*range(1, n + 1)]}
  saved = {"steps": n, "finish_reason": "stop", "refused": 0, "prompt": [1], "threads": [thread]}
  record = to_record(from_json(saved, BYTES, PositionRule()), BYTES)
  assert record.text_tokens == record.total_tokens == record.longest_path == n
  assert record.theoretical_parallelism == 1
