"""Products of a few rows with a panel, 64 columns of a matrix, and what becomes of their sums.

`multiply` adds to the panel's sums, [rows, 64] float32, the product of some columns of x with as many rows of the
panel; the sums stay in registers in between. Machines with a dot product of pairs of bfloat16 take two rows of the
matrix at a time, others multiply in float32, into which both formats are converted exactly.
"""

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pasta_jax.cpu.memory import INT64, POINTER
from pasta_jax.cpu.vectors import (
  FLOAT,
  INT8,
  INT32,
  LANES,
  PAIRS,
  REGISTERS,
  Code,
  exp,
  numbers,
  over,
  vector,
)  # fmt: skip

PANEL = 64  # columns
# (row of x, 0 or 1 for one of two neighbouring numbers of it) -> address and offset
Number = Callable[[int, int], tuple[ir.Value, ir.Value]]
ROWS = (8, 4, 2, 1)  # numbers of rows that there are programs for
SILU, GELU = 0, 1  # activations; GELU by its approximation with tanh


def _together(rows: int) -> int:
  """Vectors of the panel whose sums are in registers at once, with as many of the matrix, and one of x."""
  count = PANEL // LANES
  while count > 1 and (rows + 1) * count + 1 > REGISTERS:
    count //= 2
  return count


def _with_pairs(
  c: Code, rows: int, together: int, form: int, x: Number, lines: list[ir.Value], sums: list
) -> None:
  """Adds two rows of the matrix, by pairs, to the sums of `together` vectors of each row, in place."""
  pairs = c.pairs(lines[0], lines[1], together, form)
  for r in range(rows):
    both = c.everywhere(c.load(*x(r, 0), INT32))
    for v in range(together):
      sums[r * together + v] = c.dot(sums[r * together + v], both, pairs[v])


def _with_floats(
  c: Code, rows: int, together: int, form: int, x: Number, lines: list[ir.Value], sums: list
) -> None:
  """The same in float32, one row after the other."""
  for k, line in enumerate(lines):
    block = [c.floats(line, (1 if form == INT8 else 2) * LANES * v, form) for v in range(together)]
    for r in range(rows):
      one = c.everywhere(c.load(*x(r, k), FLOAT))
      for v in range(together):
        product = c.builder.fmul(one, block[v], flags=("contract",))
        sums[r * together + v] = c.builder.fadd(sums[r * together + v], product, flags=("contract",))


@intrinsic(prefer_literal=True)
def multiply(context, rows, form, x, x_stride, matrix, stride, sums, count):
  """sums [rows, 64] += x [rows, count] @ matrix [count, 64], all by their addresses; strides are bytes between rows.

  `rows` is a constant of `ROWS`, `form` one of the formats. x is bfloat16 where `PAIRS`, otherwise float32; `count`
  is even.
  """
  many, kind = rows.literal_value, form.literal_value
  width, x_width = (1 if kind == INT8 else 2), (2 if PAIRS else 4)
  together, add = _together(many), _with_pairs if PAIRS else _with_floats

  def code(target, b, signature, values):
    _, _, x, x_stride, matrix, stride, sums, count = values
    x, matrix, sums = (b.inttoptr(v, POINTER) for v in (x, matrix, sums))
    c = Code(b)
    for start in range(0, PANEL // LANES, together):
      places = [4 * (PANEL * r + LANES * (start + v)) for r in range(many) for v in range(together)]
      first = [c.load(sums, place, vector(FLOAT)) for place in places]

      def two_rows(at, held, start=start):
        rows = [b.add(at, INT64(k)) for k in range(2)]
        lines = [b.gep(matrix, [b.add(b.mul(row, stride), INT64(width * LANES * start))]) for row in rows]
        number = lambda n, k, rows=rows: (x, b.add(b.mul(x_stride, INT64(n)), b.mul(rows[k], INT64(x_width))))
        new = list(held)
        add(c, many, together, kind, number, lines, new)
        return new

      for place, value in zip(places, over(c, count, first, two_rows, 2)):
        c.store(value, sums, place)
    return target.get_dummy_value()

  return types.void(rows, form, *[types.int64] * 6), code


def _ordered(code: Code, sums: list[ir.Value], form: int) -> list[ir.Value]:
  """A panel's sums in the order of its columns."""
  if not PAIRS or form == INT8:
    return sums
  out = []
  for a, b in zip(sums[::2], sums[1::2]):
    for lanes in ((0, 4), (8, 12)):
      out.append(code.shuffle(a, b, [n + i for at in lanes for n in (at, LANES + at) for i in range(4)]))
  return out


@intrinsic(prefer_literal=True)
def put(context, form, sums, scale, out):
  """Writes a row of a panel's sums [64] to `out`, in the order of its columns, times the scales [64] at the address
  `scale` for a matrix in 8 bits."""
  kind = form.literal_value

  def code(target, builder, signature, values):
    _, sums, scale, out = values
    sums, scale, out = (builder.inttoptr(v, POINTER) for v in (sums, scale, out))
    c = Code(builder)
    held = [c.load(sums, 4 * at, vector(FLOAT)) for at in range(0, PANEL, LANES)]
    for i, value in enumerate(_ordered(c, held, kind)):
      if kind == INT8:
        value = builder.fmul(value, c.load(scale, 4 * LANES * i, vector(FLOAT)))
      c.store(value, out, 4 * LANES * i)
    return target.get_dummy_value()

  return types.void(form, types.int64, types.int64, types.int64), code


def _activated(c: Code, x: ir.Value, activation: int) -> ir.Value:
  """x times the sigmoid of x (SiLU), or of what gives GELU."""
  b, s = c.builder, x
  if activation == GELU:  # (1 + tanh(y)) / 2 is the sigmoid of 2 y
    cubed = b.fmul(b.fmul(x, x), b.fmul(x, numbers(0.044715)))
    s = b.fmul(numbers(2 * 0.7978845608028654), b.fadd(x, cubed))
  positive = b.fcmp_ordered(">=", s, numbers(0.0))
  small = exp(c, b.select(positive, b.fneg(s), s))
  return b.fmul(x, b.fdiv(b.select(positive, numbers(1.0), small), b.fadd(numbers(1.0), small)))


@intrinsic(prefer_literal=True)
def put_gated(context, form, activation, gate, up, gate_scale, up_scale, out):
  """Writes the activation of a row of one panel's sums times those of another to `out`, in bfloat16, in the order of
  the columns; scales as in `put`."""
  kind, which = form.literal_value, activation.literal_value

  def code(target, builder, signature, values):
    gate, up, gate_scale, up_scale, out = (builder.inttoptr(v, POINTER) for v in values[2:])
    c = Code(builder)
    both = []
    for sums, scale in ((gate, gate_scale), (up, up_scale)):
      held = _ordered(c, [c.load(sums, 4 * at, vector(FLOAT)) for at in range(0, PANEL, LANES)], kind)
      if kind == INT8:
        held = [builder.fmul(v, c.load(scale, 4 * LANES * i, vector(FLOAT))) for i, v in enumerate(held)]
      both.append(held)
    for i, (g, u) in enumerate(zip(*both)):
      c.store(c.rounded(builder.fmul(_activated(c, g, which), u)), out, 2 * LANES * i)
    return target.get_dummy_value()

  return types.void(form, activation, *[types.int64] * 5), code
