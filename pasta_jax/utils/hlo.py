"""Reads the text of a compiled module (optimised HLO): which kernels a loop runs, what its devices send each other.

A kernel here is an instruction that does something when it runs: a fusion, a product, a copy, a custom call, a
collective. Parameters, constants, tuples and bitcasts do nothing, and transfers to faster memory run beside others.
What is called is counted where it is called, a loop of known length as often as it turns, of a conditional the largest
branch.

Bytes are those that kernels read and write in a device's main memory, as XLA's own cost analysis counts them, which
not every backend offers: of an array that is sliced or gathered from, or updated in place, only that part.
"""

import collections
import dataclasses
import math
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
_SHAPE = re.compile(r"\b(pred|token|bf16|[suf]\d+|f8\w*|c\d+)\[([\d,]*)\](\{[^}]*\})?")
_FASTER = re.compile(r"S\([1-9]")  # a layout's memory space: not main memory
_TRANSFERS = ("copy-start", "slice-start")
_SLICES = {"dynamic-slice", "slice", "gather"}
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
    """Bytes of the result in main memory."""
    return sum(_bytes(*found) for found in _SHAPE.findall(self.shape))

  @property
  def size(self) -> int:
    """Bytes of the result, wherever it is."""
    return sum(_bytes(kind, dims, "") for kind, dims, _ in _SHAPE.findall(self.shape))

  @property
  def operands(self) -> list[str]:
    """Their names."""
    end, depth = 0, 1
    for end, letter in enumerate(self.rest):  # noqa: B007
      depth += (letter == "(") - (letter == ")")
      if not depth:
        break
    return re.findall(r"%([\w.\-]+)", self.rest[:end])

  @property
  def trips(self) -> int | None:
    """How often a loop turns, if the compiler knows."""
    found = _TRIPS.search(self.rest)
    return int(found[1]) if found else None


def _bytes(kind: str, dims: str, layout: str) -> int:
  if _FASTER.search(layout):
    return 0
  bits = _BITS[kind] if kind in _BITS else int((re.search(r"\d+", kind) or ["8"])[0])
  return math.prod(map(int, filter(None, dims.split(",")))) * bits // 8


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
      if i.opcode in (*_IDLE, *_TRANSFERS) or i.opcode.endswith(("-done", "-update")):
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

  def bytes(self, computation: str) -> int:
    """What the kernels of a computation, and of what it calls, read and write in main memory."""
    total = 0
    for i in self.computations[computation]:
      parts = [self.bytes(name) for name in self.called(i)]
      if i.opcode == "while":
        total += sum(parts) * (i.trips or 1)
      elif i.opcode == "conditional" and parts:
        total += max(parts)
      elif parts:
        total += sum(parts)
      elif i.opcode not in _IDLE and not i.opcode.endswith(("-done", "-update")):
        total += self._kernel_bytes(i, computation)
    return total

  def _kernel_bytes(self, i: Instruction, computation: str) -> int:
    of = {j.name: j for j in self.computations[computation]}
    operands = [of[name] for name in i.operands if name in of]
    if i.opcode in _SLICES:
      return i.bytes + (i.size if operands and operands[0].bytes else 0)
    if i.opcode in _TRANSFERS:  # the result is in a tuple with the operand
      first, second = _SHAPE.findall(i.shape)[:2]
      result, source = (first, second) if i.opcode == "copy-start" else (second, first)
      kind, dims, _ = result
      return _bytes(*result) + (_bytes(kind, dims, "") if _bytes(*source) else 0)
    if i.opcode in ("dynamic-update-slice", "scatter"):
      return 2 * sum(j.bytes for j in operands[1:])
    if i.opcode != "fusion":
      return i.bytes + sum(j.bytes for j in operands)
    inside = self.computations[re.findall(r"calls=%?([\w.\-]+)", i.rest)[0]]
    parameters = sorted(
      (j for j in inside if j.opcode == "parameter"), key=lambda j: int(j.rest.split(")")[0])
    )
    read = sum(_part_read(p.name, o.bytes, inside) for p, o in zip(parameters, operands))
    return read + (_part_written(inside[-1], {j.name: j for j in inside}) if i.bytes else 0)

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
        found[kind] = (number + 1, size + i.size)
    return found


def _part_read(name: str, size: int, inside: list[Instruction]) -> int:
  """Bytes of a fusion's parameter that it reads: all of its `size`, unless it only slices it, or updates it."""
  read = 0
  for user in inside:
    if name not in user.operands:
      continue
    if user.opcode == "bitcast":
      read += _part_read(user.name, size, inside)
    elif user.opcode in _SLICES and user.operands[0] == name:
      read += user.bytes
    elif user.opcode not in ("dynamic-update-slice", "scatter") or user.operands[0] != name:
      return size
  return min(read, size)


def _part_written(root: Instruction, inside: dict[str, Instruction]) -> int:
  """Bytes that a fusion writes, of which `root` is the result."""
  if root.opcode == "tuple":
    return sum(_part_written(inside[name], inside) for name in root.operands if name in inside)
  if root.opcode in ("bitcast", "convert") and root.operands and root.operands[0] in inside:
    written = _part_written(inside[root.operands[0]], inside)
    return min(written, root.bytes)
  if root.opcode in ("dynamic-update-slice", "scatter"):
    return inside[root.operands[1 if root.opcode == "dynamic-update-slice" else -1]].bytes
  return root.bytes


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
