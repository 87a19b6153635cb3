"""Jinja's sandbox with limits: a chat template comes with weights, and must neither run for ever nor fill the
memory.

What a template does is counted, not timed, so that a conversation always has the same outcome: turns of loops,
calls, filters, and the texts and lists that they make or look through, each spend a part of an allowance.
Operations that make much of little (products, paddings, replacements) are refused before they are carried out.
"""

import contextlib
import contextvars
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_TEMPLATE = 200_000  # characters; published templates have up to 30,000
# One rendering may spend _ALLOWANCE, and _PER_INPUT for each character of the conversation. A step costs _STEP,
# an entry of a list 1 or, if it is a known value in a new list, 1 / _OLD_ENTRIES; a character 1 / _CHARACTERS.
_ALLOWANCE, _PER_INPUT = 10_000_000, 20
_STEP, _OLD_ENTRIES, _CHARACTERS = 20, 4, 16
_LARGEST = 1 << 25  # characters or entries that one operation may make
_MAX_BITS = 4096  # of a whole number

# Operations whose result can be as large as the product of what goes in.
_PRODUCTS = {"join", "center", "ljust", "rjust", "zfill", "expandtabs", "translate", "indent", "batch", "slice",
             "tojson", "round"}  # fmt: skip
# Those that look at each entry or character for long.
_THROUGH = {"sort", "unique", "groupby", "dictsort", "min", "max", "title", "wordcount", "urlencode"}
_CHEAP = {
  "length",
  "count",
  "first",
  "last",
  "default",
  "d",
  "safe",
  "string",
}  # whatever their argument's size
# Of Jinja's own, what costs more than its size; no chat template needs it.
_WITHOUT_FILTERS = ("urlize", "wordwrap", "striptags", "pprint", "xmlattr")
_WITHOUT_GLOBALS = ("lipsum",)

_left: contextvars.ContextVar[list[int]] = contextvars.ContextVar("left")


class LimitError(jinja2.TemplateError):
  """A template does too much."""


@contextlib.contextmanager
def allowance(characters: int) -> Iterator[None]:
  """What is compiled and rendered in this block, of a conversation of so many characters, has limits."""
  token = _left.set([_ALLOWANCE + _PER_INPUT * characters])
  try:
    yield
  finally:
    _left.reset(token)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
  """A sandbox for use within an `allowance`."""

  intercepted_binops = frozenset(["+", "*", "**", "%"])

  def __init__(self, filters: Mapping[str, Callable[..., Any]], **settings: Any):
    """`filters` replace those of Jinja."""
    super().__init__(finalize=_paid, **settings)
    self.filters |= filters
    for name in _WITHOUT_FILTERS:
      del self.filters[name]
    for functions in (self.filters, self.tests):
      for name, function in functions.items():
        functions[name] = _limited(name, function)
    for name in _WITHOUT_GLOBALS:
      del self.globals[name]
    self.step, self.joined, self.compared = _Own(_step_of), _Own(_joined), _Own(_compared)
    self.sliced = _Own(functools.partial(_paid, old=True))

  def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
    if len(source) > MAX_TEMPLATE:
      raise LimitError(f"it has {len(source)} characters, more than {MAX_TEMPLATE}")
    return _Counted().visit(super()._parse(source, name, filename))

  def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
    if isinstance(function, _Own):
      return function(*args)
    # Jinja wraps `str.format`.
    subject = getattr(getattr(function, "__wrapped__", function), "__self__", None)
    name = getattr(function, "__name__", "")
    _check(name, subject if isinstance(subject, str | bytes | list) else None, (*args, *kwargs.values()))
    return _paid(super().call(context, function, *args, **kwargs))

  def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
    if operator == "%" and isinstance(left, str):
      _check("format", left, right if isinstance(right, tuple) else (right,))
    elif operator == "**":
      if int(left).bit_length() * abs(int(right)) > _MAX_BITS:
        raise LimitError("a power is too large")
    elif operator == "*" and isinstance(left, int | float) and isinstance(right, int | float):
      if sum(x.bit_length() for x in (left, right) if isinstance(x, int)) > _MAX_BITS:
        raise LimitError("a product is too large")
    elif operator == "*":
      _refuse_above(_size(left) * _size(right))
    return _paid(super().call_binop(context, operator, left, right), old=True)


class _Own:
  """A function that `_Counted` puts into templates: it pays for itself."""

  def __init__(self, function: Callable[..., Any]):
    self._function = function

  def __call__(self, *args: Any) -> Any:
    return self._function(*args)


