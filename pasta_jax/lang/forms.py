"""The form of the language that an adapter speaks: who sees whom, what a promise says and how, and positions.

The paper's form is the default. An adapter's metadata carry its form, and everything that encodes, lays out, decodes
or judges takes it from there (docs/language.md sections 2.5, 2.6, 3.1 and 4).
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from pasta_jax.config.sections import NUMBER_FORMS, PROMISE_FORMS, VISIBILITIES
from pasta_jax.lang.positions import PositionRule
from pasta_jax.utils.json_io import parse_json, to_json
from pasta_jax.utils.typed import Parsed, checked


@dataclasses.dataclass(frozen=True)
class Forms:
  """One form of the language. Raises ValueError, one line, for a form that does not exist.

  visibility   promise: a chunk sees what stood before its promise, and no other chunk (the paper's)
               live: a token sees all text before it, in reading order, that was read in an earlier round
  promise      topic: a promise names its topic (the paper's)
               head: the promising thread writes the head of the part as text, then the promise (`lang.head`)
  number       digits: a promise's length is written in digits (the paper's)
               token: it is one token, of `automaton.LENGTHS`; behind a head this is the whole promise
  """

  positions: PositionRule = PositionRule()
  visibility: str = "promise"
  promise: str = "topic"
  number: str = "digits"

  def __post_init__(self):
    known_forms = {"visibility": VISIBILITIES, "promise": PROMISE_FORMS, "number": NUMBER_FORMS}
    for name, known in known_forms.items():
      if (value := getattr(self, name)) not in known:
        raise ValueError(f"{name} {value!r} is none of {', '.join(known)}")
    if self.number == "token" and not self.positions.in_tens:
      raise ValueError(
        f"number 'token' needs promises that say tens (positions pred_10x, max or sum), not "
        f"{self.positions.strategy!r}"
      )

  def __str__(self) -> str:
    """In reports and messages."""
    return f"{self.visibility}, {self.promise}, {self.number}, {self.positions.strategy}"


class _Positions(Parsed):
  strategy: str
  fixed: Annotated[int, Field(ge=0, le=2**20)] = 60


def from_config(config: Any) -> Forms:
  """The form in which a config trains."""
  rule = PositionRule(config.positions.strategy, config.positions.fixed)
  return Forms(rule, config.language.visibility, config.language.promise, config.language.number)


def to_metadata(forms: Forms) -> dict[str, str]:
  """The entries of an adapter's header: "positions", and "forms" where they are not the paper's."""
  rule = forms.positions
  positions = to_json({"strategy": rule.strategy, "fixed": rule.fixed})
  names = ("visibility", "promise", "number")
  others = {n: value for n in names if (value := getattr(forms, n)) != getattr(Forms, n)}
  return {"positions": positions} | ({"forms": to_json(others)} if others else {})


def from_metadata(metadata: Mapping[str, str], rule: PositionRule = PositionRule()) -> Forms:
  """The inverse of `to_metadata`; `rule` is that of positions where none is named, other forms are the paper's.
  Raises ValueError, one line, for damaged entries."""
  field = "positions"
  try:
    if field in metadata:
      rule = PositionRule(**checked(_Positions, parse_json(metadata[field]), "not a rule").model_dump())
    field = "forms"
    others: dict[str, Any] = checked(dict[str, str], parse_json(metadata.get(field, "{}")), "not names")
    known = {f.name for f in dataclasses.fields(Forms)} - {"positions"}
    if unknown := sorted(others.keys() - known):
      raise ValueError(f"{unknown[0]!r} is none of {', '.join(sorted(known))}: it is of a newer version")
    return Forms(rule, **others)
  except ValueError as error:
    raise ValueError(f"{field}: {error}") from error
