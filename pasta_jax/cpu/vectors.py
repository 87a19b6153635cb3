"""Vector instructions that LLVM makes for this machine, for the intrinsics of `panels` and `rows`."""

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba import config
from numba.core.codegen import get_host_cpu_features

from pasta_jax.cpu.memory import INT64, function

BFLOAT16, INT8 = 0, 1  # formats of matrices


def _features() -> set[str]:
  """Instruction sets that numba compiles for: this machine's, or those of NUMBA_CPU_FEATURES, as "+avx2,+fma"."""
  given: str | None = config.CPU_FEATURES  # type: ignore[attr-defined]
  every = get_host_cpu_features() if given is None else given
  return {name[1:] for name in every.split(",") if name.startswith("+")}


_FEATURES, _X86 = _features(), "86" in binding.get_default_triple().split("-")[0]
_WIDE = "avx512f" in _FEATURES
LANES = 16 if _WIDE else 8 if _X86 else 4  # float32 numbers of a vector
REGISTERS = 16 if _X86 and not _WIDE else 32
# Dot products of pairs of bfloat16 (AVX-512 BF16); otherwise products of float32.
PAIRS = _WIDE and "avx512bf16" in _FEATURES

FLOAT, INT32, INT16 = ir.FloatType(), ir.IntType(32), ir.IntType(16)

_LOG2_E = 1.44269504088896341
_LN2 = 0.693359375, -2.12194440e-4  # in two parts: products with the first one are exact
_EXP = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)  # of Taylor, on ±ln(2)/2
_LEAST = -87.0  # exp is a normal float32 down to here


class _BFloat(ir.types.Type):
  """LLVM's bfloat, which llvmlite does not name."""

  def _to_string(self) -> str:
    return "bfloat"

  def __eq__(self, other: object) -> bool:
    return isinstance(other, _BFloat)

  def __hash__(self) -> int:
    return hash("bfloat")


def vector(kind: ir.Type, lanes: int = LANES) -> ir.VectorType:
  return ir.VectorType(kind, lanes)


def same(kind: ir.Type, value: int, lanes: int = LANES) -> ir.Constant:
  """A constant integer in every lane."""
  return ir.Constant(vector(kind, lanes), [value] * lanes)


def numbers(value: float) -> ir.Constant:
  """A constant float32 in every lane."""
  return ir.Constant(vector(FLOAT), [value] * LANES)