def _step_of(characters: int) -> None:
  _spend(_STEP + characters // _CHARACTERS)


def _joined(*parts: Any) -> str:
  texts = [str(part) for part in parts]
  _spend(_STEP + sum(map(len, texts)) // _CHARACTERS)
  return "".join(texts)


def _compared(value: Any) -> Any:
  if isinstance(value, str | list | tuple | dict):
    _spend(_size(value) // _CHARACTERS)
  return value


class _Counted(NodeTransformer):
  """Makes loops, macros and long texts count themselves, and slices, concatenations and comparisons what they
  make or compare."""

  def visit_For(self, node: Any) -> nodes.Node:  # noqa: N802
    self.generic_visit(node)
    node.body = [_step(0, node.lineno), *node.body]
    return node

  visit_Macro = visit_CallBlock = visit_For  # noqa: N815

  def visit_Output(self, node: nodes.Output) -> Any:  # noqa: N802
    self.generic_visit(node)
    size = sum(len(each.data) for each in node.nodes if isinstance(each, nodes.TemplateData))
    return [_step(size, node.lineno), node] if size > _STEP * _CHARACTERS else node

  def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
    self.generic_visit(node)
    return _call("sliced", [node], node.lineno) if isinstance(node.arg, nodes.Slice) else node

  def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
    self.generic_visit(node)
    return _call("joined", node.nodes, node.lineno)

  def visit_Operand(self, node: nodes.Operand) -> nodes.Node:  # noqa: N802
    self.generic_visit(node)
    if not isinstance(node.expr, nodes.Const):
      node.expr = _call("compared", [node.expr], node.lineno)
    return node


def _call(name: str, arguments: list[Any], line: int) -> nodes.Call:
  return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None, lineno=line)


def _step(characters: int, line: int) -> nodes.ExprStmt:
  return nodes.ExprStmt(_call("step", [nodes.Const(characters)], line), lineno=line)


# --- what operations cost ---


def _spend(amount: int) -> None:
  left = _left.get()
  left[0] -= amount
  if left[0] < 0:
    raise LimitError("it runs for too many steps, or makes too much text")


def _refuse_above(size: int) -> None:
  if size > _LARGEST:
    raise LimitError("it makes too much text at once")


def _paid(value: Any, *, old: bool = False) -> Any:
  """`value`, which was just made, or put together from `old` entries."""
  if isinstance(value, str | bytes):
    _spend(len(value) // _CHARACTERS)
  elif isinstance(value, list | tuple | dict):
    _spend(len(value) // _OLD_ENTRIES if old else len(value))
  return value


def _size(value: Any, depth: int = 3) -> int:
  """Characters and entries of a value, to some depth; of a whole number, that number."""
  if isinstance(value, str | bytes | range):
    return len(value)
  if isinstance(value, list | tuple | dict):
    items = value.values() if isinstance(value, dict) else value
    inner = sum(_size(item, depth - 1) for item in items if not isinstance(item, int)) if depth else 0
    return len(value) + inner
  return abs(value) if type(value) is int else 1


def _check(name: str, subject: Any, arguments: tuple[Any, ...]) -> None:
  """Before a function, filter or test: pays for what it looks at, refuses it if its result could be too
  large."""
  cost = _STEP
  if name in _THROUGH:
    cost += 4 * _size(subject)
  elif isinstance(subject, str | bytes):
    cost += len(subject) // _CHARACTERS
  elif isinstance(subject, list | tuple | range | dict) and name not in _CHEAP:
    cost += len(subject)
  cost += sum(len(each) // _CHARACTERS for each in arguments if isinstance(each, str | list | tuple))
  _spend(cost)
  if name == "replace" and len(arguments) > 1 and isinstance(subject, str):
    _refuse_above(len(subject) + subject.count(str(arguments[0])) * _size(arguments[1]))
  elif name in ("format", "format_map"):
    _refuse_above(_formatted_size(str(subject), arguments))
  elif name in _PRODUCTS:
    _refuse_above((_size(subject) + 1) * (max(map(_size, arguments), default=0) + 1))
  elif name == "sum" and any(isinstance(each, list | tuple) for each in arguments):
    raise LimitError("it adds up lists")  # which copies them again and again


def _formatted_size(form: str, arguments: tuple[Any, ...]) -> int:
  """A bound of the size of a formatted text: every field has the size of the largest value or width."""
  fields = re.findall(r"\{[^}]*|%[^a-zA-Z]*", form)
  widths = [int(number) for field in fields for number in re.findall(r"\d{1,9}", field)]
  if any("*" in field or "{" in field[1:] for field in fields):  # a width is an argument
    widths += [abs(each) for each in arguments if isinstance(each, int)]
  most = max((*widths, *(_size(each) for each in arguments if not isinstance(each, int))), default=0)
  return len(form) + len(fields) * most


def _limited(name: str, function: Any) -> Callable[..., Any]:
  """A filter or test with limits."""
  # Jinja passes its context, or itself, to some, before the value.
  first = 0 if getattr(function, "jinja_pass_arg", None) is None else 1

  @functools.wraps(function)
  def run(*args: Any, **kwargs: Any) -> Any:
    _check(name, args[first], (*args[first + 1 :], *kwargs.values()))
    return _paid(function(*args, **kwargs))

  return run
