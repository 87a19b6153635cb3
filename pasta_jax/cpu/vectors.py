"""Products of a few rows with a block of a matrix, and weights of attention, in vector instructions that LLVM makes for
this machine.

A panel is 64 columns of a matrix. `multiply` adds to the panel's sums, [rows, 64] float32, the product of some
columns of x with as many rows of the panel; the sums stay in registers in between. Machines with a dot product of
pairs of bfloat16 (AVX-512 BF16) take two rows of the matrix at a time, others multiply in float32, into which both
formats are converted exactly.
"""

from typing import Any

from llvmlite import binding, ir
from numba import config, types
from numba.extending import intrinsic

from pasta_jax.cpu.memory import INT64, POINTER, function

BFLOAT16, INT8 = 0, 1  # formats of matrices
PANEL = 64  # columns
ROWS = (8, 4, 2, 1)  # numbers of rows that there are programs for


def _features() -> dict[str, bool]:
  """Instruction sets that numba compiles for: this machine's, or those of NUMBA_CPU_FEATURES, as "+avx2,+fma"."""
  if (given := config.CPU_FEATURES) is None:
    return binding.get_host_cpu_features()
  return {name[1:]: name[0] == "+" for name in given.split(",") if name}


_FEATURES = _features()
_WIDE = _FEATURES.get("avx512f", False)
LANES = 16 if _WIDE else 8  # float32 numbers of a vector
_REGISTERS = 32 if _WIDE or "x86" not in binding.get_default_triple() else 16
PAIRS = _WIDE and _FEATURES.get(
  "avx512bf16", False
)  # dot products of pairs, of x in bfloat16; else of x in float32

_FLOAT, _INT32, _INT16 = ir.FloatType(), ir.IntType(32), ir.IntType(16)


class _BFloat(ir.types.Type):
  """LLVM's bfloat, which llvmlite does not name."""

  def _to_string(self) -> str:
    return "bfloat"

  def __eq__(self, other: object) -> bool:
    return isinstance(other, _BFloat)

  def __hash__(self) -> int:
    return hash("bfloat")


def _vector(kind: ir.Type, lanes: int = LANES) -> ir.VectorType:
  return ir.VectorType(kind, lanes)


def _same(kind: ir.Type, value: int, lanes: int = LANES) -> ir.Constant:
  return ir.Constant(_vector(kind, lanes), [value] * lanes)


class _Code:
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
    return self.builder.shuffle_vector(a, b, ir.Constant(_vector(_INT32, len(order)), order))

  def everywhere(self, x: ir.Value) -> ir.Value:
    """A number in every lane."""
    none = ir.Constant(_vector(x.type), ir.Undefined)
    return self.shuffle(self.builder.insert_element(none, x, _INT32(0)), none, [0] * LANES)

  def floats(self, base: ir.Value, offset: Any, form: int) -> ir.Value:
    """LANES numbers of a matrix as float32."""
    if form == INT8:
      whole = self.builder.sext(self.load(base, offset, _vector(ir.IntType(8))), _vector(_INT32))
      return self.builder.sitofp(whole, _vector(_FLOAT))
    bits = self.builder.zext(self.load(base, offset, _vector(_INT16)), _vector(_INT32))
    return self.builder.bitcast(self.builder.shl(bits, _same(_INT32, 16)), _vector(_FLOAT))

  def rounded(self, x: ir.Value) -> ir.Value:
    """The bits of the nearest bfloat16 of finite numbers, ties to even."""
    b, bits = self.builder, self.builder.bitcast(x, _vector(_INT32))
    odd = b.and_(b.lshr(bits, _same(_INT32, 16)), _same(_INT32, 1))
    return b.trunc(b.lshr(b.add(bits, b.add(odd, _same(_INT32, 0x7FFF))), _same(_INT32, 16)), _vector(_INT16))

  def pairs(self, first: ir.Value, second: ir.Value, count: int, form: int) -> list[ir.Value]:
    """`count` vectors of pairs of bfloat16, one number of each of two rows. Those of a bfloat16 matrix come in the
    order of `_ordered`."""
    if form == INT8:  # eight bits are exact in bfloat16, which is the upper half of float32
      out = []
      for i in range(count):
        low, high = (
          self.builder.bitcast(self.floats(row, i * LANES, form), _vector(_INT32)) for row in (first, second)
        )
        low = self.builder.lshr(low, _same(_INT32, 16))
        out.append(self.builder.or_(low, self.builder.and_(high, _same(_INT32, -65536))))
      return out
    out, both = [], 2 * LANES
    for i in range(0, count, 2):
      a, b = (self.load(row, 2 * i * LANES, _vector(_INT16, both)) for row in (first, second))
      for half in (0, 4):
        order = [
          n for at in range(0, both, 8) for j in range(4) for n in (at + half + j, both + at + half + j)
        ]
        out.append(self.shuffle(a, b, order))
    return out

  def dot(self, sums: ir.Value, x: ir.Value, pairs: ir.Value) -> ir.Value:
    """Sums plus the dot products of pairs."""
    kind = _vector(_BFloat(), 2 * LANES)
    program = ir.FunctionType(_vector(_FLOAT), [_vector(_FLOAT), kind, kind])
    dot = function(self.builder, "llvm.x86.avx512bf16.dpbf16ps.512", program)
    return self.builder.call(dot, [sums, *(self.builder.bitcast(v, kind) for v in (x, pairs))])


