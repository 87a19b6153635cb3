"""Values from files and servers, checked once where they enter: after that their types are known."""

import functools
from typing import Any, TypeVar

import pydantic

T = TypeVar("T")
_RULES = pydantic.ConfigDict(strict=True, allow_inf_nan=False, frozen=True)


class Parsed(pydantic.BaseModel):
  """An object with fields of known types. Types are strict: no text for a number, no number for text, no NaN
  and no infinity. Fields that it does not name are ignored."""

  model_config = _RULES


@functools.cache
def _adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
  return pydantic.TypeAdapter(kind, config=_RULES)  # slow to make


def checked(kind: type[T], value: Any, what: str) -> T:
  """`value` as a `kind`: a subclass of `Parsed`, or a type such as `dict[str, int]`, as strict.

  Raises:
    ValueError: one line that begins with `what` and names the first field that is wrong.
  """
  try:
    if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
      return kind.model_validate(value)
    return _adapter(kind).validate_python(value)  # type: ignore[arg-type]  # types are hashable
  except pydantic.ValidationError as error:
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"]))
    wrong = first["msg"].lower().replace("input should be", "must be")
    found = f", not {first['input']!r:.80}" if first["type"] != "missing" else ""
    raise ValueError(f"{what}: {f'{field} ' if field else ''}{wrong}{found}") from None
