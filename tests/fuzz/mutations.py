"""Damage to a file, drawn from a seed: bytes, the JSON in it, or the text of a template."""

import gzip
import json
import random
import struct
from collections.abc import Callable
from typing import Any

LENGTHS = [0, 1, 2, 255, 10**9, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]
FLOATS = [float("nan"), float("inf"), float("-inf"), 0.0, -1.0, 1e38]
DEEP = "[" * 100_000 + "]" * 100_000
VALUES: list[Any] = [
  *(
    None,
    True,
    False,
    0,
    -1,
    -5,
    1,
    7,
    2**31,
    3 * 10**8,
    10**9,
    2**64,
    10**400,
    0.5,
    -1.5,
    1e308,
    1e-300,
    *FLOATS,
  ),
  *("", "x", "-5", "nan", "../x", "/dev/zero", "\ud800", "\x1b]0;x\x07\n", "▁" * 300, "é" * 5000),
  *([], {}, [None], [[1]], [0] * 5000, {"": ""}, {"type": "x"}, [-1, 10**9]),
]
JINJA = [
  "{% for i in range(99999) %}{% for j in range(99999) %}{{ i * j }}{% endfor %}{% endfor %}",
  "{{ 'x' * 10 ** 9 }}", "{{ x.y.z }}", "{{ messages[9].content }}", "{{ raise_exception('no') }}", "{%", "}}", "{#",
  "{{ '%999999999d' % 1 }}", "{{ 'x'|center(10 ** 9) }}", "{{ ''.__class__ }}", "{{ messages|tojson(10 ** 9) }}",
  "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ " + "(" * 500, "{% if 1 %}" * 500, "\ud800", "\0",
  "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
]  # fmt: skip


def mutated(name: str, data: bytes, rng: random.Random) -> bytes:
  """A damaged copy of a file's content, by the kind of file that `name` says."""
  ways: list[Callable[[bytes, random.Random], bytes]] = [of_bytes]
  if name.endswith(".json") or name.startswith("_"):  # Orbax's metadata begin with "_"
    ways += [of_json] * 4
  elif name.endswith(".jsonl"):
    ways += [of_lines] * 4
  elif name.endswith(".jsonl.gz"):
    ways += [lambda data, rng: gzip.compress(of_lines(gzip.decompress(data), rng), mtime=0)] * 2
  elif name.endswith(".safetensors"):
    ways += [of_header] * 2
  elif name.endswith(".jinja"):
    ways += [of_template] * 2
  try:
    return rng.choice(ways)(data, rng)
  except (ValueError, struct.error):  # for example no JSON to damage
    return of_bytes(data, rng)


def of_bytes(data: bytes, rng: random.Random) -> bytes:
  """Flipped bits, overwritten, lost or doubled runs, and numbers at places where lengths and sizes may be."""
  out = bytearray(data)
  for _ in range(rng.choice([1, 1, 1, 1, 3])):
    # The head of a file, where most of its structure is, is as likely as the rest.
    at = rng.randrange(min(len(out), rng.choice([300, 3000, len(out), len(out)])) or 1) if out else 0
    end = min(len(out), at + rng.choice([1, 4, 30, 1000]))
    match rng.choice("flip flip run number number float cut double lose insert".split()):
      case "flip" if out:
        out[at] ^= 1 << rng.randrange(8)
      case "run":
        out[at:end] = rng.choice([b"\0", b"\xff", b"A", rng.randbytes(1)]) * (end - at)
      case "number":
        form = rng.choice(["<I", "<Q", ">I"])
        out[at : at + struct.calcsize(form)] = struct.pack(
          form, rng.choice(LENGTHS) & (2 ** (8 * struct.calcsize(form)) - 1)
        )
      case "float":
        out[at : at + 4] = struct.pack("<f", rng.choice(FLOATS))
      case "cut":
        del out[rng.randrange(len(out) + 1) :]
      case "double":
        out[at:at] = out[at:end]
      case "lose":
        del out[at:end]
      case "insert":
        out[at:at] = rng.randbytes(rng.choice([1, 8, 100]))
  return bytes(out)


def of_json(data: bytes, rng: random.Random) -> bytes:
  """Other values, keys and depths in a JSON document; values that are JSON themselves are damaged inside."""
  value = json.loads(data)
  for _ in range(rng.choice([1, 1, 2])):
    value = _changed(value, rng)
  text = json.dumps(value)
  if rng.random() < 0.05:
    text = text.replace("null", DEEP, 1) if "null" in text else DEEP
  return text.encode()


def of_lines(data: bytes, rng: random.Random) -> bytes:
  """JSON lines with damage in one of them."""
  lines = data.splitlines(keepends=True)
  at = rng.randrange(len(lines))
  lines[at] = of_json(lines[at], rng) + b"\n"
  return b"".join(lines)


def of_header(data: bytes, rng: random.Random) -> bytes:
  """A safetensors file with a damaged header, whose length is right."""
  (size,) = struct.unpack_from("<Q", data)
  header = of_json(data[8 : 8 + size], rng)
  return struct.pack("<Q", len(header)) + header + data[8 + size :]


def of_template(data: bytes, rng: random.Random) -> bytes:
  """A template with more in it."""
  text = data.decode()
  at = rng.randrange(len(text) + 1)
  return (text[:at] + rng.choice(JINJA) + text[at:]).encode("utf-8", "surrogatepass")


def _changed(value: Any, rng: random.Random) -> Any:
  if isinstance(value, str) and value[:1] in ("{", "[") and rng.random() < 0.8:
    return of_json(value.encode(), rng).decode()
  if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
    return rng.choice(VALUES)
  keys = list(value) if isinstance(value, dict) else list(range(len(value)))
  key = rng.choice(keys)
  way = rng.random()
  if way < 0.1:
    del value[key]
  elif way < 0.15 and isinstance(value, dict):
    value[rng.choice(["", "x", "\ud800", "-5", str(10**9)])] = value.pop(key)
  elif way < 0.2:
    value[key] = value[rng.choice(keys)]
  else:
    value[key] = _changed(value[key], rng)
  return value