class Code:
  """Instructions on vectors."""

  def __init__(self, builder: ir.IRBuilder):
    self.builder = builder

  def load(self, base: ir.Value, offset: Any, kind: ir.Type) -> ir.Value:
    """The vector or number `offset` bytes after `base`."""
    return self.builder.load(self._at(base, offset, kind), align=1)

  def store(self, value: ir.Value, base: ir.Value, offset: Any) -> None:
    self.builder.store(value, self._at(base, offset, value.type), align=1)

  def _at(self, base: ir.Value, offset: Any, kind: ir.Type) -> ir.Value:
    offset = INT64(offset) if isinstance(offset, int) else offset
    return self.builder.bitcast(self.builder.gep(base, [offset]), kind.as_pointer())

  def shuffle(self, a: ir.Value, b: ir.Value, order: list[int]) -> ir.Value:
    return self.builder.shuffle_vector(a, b, ir.Constant(vector(INT32, len(order)), order))

  def everywhere(self, x: ir.Value) -> ir.Value:
    """A number in every lane."""
    none = ir.Constant(vector(x.type), ir.Undefined)
    return self.shuffle(self.builder.insert_element(none, x, INT32(0)), none, [0] * LANES)

  def floats(self, base: ir.Value, offset: Any, form: int) -> ir.Value:
    """LANES numbers of a matrix as float32."""
    if form == INT8:
      whole = self.builder.sext(self.load(base, offset, vector(ir.IntType(8))), vector(INT32))
      return self.builder.sitofp(whole, vector(FLOAT))
    bits = self.builder.zext(self.load(base, offset, vector(INT16)), vector(INT32))
    return self.builder.bitcast(self.builder.shl(bits, same(INT32, 16)), vector(FLOAT))

  def rounded(self, x: ir.Value) -> ir.Value:
    """The bits of the nearest bfloat16 of finite numbers, ties to even."""
    b, bits = self.builder, self.builder.bitcast(x, vector(INT32))
    odd = b.and_(b.lshr(bits, same(INT32, 16)), same(INT32, 1))
    return b.trunc(b.lshr(b.add(bits, b.add(odd, same(INT32, 0x7FFF))), same(INT32, 16)), vector(INT16))

  def pairs(self, first: ir.Value, second: ir.Value, count: int, form: int) -> list[ir.Value]:
    """`count` vectors of pairs of bfloat16, one number of each of two rows. Those of a bfloat16 matrix come in the
    order of `panels.ordered`."""
    if form == INT8:  # eight bits are exact in bfloat16, which is the upper half of float32
      out = []
      for i in range(count):
        low, high = (
          self.builder.bitcast(self.floats(row, i * LANES, form), vector(INT32)) for row in (first, second)
        )
        low = self.builder.lshr(low, same(INT32, 16))
        out.append(self.builder.or_(low, self.builder.and_(high, same(INT32, -65536))))
      return out
    out, both = [], 2 * LANES
    for i in range(0, count, 2):
      a, b = (self.load(row, 2 * i * LANES, vector(INT16, both)) for row in (first, second))
      for half in (0, 4):
        order = [
          n for at in range(0, both, 8) for j in range(4) for n in (at + half + j, both + at + half + j)
        ]
        out.append(self.shuffle(a, b, order))
    return out

  def dot(self, sums: ir.Value, x: ir.Value, pairs: ir.Value) -> ir.Value:
    """Sums plus the dot products of pairs."""
    kind = vector(_BFloat(), 2 * LANES)
    program = ir.FunctionType(vector(FLOAT), [vector(FLOAT), kind, kind])
    dot = function(self.builder, "llvm.x86.avx512bf16.dpbf16ps.512", program)
    return self.builder.call(dot, [sums, *(self.builder.bitcast(v, kind) for v in (x, pairs))])


def exp(c: Code, x: ir.Value) -> ir.Value:
  """exp of numbers that are not above 0, to about 1e-7 of it; below `_LEAST` that of `_LEAST`."""
  b = c.builder
  x = b.select(b.fcmp_ordered("<", x, numbers(_LEAST)), numbers(_LEAST), x)
  name = f"llvm.rint.v{LANES}f32"
  whole = b.call(function(b, name, ir.FunctionType(x.type, [x.type])), [b.fmul(x, numbers(_LOG2_E))])
  rest = b.fsub(b.fsub(x, b.fmul(whole, numbers(_LN2[0]))), b.fmul(whole, numbers(_LN2[1])))
  out = numbers(_EXP[0])
  for coefficient in _EXP[1:]:
    out = b.fadd(b.fmul(out, rest), numbers(coefficient))
  power = b.shl(b.add(b.fptosi(whole, vector(INT32)), same(INT32, 127)), same(INT32, 23))
  return b.fmul(out, b.bitcast(power, vector(FLOAT)))


def reduced(c: Code, x: ir.Value, add: bool) -> ir.Value:
  """The sum of a vector's numbers, or the largest one."""
  b, lanes = c.builder, LANES
  while lanes > 1:
    lanes //= 2
    other = c.shuffle(x, x, [(i + lanes) % LANES for i in range(LANES)])
    x = b.fadd(x, other) if add else b.select(b.fcmp_ordered(">", x, other), x, other)
  return b.extract_element(x, INT32(0))


def over(c: Code, count: ir.Value, first: list[ir.Value], step: Callable, by: int = LANES) -> list[ir.Value]:
  """A loop over `count` entries, `by` of them at a time, at least once, that carries values: step(index, values) gives
  the next ones."""
  b, before = c.builder, c.builder.block
  loop, end = b.append_basic_block(), b.append_basic_block()
  b.branch(loop)
  b.position_at_end(loop)
  at, held = b.phi(INT64), [b.phi(value.type) for value in first]
  new, after = step(at, held), b.add(at, INT64(by))
  for phi, start, next in zip([at, *held], [INT64(0), *first], [after, *new]):
    phi.add_incoming(start, before)
    phi.add_incoming(next, b.block)
  b.cbranch(b.icmp_signed("<", after, count), loop, end)
  b.position_at_end(end)
  return new
