"""JSON in and out: the one place that parses what users and servers send, and that writes what runs leave.

`parse_json` raises nothing but ValueError, whatever the text is; `to_json` writes whatever a row may contain.
"""

import base64
import datetime
import decimal
import json
import math
import os
import uuid
from pathlib import Path
from typing import Any

MAX_DEPTH = 100  # levels of lists and objects: more is damage, and would end Python's stack somewhere later


def parse_json(data: str | bytes) -> Any:
  """The value of a JSON text, which may begin with a byte order mark. NaN and infinities, which are no JSON
  but are often written, are None.

  Raises ValueError, a few words: not UTF-8, not JSON, nested too deeply, or a number of too many digits.
  """
  try:
    text = data.decode("utf-8") if isinstance(data, bytes) else data
    value = json.loads(text.removeprefix("\ufeff"), parse_constant=lambda _: None)
  except UnicodeDecodeError as error:
    raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
  except json.JSONDecodeError as error:
    line = f"line {error.lineno}, " if error.lineno > 1 else ""
    raise ValueError(f"not JSON ({error.msg} at {line}column {error.colno})") from None
  except RecursionError:
    raise ValueError("nested too deeply") from None
  except ValueError:  # Python's limit on the digits of an integer
    raise ValueError("not usable JSON (a number of thousands of digits)") from None
  level = [value]
  for _ in range(MAX_DEPTH):
    level = [x for c in level for x in _children(c) if isinstance(x, dict | list)]
    if not level:
      return value
  raise ValueError("nested too deeply")


def read_json(path: Path) -> dict[str, Any]:
  """The JSON object in a file that a run left. Raises OSError, or ValueError, one line that names the file."""
  try:
    value = parse_json(path.read_bytes())
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None
  if not isinstance(value, dict):
    raise ValueError(f"{path}: not a JSON object")
  return value


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """The leaves of nested objects by dotted path; of settings that are flat already, the same."""
  leaves: dict[str, Any] = {}
  for key, value in tree.items():
    leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
  return leaves


def or_nan(value: float | None) -> float:
  """A figure of a file as it was written: `to_json` makes null of what is not finite."""
  return math.nan if value is None else value


def _children(value: Any) -> Any:
  return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def to_json(value: Any, indent: int | None = None) -> str:
  """JSON in ASCII, so that lone surrogates can be written too.

  Numbers that are not finite are null; dates, decimals and identifiers are text; bytes are text, in base64 if
  they are not UTF-8; arrays are lists. Raises TypeError for any other type.
  """
  try:
    return json.dumps(value, indent=indent, allow_nan=False, default=_plain)
  except ValueError:  # a number that is not finite: rare, so the copy is not made before
    return json.dumps(_finite(value), indent=indent, allow_nan=False, default=lambda x: _finite(_plain(x)))


def _plain(value: Any) -> Any:
  if isinstance(value, datetime.date | datetime.time):
    return value.isoformat()
  if isinstance(value, datetime.timedelta | decimal.Decimal | uuid.UUID | os.PathLike):
    return str(value)
  if isinstance(value, bytes):
    try:
      return value.decode()
    except UnicodeDecodeError:
      return base64.b64encode(value).decode()
  if isinstance(value, set | frozenset):
    return list(value)
  if hasattr(value, "tolist"):  # NumPy's arrays and scalars
    return value.tolist()
  raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _finite(value: Any) -> Any:
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if isinstance(value, dict):
    return {k: _finite(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(v) for v in value]
  return value