def _ordered(code: _Code, sums: list[ir.Value], form: int) -> list[ir.Value]:
  """A panel's sums in the order of its columns."""
  if not PAIRS or form == INT8:
    return sums
  out = []
  for a, b in zip(sums[::2], sums[1::2]):
    for lanes in ((0, 4), (8, 12)):
      out.append(code.shuffle(a, b, [n + i for at in lanes for n in (at, LANES + at) for i in range(4)]))
  return out


def _together(rows: int) -> int:
  """Vectors of the panel whose sums are in registers at once, with as many of the matrix, and one of x."""
  count = PANEL // LANES
  while count > 1 and (rows + 1) * count + 1 > _REGISTERS:
    count //= 2
  return count


@intrinsic(prefer_literal=True)
def multiply(context, rows, form, x, x_stride, matrix, stride, sums, count):
  """sums [rows, 64] += x [rows, count] @ matrix [count, 64], all by their addresses; strides are bytes between rows.

  `rows` is a constant of `ROWS`, `form` one of the formats. x is bfloat16 where `PAIRS`, otherwise float32; `count`
  is even.
  """
  many, kind = rows.literal_value, form.literal_value
  width, x_width = (1 if kind == INT8 else 2), (2 if PAIRS else 4)
  together, step = _together(many), 2

  def code(target, builder, signature, values):
    _, _, x, x_stride, matrix, stride, sums, count = values
    x, matrix, sums = (builder.inttoptr(v, POINTER) for v in (x, matrix, sums))
    c = _Code(builder)
    places = [(r, v) for r in range(many) for v in range(together)]
    for start in range(0, PANEL // LANES, together):
      offset = lambda r, v, start=start: 4 * (PANEL * r + LANES * (start + v))
      before = builder.block
      first = [c.load(sums, offset(r, v), _vector(_FLOAT)) for r, v in places]
      loop, end = builder.append_basic_block(), builder.append_basic_block()
      builder.branch(loop)
      builder.position_at_end(loop)
      at = builder.phi(INT64)
      at.add_incoming(INT64(0), before)
      held = [builder.phi(_vector(_FLOAT)) for _ in places]
      for phi, value in zip(held, first):
        phi.add_incoming(value, before)
      lines = [builder.gep(matrix, [builder.mul(builder.add(at, INT64(k)), stride)]) for k in range(step)]
      lines = [builder.gep(line, [INT64(width * LANES * start)]) for line in lines]
      place = lambda r, k, at=at: builder.add(
        builder.mul(x_stride, INT64(r)), builder.mul(builder.add(at, INT64(k)), INT64(x_width))
      )
      new = list(held)
      if PAIRS:
        pairs = c.pairs(*lines, together, kind)
        for r in range(many):
          both = c.everywhere(c.load(x, place(r, 0), _INT32))
          for v in range(together):
            new[r * together + v] = c.dot(new[r * together + v], both, pairs[v])
      else:
        for k, line in enumerate(lines):
          block = [c.floats(line, width * LANES * v, kind) for v in range(together)]
          for r in range(many):
            one = c.everywhere(c.load(x, place(r, k), _FLOAT))
            for v in range(together):
              product = builder.fmul(one, block[v], flags=("contract",))
              new[r * together + v] = builder.fadd(new[r * together + v], product, flags=("contract",))
      after = builder.add(at, INT64(step))
      at.add_incoming(after, builder.block)
      for phi, value in zip(held, new):
        phi.add_incoming(value, builder.block)
      builder.cbranch(builder.icmp_signed("<", after, count), loop, end)
      builder.position_at_end(end)
      for (r, v), value in zip(places, new):
        c.store(value, sums, offset(r, v))
    return target.get_dummy_value()

  given = [types.int64] * 6
  return types.void(rows, form, *given), code


@intrinsic(prefer_literal=True)
def put(context, form, sums, scale, out):
  """Writes a row of a panel's sums [64] to `out`, in the order of its columns, times the scales [64] at the address
  `scale` for a matrix in 8 bits."""
  kind = form.literal_value

  def code(target, builder, signature, values):
    _, sums, scale, out = values
    sums, scale, out = (builder.inttoptr(v, POINTER) for v in (sums, scale, out))
    c = _Code(builder)
    held = [c.load(sums, 4 * at, _vector(_FLOAT)) for at in range(0, PANEL, LANES)]
    for i, value in enumerate(_ordered(c, held, kind)):
      if kind == INT8:
        value = builder.fmul(value, c.load(scale, 4 * LANES * i, _vector(_FLOAT)))
      c.store(value, out, 4 * LANES * i)
    return target.get_dummy_value()

  return types.void(form, types.int64, types.int64, types.int64), code


_LOG2_E, _LN2_HIGH, _LN2_LOW = (
  1.44269504088896341,
  0.693359375,
  -2.12194440e-4,
)  # ln 2 in two parts: exact products
_EXP = (
  1 / 5040,
  1 / 720,
  1 / 120,
  1 / 24,
  1 / 6,
  1 / 2,
  1.0,
  1.0,
)  # Taylor's coefficients of exp on ±ln(2)/2
_LEAST = -87.0  # exp is a normal float32 down to here


def _numbers(value: float) -> ir.Constant:
  return ir.Constant(_vector(_FLOAT), [value] * LANES)


def _exp(c: _Code, x: ir.Value) -> ir.Value:
  """exp of numbers that are not above 0, to about 1e-7 of it; below `_LEAST` that of `_LEAST`."""
  b = c.builder
  x = b.select(b.fcmp_ordered("<", x, _numbers(_LEAST)), _numbers(_LEAST), x)
  name = f"llvm.rint.v{LANES}f32"
  whole = b.call(function(b, name, ir.FunctionType(x.type, [x.type])), [b.fmul(x, _numbers(_LOG2_E))])
  rest = b.fsub(b.fsub(x, b.fmul(whole, _numbers(_LN2_HIGH))), b.fmul(whole, _numbers(_LN2_LOW)))
  out = _numbers(_EXP[0])
  for coefficient in _EXP[1:]:
    out = b.fadd(b.fmul(out, rest), _numbers(coefficient))
  power = b.shl(b.add(b.fptosi(whole, _vector(_INT32)), _same(_INT32, 127)), _same(_INT32, 23))
  return b.fmul(out, b.bitcast(power, _vector(_FLOAT)))


def _reduced(c: _Code, x: ir.Value, add: bool) -> ir.Value:
  """The sum of a vector's numbers, or the largest one."""
  b, lanes = c.builder, LANES
  while lanes > 1:
    lanes //= 2
    other = c.shuffle(x, x, [(i + lanes) % LANES for i in range(LANES)])
    x = b.fadd(x, other) if add else b.select(b.fcmp_ordered(">", x, other), x, other)
  return b.extract_element(x, _INT32(0))


def _over(c: _Code, count: ir.Value, first: ir.Value, step: Any) -> ir.Value:
  """A loop over `count` entries, LANES at a time, with a value: step(index, value) gives the next one."""
  b, before = c.builder, c.builder.block
  loop, end = b.append_basic_block(), b.append_basic_block()
  b.branch(loop)
  b.position_at_end(loop)
  at, value = b.phi(INT64), b.phi(first.type)
  at.add_incoming(INT64(0), before)
  value.add_incoming(first, before)
  new, after = step(at, value), b.add(at, INT64(LANES))
  at.add_incoming(after, b.block)
  value.add_incoming(new, b.block)
  b.cbranch(b.icmp_signed("<", after, count), loop, end)
  b.position_at_end(end)
  return new


def _shown(c: _Code, mask: ir.Value, at: ir.Value) -> ir.Value:
  return c.builder.icmp_unsigned("!=", c.load(mask, at, _vector(ir.IntType(8))), _same(ir.IntType(8), 0))


LOWEST = -3.0e38  # the peak where nothing is visible


@intrinsic
def highest(context, scores, mask, count):
  """The largest of `count` scores, float32, whose byte of the mask is not 0; LOWEST if none is."""

  def code(target, builder, signature, values):
    scores, mask = (builder.inttoptr(v, POINTER) for v in values[:2])
    c = _Code(builder)

    def step(at, peak):
      x = c.load(scores, builder.mul(at, INT64(4)), _vector(_FLOAT))
      more = builder.and_(_shown(c, mask, at), builder.fcmp_ordered(">", x, peak))
      return builder.select(more, x, peak)

    return _reduced(c, _over(c, values[2], _numbers(LOWEST), step), add=False)

  return types.float32(types.int64, types.int64, types.int64), code


@intrinsic
def weigh(context, scores, mask, count, peak, weights):
  """Writes exp(score - peak) of `count` scores to `weights`, 0 where the byte of the mask is 0, in the dtype of x in
  `multiply`, and returns their sum before that rounding."""

  def code(target, builder, signature, values):
    scores, mask, weights = (builder.inttoptr(values[i], POINTER) for i in (0, 1, 4))
    c = _Code(builder)
    highest = c.everywhere(values[3])

    def step(at, total):
      x = c.load(scores, builder.mul(at, INT64(4)), _vector(_FLOAT))
      weight = _exp(c, builder.fsub(x, highest))
      weight = builder.select(_shown(c, mask, at), weight, _numbers(0.0))
      if PAIRS:
        c.store(c.rounded(weight), weights, builder.mul(at, INT64(2)))
      else:
        c.store(weight, weights, builder.mul(at, INT64(4)))
      return builder.fadd(total, weight)

    return _reduced(c, _over(c, values[2], _numbers(0.0), step), add=True)

  given = [types.int64, types.int64, types.int64, types.float32, types.int64]
  return types.float32(*given), code


def _bfloats(c: _Code, base: ir.Value, at: ir.Value) -> ir.Value:
  """LANES numbers of an array in bfloat16, from the entry `at` on, as float32."""
  return c.floats(base, c.builder.mul(at, INT64(2)), BFLOAT16)


@intrinsic
def dot(context, a, b, count):
  """The sum of products of `count` numbers in bfloat16."""

  def code(target, builder, signature, values):
    a, b = (builder.inttoptr(v, POINTER) for v in values[:2])
    c = _Code(builder)
    step = lambda at, total: builder.fadd(total, builder.fmul(_bfloats(c, a, at), _bfloats(c, b, at)))
    return _reduced(c, _over(c, values[2], _numbers(0.0), step), add=True)

  return types.float32(types.int64, types.int64, types.int64), code


@intrinsic
def begin(context, out, x, count, factor):
  """out = factor * x, of `count` numbers: `out` float32, x bfloat16."""

  def code(target, builder, signature, values):
    out, x = (builder.inttoptr(v, POINTER) for v in values[:2])
    c = _Code(builder)
    factor = c.everywhere(values[3])

    def step(at, same):
      c.store(builder.fmul(factor, _bfloats(c, x, at)), out, builder.mul(at, INT64(4)))
      return same

    _over(c, values[2], _numbers(0.0), step)
    return target.get_dummy_value()

  return types.void(types.int64, types.int64, types.int64, types.float32), code


@intrinsic
def round_to(context, x, out, count, factor):
  """Writes factor * x, of `count` numbers in float32, to `out` in bfloat16."""

  def code(target, builder, signature, values):
    x, out = (builder.inttoptr(v, POINTER) for v in values[:2])
    c = _Code(builder)
    factor = c.everywhere(values[3])

    def step(at, same):
      value = builder.fmul(factor, c.load(x, builder.mul(at, INT64(4)), _vector(_FLOAT)))
      c.store(c.rounded(value), out, builder.mul(at, INT64(2)))
      return same

    _over(c, values[2], _numbers(0.0), step)
    return target.get_dummy_value()

  return types.void(types.int64, types.int64, types.int64, types.float32), code


@intrinsic
def mix(context, out, x, count, factor):
  """out += factor * x, of `count` numbers in float32."""

  def code(target, builder, signature, values):
    out, x = (builder.inttoptr(v, POINTER) for v in values[:2])
    c = _Code(builder)
    factor = c.everywhere(values[3])

    def step(at, same):
      where = builder.mul(at, INT64(4))
      before, more = (c.load(base, where, _vector(_FLOAT)) for base in (out, x))
      c.store(builder.fadd(before, builder.fmul(factor, more)), out, where)
      return same

    _over(c, values[2], _numbers(0.0), step)
    return target.get_dummy_value()

  return types.void(types.int64, types.int64, types.int64, types.float32), code


SILU, GELU = 0, 1  # activations; GELU by its approximation with tanh


def _activated(c: _Code, x: ir.Value, activation: int) -> ir.Value:
  """x times the sigmoid of x (SiLU), or of what gives GELU."""
  b, s = c.builder, x
  if activation == GELU:  # (1 + tanh(y)) / 2 is the sigmoid of 2 y
    cubed = b.fmul(b.fmul(x, x), b.fmul(x, _numbers(0.044715)))
    s = b.fmul(_numbers(2 * 0.7978845608028654), b.fadd(x, cubed))
  positive = b.fcmp_ordered(">=", s, _numbers(0.0))
  small = _exp(c, b.select(positive, b.fneg(s), s))
  return b.fmul(x, b.fdiv(b.select(positive, _numbers(1.0), small), b.fadd(_numbers(1.0), small)))


@intrinsic(prefer_literal=True)
def put_gated(context, form, activation, gate, up, gate_scale, up_scale, out):
  """Writes the activation of a row of one panel's sums times those of another to `out`, in bfloat16, in the order of
  the columns; scales as in `put`."""
  kind, which = form.literal_value, activation.literal_value

  def code(target, builder, signature, values):
    gate, up, gate_scale, up_scale, out = (builder.inttoptr(v, POINTER) for v in values[2:])
    c = _Code(builder)
    both = []
    for sums, scale in ((gate, gate_scale), (up, up_scale)):
      held = _ordered(c, [c.load(sums, 4 * at, _vector(_FLOAT)) for at in range(0, PANEL, LANES)], kind)
      if kind == INT8:
        held = [builder.fmul(v, c.load(scale, 4 * LANES * i, _vector(_FLOAT))) for i, v in enumerate(held)]
      both.append(held)
    for i, (g, u) in enumerate(zip(*both)):
      c.store(c.rounded(builder.fmul(_activated(c, g, which), u)), out, 2 * LANES * i)
    return target.get_dummy_value()

  return types.void(form, activation, *[types.int64] * 5), code


@intrinsic
def normalise(context, x, scale, out, count, epsilon):
  """out = x / sqrt(mean(x²) + epsilon) * scale, of `count` numbers in float32; `out` is bfloat16."""

  def code(target, builder, signature, values):
    x, scale, out = (builder.inttoptr(v, POINTER) for v in values[:3])
    c = _Code(builder)
    place = lambda at: builder.mul(at, INT64(4))

    def squares(at, total):
      value = c.load(x, place(at), _vector(_FLOAT))
      return builder.fadd(total, builder.fmul(value, value))

    total = _reduced(c, _over(c, values[3], _numbers(0.0), squares), add=True)
    mean = builder.fadd(builder.fdiv(total, builder.sitofp(values[3], _FLOAT)), values[4])
    root = function(builder, "llvm.sqrt.f32", ir.FunctionType(_FLOAT, [_FLOAT]))
    factor = c.everywhere(builder.fdiv(_FLOAT(1.0), builder.call(root, [mean])))

    def write(at, same):
      value, by = (c.load(base, place(at), _vector(_FLOAT)) for base in (x, scale))
      c.store(c.rounded(builder.fmul(builder.fmul(value, factor), by)), out, builder.mul(at, INT64(2)))
      return same

    _over(c, values[3], _numbers(0.0), write)
    return target.get_dummy_value()

  return types.void(*[types.int64] * 4, types.float32), code
