"""JSON in and out: whatever comes is a value or one ValueError, whatever a row has can be written."""

import datetime
import decimal
import json
import math
import uuid

import numpy as np
import pytest

from pasta_jax.utils.json_io import MAX_DEPTH, flat, parse_json, to_json
from pasta_jax.utils.text import MESSAGE_LENGTH, one_line, printable
from pasta_jax.utils.typed import Parsed, checked


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_text_is_parsed_with_and_without_a_byte_order_mark(mark: str):
  for data in (
    mark + '{"é": [1, null, NaN, -Infinity]}',
    (mark + '{"é": [1, null, NaN, Infinity]}').encode(),
  ):
    assert parse_json(data) == {"é": [1, None, None, None]}


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (b"\xff{}", "not UTF-8"),
    ("{", "not JSON"),
    ("", "not JSON"),
    ("1" * 5000, "digits"),
    ("[" * 100_000, "deeply"),
    ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "deeply"),
    ('{"a":' * 500 + "1" + "}" * 500, "deeply"),
  ],
)
def test_damage_is_one_error_of_a_few_words(data, message: str):
  with pytest.raises(ValueError, match=message) as error:
    parse_json(data)
  assert "\n" not in str(error.value) and len(str(error.value)) < 120


def test_nesting_up_to_the_limit_is_read():
  deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
  assert json.dumps(parse_json(deep)) == deep


def test_whatever_a_row_has_can_be_written():
  row = {
    "surrogate": "a\ud800",
    "date": datetime.date(2024, 2, 29),
    "time": datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.UTC),
    "decimal": decimal.Decimal("1.10"),
    "uuid": uuid.UUID(int=7),
    "bytes": b"caf\xc3\xa9",
    "raw": b"\xff\x00",
    "nan": [math.nan, {"x": math.inf}],
    "array": np.array([1.5, np.nan], np.float32),
    "number": np.int64(3),
  }
  line = to_json(row)
  assert line.isascii()
  assert json.loads(line) == {
    "surrogate": "a\ud800",
    "date": "2024-02-29",
    "time": "2024-02-29T12:00:00+00:00",
    "decimal": "1.10",
    "uuid": "00000000-0000-0000-0000-000000000007",
    "bytes": "café",
    "raw": "/wA=",
    "nan": [None, {"x": None}],
    "array": [1.5, None],
    "number": 3,
  }
  with pytest.raises(TypeError, match="object cannot be written"):
    to_json([object()])


def test_settings_by_dotted_name():
  nested = {"train": {"dtype": "auto", "more": {"a": [1]}}, "b": None}
  assert flat(nested) == flat(flat(nested)) == {"train.dtype": "auto", "train.more.a": [1], "b": None}


def test_nothing_that_a_terminal_obeys_is_shown():
  text = "a\x1b]0;title\x07\x9b31m\u202eb\ud800\r\nc\td\re"
  assert printable(text) == "a\\x1b]0;title\\x07\\x9b31m\\u202eb\\ud800\nc\td\\x0de"
  assert printable("Zürich 東京 👩‍👩‍👧 नमस्ते") == "Zürich 東京 👩‍👩‍👧 नमस्ते"  # a joiner hides nothing


def test_a_message_is_one_short_line():
  assert one_line("a\nerror: b\x1b[A") == "a error: b\\x1b[A"
  long = one_line("begin" + "\x1b" * 1000 + "end")
  assert len(long) <= MESSAGE_LENGTH and long.startswith("begin") and long.endswith("end")


class _Row(Parsed):
  id: int
  scale: float = 1.0


def test_types_are_checked_without_conversion():
  assert checked(_Row, {"id": 1, "scale": 2, "more": None}, "f") == _Row(id=1, scale=2.0)
  for wrong in ({}, {"id": "1"}, {"id": True}, {"id": 1.0}, {"id": 1, "scale": math.nan}, [], None):
    with pytest.raises(ValueError, match="^f: ") as error:
      checked(_Row, wrong, "f")
    assert "\n" not in str(error.value)
  with pytest.raises(ValueError, match="^g: a must be a valid string, not 1$"):
    checked(dict[str, str], {"a": 1}, "g")
