"""Settings of every mode: typed, immutable, and validated when they are built.

`Config` has one dataclass for each section (`sections`, which documents every setting). A field has a type, a
default, and rules that its value must satisfy; metadata say whether results depend on it (`identity`). Lists
are tuples; the command line, config files and config.json write them as text, separated by commas.

    config = with_changes(Config(), {"model.adapter": "pasta_fast", "decode.max_new_tokens": 64})

Files in configs/ return what `to_flags` makes of a Config, an ml_collections ConfigDict, which flags such as
`--config.decode.max_new_tokens=64` change; `from_flags` reads it back. Nothing heavy is imported here:
choices that other modules implement are listed in `sections`; those modules import them, or a test compares the two.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pasta_jax.config import sections
from pasta_jax.config.fields import Section, check, identity, user_path
from pasta_jax.config.sections import SYSTEMS, System

__all__ = [
  "ALIASES",
  "Config",
  "System",
  "current_names",
  "from_flags",
  "identity",
  "to_flags",
  "user_path",
  "with_changes",
]

# Renamed settings, by their old names: command lines, config.json and stored settings may have them.
ALIASES = {
  "decode.slots": "decode.max_branches",
  "decode.product": "decode.kernels",
  "decode.capacity": "decode.kv_capacity",
  "decode.requests": "decode.batch_size",
  "eval.requests": "eval.batch_size",
  "eval.width": "eval.branch_width",
  "preference.requests": "preference.decode_batch_size",
  "preference.width": "preference.branch_width",
  "preference.accumulate": "preference.grad_accum_steps",
  "preference.clip": "preference.max_grad_norm",
  "train.accumulate": "train.grad_accum_steps",
  "train.clip": "train.max_grad_norm",
}


def current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Stored settings, by dotted name, under the names that they have today."""
  return {ALIASES.get(name, name): value for name, value in settings.items()}


@dataclasses.dataclass(frozen=True)
class Config:
  """All settings. Raises ValueError, one line that names the setting, for values that a mode would refuse."""

  model: sections.Model = sections.Model()
  mesh: sections.Mesh = sections.Mesh()
  positions: sections.Positions = sections.Positions()
  language: sections.Language = sections.Language()
  train: sections.Train = sections.Train()
  decode: sections.Decode = sections.Decode()
  systems: Mapping[str, System] = dataclasses.field(default_factory=lambda: SYSTEMS)
  skeleton: sections.Skeleton = sections.Skeleton()
  eval: sections.Eval = sections.Eval()
  preference: sections.Preference = sections.Preference()
  judge: sections.Judge = sections.Judge()
  annotate: sections.Annotate = sections.Annotate()
  dataset: sections.Dataset = sections.Dataset()
  compile: sections.Compile = sections.Compile()
  export: sections.Export = sections.Export()

  def __post_init__(self):
    systems = {
      name: dataclasses.replace(s, adapter=self.model.adapter) if s.follows_model else s
      for name, s in self.systems.items()
    }
    object.__setattr__(self, "systems", systems)
    for name, system in systems.items():
      check(system, f"systems.{name}")
    for field, names in (("systems", self.eval.systems), ("baseline", (self.eval.baseline,))):
      for name in names:
        if name not in systems:
          raise ValueError(f"eval.{field}: unknown system {name!r}; config.systems has {', '.join(systems)}")

  def of_system(self, name: str) -> "Config":
    """The settings that a system is decoded with: its own one of decoding, and these for the others."""
    own = sections.own_setting(self.systems[name].own)
    return dataclasses.replace(self, decode=dataclasses.replace(self.decode, **own)) if own else self

  @classmethod
  def from_dict(cls, values: Mapping[str, Mapping[str, Any]]) -> "Config":
    """The settings of a config.json, which may have old names; what it lacks has its default.

    Raises ValueError, one line, for settings that do not exist or are out of range.
    """
    start = {f.name: f.type() for f in dataclasses.fields(cls) if f.name != "systems"}  # type: ignore[operator]
    for section, fields in values.items():
      if section == "systems":
        start["systems"] = {n: _replaced(System(), f"systems.{n}", s) for n, s in fields.items()}
      elif section in start:
        start[section] = _replaced(start[section], section, fields)
      else:
        raise ValueError(f"there is no setting {section!r}: config has {', '.join(start)}")
    return cls(**start)

  def to_dict(self) -> dict[str, Any]:
    """Nested plain values, in the form of config.json."""
    parts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    systems = {name: system.to_dict() for name, system in self.systems.items()}
    return {name: systems if name == "systems" else part.to_dict() for name, part in parts.items()}

  def to_json(self, indent: int | None = None) -> str:
    """The text of a config.json, without logins in URLs."""
    values = self.to_dict()
    for name in ("judge", "annotate"):
      values[name]["url"] = sections.without_login(values[name]["url"])
    return json.dumps(values, indent=indent)


