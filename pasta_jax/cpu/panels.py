"""Products of a few rows with a panel, 64 columns of a matrix, and what becomes of their sums.

`multiply` adds to the panel's sums, [rows, 64] float32, the product of some columns of x with as many rows of the
panel; the sums stay in registers in between. Machines with a dot product of pairs of bfloat16 take two rows of the
matrix at a time, others multiply in float32, into which both formats are converted exactly. Machines with a dot
product of four bytes multiply an int8 matrix in integers: x is split into two bytes, see `rows.split`.
"""

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pasta_jax.cpu.memory import INT64, POINTER
from pasta_jax.cpu.vectors import (
  BYTES,
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


def _with_bytes(
  c: Code, rows: int, together: int, start: int, x: Number, lines: list[ir.Value], sums: list
) -> None:
  """The same with four rows of an int8 matrix and bytes of x, in integers."""
  quads = c.quads(lines, start, together)
  for r in range(rows):
    four = c.everywhere(c.load(*x(r, 0), INT32))
    for v in range(together):
      sums[r * together + v] = c.dot_bytes(sums[r * together + v], four, quads[v])


@intrinsic(prefer_literal=True)
def multiply(context, rows, form, x, x_stride, matrix, stride, sums, count):
  """sums [rows, 64] += x [rows, count] @ matrix [count, 64], all by their addresses; strides are bytes between rows.

  `rows` is a constant of `ROWS`, `form` one of the formats. x is bfloat16 where `PAIRS`, otherwise float32, and `count`
  is even. With an int8 matrix, where `BYTES`, x is int8 and the sums are int32 of the matrix with 128 added to it;
  `count` is a multiple of four.
  """
  many, kind = rows.literal_value, form.literal_value
  together, bytes = _together(many), kind == INT8 and BYTES
  step, number = (4, INT32) if bytes else (2, FLOAT)
  width, x_width = (1 if kind == INT8 else 2), (1 if bytes else 2 if PAIRS else 4)

  def code(target, b, signature, values):
    _, _, x, x_stride, matrix, stride, sums, count = values
    x, matrix, sums = (b.inttoptr(v, POINTER) for v in (x, matrix, sums))
    c = Code(b)
    for start in range(0, PANEL // LANES, together):
      places = [4 * (PANEL * r + LANES * (start + v)) for r in range(many) for v in range(together)]
      first = [c.load(sums, place, vector(number)) for place in places]

      def some_rows(at, held, start=start):
        rows = [b.add(at, INT64(k)) for k in range(step)]
        offset = INT64(0 if bytes else width * LANES * start)
        lines = [b.gep(matrix, [b.add(b.mul(row, stride), offset)]) for row in rows]
        place = lambda n, k, rows=rows: (x, b.add(b.mul(x_stride, INT64(n)), b.mul(rows[k], INT64(x_width))))
        new = list(held)
        if bytes:
          _with_bytes(c, many, together, start, place, lines, new)
        else:
          (_with_pairs if PAIRS else _with_floats)(c, many, together, kind, place, lines, new)
        return new

      for place, value in zip(places, over(c, count, first, some_rows, step)):
        c.store(value, sums, place)
    return target.get_dummy_value()

  return types.void(rows, form, *[types.int64] * 6), code


def _in_order(c: Code, sums: list[ir.Value], form: int) -> list[ir.Value]:
  """A panel's sums in the order of its columns."""
  if form == INT8 and BYTES:
    out = []
    for lane in range(0, LANES, 4):
      part = lambda a, b, lane=lane: c.shuffle(
        a, b, [lane + i for i in range(4)] + [LANES + lane + i for i in range(4)]
      )
      out.append(c.shuffle(part(*sums[:2]), part(*sums[2:]), list(range(LANES))))
    return out
  if form == INT8 or not PAIRS:
    return sums
  out = []
  for a, b in zip(sums[::2], sums[1::2]):
    for lanes in ((0, 4), (8, 12)):
      out.append(c.shuffle(a, b, [n + i for at in lanes for n in (at, LANES + at) for i in range(4)]))
  return out


def _results(c: Code, form: int, sums: ir.Value, scale: ir.Value, split: ir.Value) -> list[ir.Value]:
  """A row of the product with a panel, in vectors: from its sums, the scales of a matrix in 8 bits, and what
  `rows.split` says of a row in bytes, which has two rows of sums."""
  b, held = (
    c.builder,
    lambda row: [
      c.load(sums, 4 * (PANEL * row + at), vector(INT32 if form == INT8 and BYTES else FLOAT))
      for at in range(0, PANEL, LANES)
    ],
  )
  if form != INT8:
    return _in_order(c, held(0), form)
  if BYTES:
    parts = []
    for row in range(2):
      added = c.everywhere(c.load(split, 4 + 4 * row, INT32))
      parts.append([b.sitofp(b.sub(v, added), vector(FLOAT)) for v in held(row)])
    unit = c.everywhere(c.load(split, 0, FLOAT))
    whole = [b.fmul(unit, b.fadd(b.fmul(numbers(256.0), high), low)) for high, low in zip(*parts)]
  else:
    whole = held(0)
  return [
    b.fmul(v, c.load(scale, 4 * LANES * i, vector(FLOAT))) for i, v in enumerate(_in_order(c, whole, form))
  ]


@intrinsic(prefer_literal=True)
def put(context, form, sums, scale, split, out):
  """Writes a row of a product with a panel [64] to `out`, in float32 (`_results`)."""
  kind = form.literal_value

  def code(target, builder, signature, values):
    sums, scale, split, out = (builder.inttoptr(v, POINTER) for v in values[1:])
    c = Code(builder)
    for i, value in enumerate(_results(c, kind, sums, scale, split)):
      c.store(value, out, 4 * LANES * i)
    return target.get_dummy_value()

  return types.void(form, *[types.int64] * 4), code


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
def put_gated(context, form, activation, gate, up, gate_scale, up_scale, split, out):
  """Writes the activation of a row of the product with one panel times that with another to `out`, in bfloat16."""
  kind, which = form.literal_value, activation.literal_value

  def code(target, builder, signature, values):
    gate, up, gate_scale, up_scale, split, out = (builder.inttoptr(v, POINTER) for v in values[2:])
    c = Code(builder)
    both = (_results(c, kind, sums, scale, split) for sums, scale in ((gate, gate_scale), (up, up_scale)))
    for i, (g, u) in enumerate(zip(*both)):
      c.store(c.rounded(builder.fmul(_activated(c, g, which), u)), out, 2 * LANES * i)
    return target.get_dummy_value()

  return types.void(form, activation, *[types.int64] * 6), code
