"""Reads the text of a compiled module (optimised HLO): which kernels a loop runs, what its devices send each other.

A kernel here is an instruction that does something when it runs: a fusion, a product, a copy, a custom call, a
collective. Parameters, constants, tuples and bitcasts do nothing. What is called is counted where it is called, a
loop of known length as often as it turns, of a conditional the largest branch.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Opcodes through which the host takes part in a program.
HOST = ("infeed", "outfeed", "send", "recv", "send-done", "recv-done")
_IDLE = {
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
  "opt-barrier", "add-dependency", "iota",
}  # fmt: skip
_BITS = {"pred": 8, "bf16": 16, "token": 0}
_SHAPE = re.compile(r"\b(pred|token|bf16|[suf]\d+|f8\w*|c\d+)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:to_apply|calls|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation."""

  name: str
  opcode: str
  shape: str  # the result's type, as it stands there
  rest: str  # operands and attributes

  @property
  def bytes(self) -> int:
    """Bytes of the result."""
    return sum(_bytes(kind, dims) for kind, dims in _SHAPE.findall(self.shape))

  @property
  def trips(self) -> int | None:
    """How often a loop turns, if the compiler knows."""
    found = _TRIPS.search(self.rest)
    return int(found[1]) if found else None


def _bytes(kind: str, dims: str) -> int:
  bits = _BITS.get(kind) if kind in _BITS else int((re.search(r"\d+", kind) or ["8"])[0])
  count = 1
  for n in filter(None, dims.split(",")):
    count *= int(n)
  return count * (bits or 0) // 8


@dataclasses.dataclass(frozen=True)
class Module:
  """The computations of a module by name; `entry` names the first to run."""

  computations: dict[str, list[Instruction]]
  entry: str

  @classmethod
  def parse(cls, text: str) -> "Module":
    """Of `jax.stages.Compiled.as_text()`."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
      if header := _HEADER.match(line):
        current = computations.setdefault(header[2], [])
        entry = header[2] if header[1] else entry
      elif current is not None and (instruction := _parse(line)) is not None:
        current.append(instruction)
    return cls(computations, entry)

  def called(self, i: Instruction) -> list[str]:
    """The computations that an instruction names, without those of fusions and reductions."""
    if i.opcode not in ("while", "conditional", "call", "async-start"):
      return []
    names = _CALLED.findall(i.rest)
    for listed in _BRANCHES.findall(i.rest):
      names += [name.strip(" %") for name in listed.split(",")]
    return [name for name in names if name in self.computations]

  def kernels(self, computation: str) -> collections.Counter:
    """How often each opcode runs in a computation and in what it calls; a loop of unknown length turns once."""
    total: collections.Counter = collections.Counter()
    for i in self.computations[computation]:
      if i.opcode in _IDLE or i.opcode.endswith(("-done", "-update")):
        continue
      parts = [self.kernels(name) for name in self.called(i)]
      if i.opcode == "while":
        for part in parts:
          total.update({op: n * (i.trips or 1) for op, n in part.items()})
      elif i.opcode == "conditional" and parts:
        total.update(max(parts, key=lambda part: sum(part.values())))
      elif parts:
        for part in parts:
          total.update(part)
      else:
        total[i.opcode.removesuffix("-start")] += 1
    return total

  def instructions(self, computation: str) -> Iterator[Instruction]:
    """Those of a computation and of all that it calls."""
    for i in self.computations[computation]:
      yield i
      for name in self.called(i):
        yield from self.instructions(name)

  def loops(self, computation: str | None = None) -> list[Instruction]:
    """The loops in a computation, the outer ones first."""
    return [i for i in self.instructions(computation or self.entry) if i.opcode == "while"]

  def body(self, loop: Instruction) -> str:
    """The computation that a loop repeats."""
    found = re.search(r"body=%?([\w.\-]+)", loop.rest)
    assert found is not None, loop
    return found[1]

  def collectives(self, computation: str) -> dict[str, tuple[int, int]]:
    """Kind -> (number, bytes of the results) of the collectives in a computation."""
    found: dict[str, tuple[int, int]] = {}
    for i in self.instructions(computation):
      kind = i.opcode.removesuffix("-start")
      if kind in COLLECTIVES:
        number, size = found.get(kind, (0, 0))
        found[kind] = (number + 1, size + i.bytes)
    return found


def _parse(line: str) -> Instruction | None:
  """An instruction, such as `  %x = f32[2]{0} add(%a, %b), metadata={…}`."""
  name, equals, rest = line.strip().removeprefix("ROOT ").partition(" = ")
  if not equals or not re.fullmatch(r"%?[\w.\-]+", name):
    return None
  end, depth = 0, 0
  for end, letter in enumerate(rest):  # noqa: B007  # a tuple's type has blanks
    depth += (letter in "({[") - (letter in ")}]")
    if letter == " " and depth == 0:
      break
  opcode, bracket, arguments = rest[end:].strip().partition("(")
  return Instruction(name.lstrip("%"), opcode, rest[:end], arguments) if bracket else None