_Part = TypeVar("_Part", bound=Section | System)


def _replaced(part: _Part, name: str, values: Mapping[str, Any]) -> _Part:
  """`dataclasses.replace` by today's names of the fields. Raises ValueError, one line, for an unknown one."""
  known = {f.name for f in dataclasses.fields(part)}
  given: dict[str, Any] = {}
  for field, value in values.items():
    field_now = ALIASES.get(f"{name}.{field}", f"{name}.{field}").removeprefix(f"{name}.")
    if field_now not in known:
      raise ValueError(f"there is no setting {name}.{field}: {name} has {', '.join(sorted(known))}")
    if field_now in given or field_now != field and field_now in values:
      raise ValueError(f"{name}.{field} is called {name}.{field_now} now: both are given")
    given[field_now] = value
  return dataclasses.replace(part, **given)


def with_changes(config: Config, changes: Mapping[str, Any]) -> Config:
  """A config with other values, by dotted name: {"train.length": 512, "systems.pasta.adapter": "mine"}.

  All changes are made before the result is validated. Raises ValueError as `Config.from_dict` does.
  """
  nested: dict[str, dict[str, Any]] = {}
  for name, value in changes.items():
    section, _, field = name.rpartition(".")
    nested.setdefault(section, {})[field] = value
  parts: dict[str, Any] = {}
  for section, fields in nested.items():
    system = section.removeprefix("systems.")
    if system != section and system in config.systems:
      follows = config.systems[system].follows_model and "adapter" not in fields
      changed = _replaced(config.systems[system], section, {"follows_model": follows, **fields})
      parts["systems"] = {**parts.get("systems", config.systems), system: changed}
    elif isinstance(getattr(config, section, None), Section):
      parts[section] = _replaced(getattr(config, section), section, fields)
    else:
      raise ValueError(f"there is no section {section!r} in config")
  return dataclasses.replace(config, **parts)


def to_flags(config: Config) -> Any:
  """An ml_collections ConfigDict of the same settings, for flags and for config files to change. Systems that
  follow model.adapter share its value; an optional setting that is left open keeps its type."""
  from ml_collections import ConfigDict, config_dict  # here: users of the library need it not

  found = ConfigDict(config.to_dict())
  for f in dataclasses.fields(config.decode):
    if getattr(config.decode, f.name) is None:
      found.decode[f.name] = config_dict.placeholder(f.type.__args__[0])  # type: ignore[union-attr]
  followers = [name for name, system in config.systems.items() if system.follows_model]
  for name in followers:
    found.systems[name].adapter = found.model.get_ref("adapter")
  return found


def from_flags(flags: Any) -> Config:
  """The settings of a ConfigDict of `to_flags`, validated. Raises ValueError as `Config.from_dict` does."""
  return Config.from_dict(json.loads(flags.to_json_best_effort()))  # as JSON: systems keep their order
