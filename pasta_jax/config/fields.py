"""What sections of settings are made of: fields with rules, conversion from text, and identity."""

import dataclasses
import math
import os
import re
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Rule = Callable[[Any], str]  # what is wrong with a value, to follow the setting's name; "" if nothing is


def at_least(n: float) -> Rule:
  return lambda x: "" if x >= n else f"must be {n} or more, not {x!r}"


def between(low: float, high: float) -> Rule:
  """With both ends. The upper one is far above what is of use, and below what fills the memory."""
  return lambda x: "" if low <= x <= high else f"must be {low} to {high}, not {x!r}"


def _usable(x: Any) -> str:
  """Of every number that is not in a list."""
  if isinstance(x, float) and not math.isfinite(x):
    return f"must be a finite number, not {x!r}"
  return f"must be {LARGEST} at most, not {x!r}" if type(x) is int and abs(x) > LARGEST else ""


def above(n: float) -> Rule:
  return lambda x: "" if x > n else f"must be above {n}, not {x!r}"


def within(interval: str) -> Rule:
  """`interval`: such as "[0, 1)"."""
  low, high = map(float, interval[1:-1].split(","))

  def rule(x: float) -> str:
    ends = interval[0] == "[" and x == low or interval[-1] == "]" and x == high
    return "" if low < x < high or ends else f"must be in {interval}, not {x!r}"

  return rule


def one_of(choices: tuple[str, ...]) -> Rule:
  return lambda x: "" if x in choices else f"must be one of {', '.join(choices)}, not {x!r}"


def each_of(choices: tuple[str, ...]) -> Rule:
  """For lists."""
  return lambda xs: next((f"takes {', '.join(choices)}, not {x!r}" for x in xs if x not in choices), "")


def each_between(low: float, high: float) -> Rule:
  """For lists of different numbers, of one at least."""
  good = lambda xs: len(xs) > 0 and len(set(xs)) == len(xs) and all(low <= x <= high for x in xs)
  return lambda xs: "" if good(xs) else f"takes different numbers from {low} to {high}, not {list(xs)}"


LARGEST = 2**31 - 1  # integer: arrays on devices have 32 bits
ALWAYS, PROMISES, NEVER = "always", "with promises", "never"  # when results depend on a field


def setting(
  default: Any,
  *rules: Rule,
  identity: str = ALWAYS,
  file: bool = False,
  path: bool = False,
  late: bool = False,
) -> Any:
  """A field of a section.

  `identity`: when results depend on it; other values then need another folder, or are recorded with what was
  made. `path`: it names files or folders (`user_path`), perhaps among other things. `file`: the same, of
  files that may be moved: identity takes their names without folders. `late`: identity leaves it out while it has its
  default, so that runs from before it existed go on.
  """
  about = {"rules": rules, "identity": identity, "file": file, "path": path or file, "late": late}
  return dataclasses.field(default=default, metadata=about)


def user_path(name: str, text: str) -> str:
  """A path that a user gives, in every flag and setting: `~` is the home folder.

  Raises ValueError, one line, for an address such as gs://bucket/folder, which would become a local folder.
  """
  if found := re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", text):
    raise ValueError(
      f"{name}={text}: {found[0]}/ is not supported: mount it (gcsfuse, s3fs) and name the folder, or copy it"
    )
  return os.path.expanduser(text)


_KINDS = {int: "an integer", float: "a number", str: "text", bool: "True or False"}


def to_text(values: tuple) -> str:
  """A list as the command line and config.json write it: a comma inside a text has a backslash before it."""
  number = lambda v: f"{v:g}" if float(f"{v:g}") == v else repr(v)
  return ",".join(v.replace(",", "\\,") if isinstance(v, str) else number(v) for v in values)


def _parts(text: str) -> list[str]:
  """The inverse of `to_text`."""
  return [p.strip().replace("\\,", ",") for p in re.split(r"(?<!\\),", text)]


def _converted(name: str, kind: Any, value: Any) -> Any:
  """A value in the type of its field: integers as numbers, lists as tuples. Raises ValueError, one line."""
  optional = isinstance(kind, types.UnionType)
  if optional and value is None:
    return None
  kind = kind.__args__[0] if optional else kind
  if kind in _KINDS:
    value = float(value) if kind is float and type(value) is int else value
    if type(value) is not kind:
      raise ValueError(f"{name} must be {_KINDS[kind]}, not {value!r}")
    return value
  [of, _] = kind.__args__  # tuple[of, ...]
  parts = _parts(value) if isinstance(value, str) else value
  try:
    return tuple(of(p) for p in parts if p != "")
  except (TypeError, ValueError):
    raise ValueError(f"{name} must be {_KINDS[of]} or several, separated by commas, not {value!r}") from None


def check_rules(kind: type, name: str, values: Mapping[str, Any]) -> None:
  """Raises ValueError, one line, for one of `values` that breaks the rules of its field of `kind`, a section
  class that is called `name`."""
  for f in dataclasses.fields(kind):
    given = values.get(f.name) is not None  # None: an optional setting that was left open
    for rule in (_usable, *f.metadata.get("rules", ())) if given else ():
      if wrong := rule(values[f.name]):
        raise ValueError(f"{name}.{f.name} {wrong}")


def check(section: Any, name: str) -> None:
  """Converts the fields of a new section and checks them. Raises ValueError, one line."""
  for f in dataclasses.fields(section):
    full = f"{name}.{f.name}"
    value = _converted(full, f.type, getattr(section, f.name))
    if f.metadata.get("path"):
      value = tuple(user_path(full, v) for v in value) if isinstance(value, tuple) else user_path(full, value)
    object.__setattr__(section, f.name, value)
  check_rules(type(section), name, vars(section))


@dataclasses.dataclass(frozen=True)
class Section:
  """Settings of one subject. Raises ValueError, one line that names the field, for values out of range."""

  def __post_init__(self):
    check(self, type(self).__name__.lower())

  def to_dict(self) -> dict[str, Any]:
    """Plain values by field, for JSON: lists as text."""
    values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    return {name: to_text(v) if isinstance(v, tuple) else v for name, v in values.items()}


def identity(section: Section, *, promises: bool = True) -> dict[str, Any]:
  """The fields of a section that results depend on, as plain values; without `promises`, those that results
  without promises depend on."""
  found = {}
  for f in dataclasses.fields(section):
    when, value = f.metadata.get("identity", ALWAYS), getattr(section, f.name)
    if f.metadata.get("file"):
      value = tuple(Path(v).name for v in value) if isinstance(value, tuple) else Path(value).name
    if f.metadata.get("late") and value == f.default:
      continue
    if when == ALWAYS or when == PROMISES and promises:
      found[f.name] = to_text(value) if isinstance(value, tuple) else value
  return found
