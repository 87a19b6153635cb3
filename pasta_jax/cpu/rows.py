"""Rows of numbers: weights of attention, sums of rows, norms."""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pasta_jax.cpu.memory import INT64, POINTER, function
from pasta_jax.cpu.vectors import BFLOAT16, FLOAT, PAIRS, Code, exp, numbers, over, reduced, same, vector

LOWEST = -3.0e38  # the peak where nothing is visible


def _shown(c: Code, mask: ir.Value, at: ir.Value) -> ir.Value:
  return c.builder.icmp_unsigned("!=", c.load(mask, at, vector(ir.IntType(8))), same(ir.IntType(8), 0))


def _bfloats(c: Code, base: ir.Value, at: ir.Value) -> ir.Value:
  """LANES numbers of an array in bfloat16, from the entry `at` on, as float32."""
  return c.floats(base, c.builder.mul(at, INT64(2)), BFLOAT16)


@intrinsic
def highest(context, scores, mask, count):
  """The largest of `count` scores, float32, whose byte of the mask is not 0; LOWEST if none is."""

  def code(target, builder, signature, values):
    scores, mask = (builder.inttoptr(v, POINTER) for v in values[:2])
    c = Code(builder)

    def step(at, peaks):
      x = c.load(scores, builder.mul(at, INT64(4)), vector(FLOAT))
      more = builder.and_(_shown(c, mask, at), builder.fcmp_ordered(">", x, peaks[0]))
      return [builder.select(more, x, peaks[0])]

    return reduced(c, *over(c, values[2], [numbers(LOWEST)], step), add=False)

  return types.float32(types.int64, types.int64, types.int64), code


@intrinsic
def weigh(context, scores, mask, count, peak, weights):
  """Writes exp(score - peak) of `count` scores to `weights`, 0 where the byte of the mask is 0, in the dtype of x in
  `multiply`, and returns their sum before that rounding."""

  def code(target, builder, signature, values):
    scores, mask, weights = (builder.inttoptr(values[i], POINTER) for i in (0, 1, 4))
    c = Code(builder)
    highest = c.everywhere(values[3])

    def step(at, totals):
      x = c.load(scores, builder.mul(at, INT64(4)), vector(FLOAT))
      weight = exp(c, builder.fsub(x, highest))
      weight = builder.select(_shown(c, mask, at), weight, numbers(0.0))
      if PAIRS:
        c.store(c.rounded(weight), weights, builder.mul(at, INT64(2)))
      else:
        c.store(weight, weights, builder.mul(at, INT64(4)))
      return [builder.fadd(totals[0], weight)]

    return reduced(c, *over(c, values[2], [numbers(0.0)], step), add=True)

  given = [types.int64, types.int64, types.int64, types.float32, types.int64]
  return types.float32(*given), code


@intrinsic
def dot(context, a, b, count):
  """The sum of products of `count` numbers in bfloat16."""

  def code(target, builder, signature, values):
    a, b = (builder.inttoptr(v, POINTER) for v in values[:2])
    c = Code(builder)
    product = lambda at: builder.fmul(_bfloats(c, a, at), _bfloats(c, b, at))
    step = lambda at, totals: [builder.fadd(totals[0], product(at))]
    return reduced(c, *over(c, values[2], [numbers(0.0)], step), add=True)

  return types.float32(types.int64, types.int64, types.int64), code


@intrinsic
def begin(context, out, x, count, factor):
  """out = factor * x, of `count` numbers: `out` float32, x bfloat16."""

  def code(target, builder, signature, values):
    out, x = (builder.inttoptr(v, POINTER) for v in values[:2])
    c = Code(builder)
    factor = c.everywhere(values[3])

    def step(at, none):
      c.store(builder.fmul(factor, _bfloats(c, x, at)), out, builder.mul(at, INT64(4)))
      return none

    over(c, values[2], [], step)
    return target.get_dummy_value()

  return types.void(types.int64, types.int64, types.int64, types.float32), code


@intrinsic
def round_to(context, x, out, count, factor):
  """Writes factor * x, of `count` numbers in float32, to `out` in bfloat16."""

  def code(target, builder, signature, values):
    x, out = (builder.inttoptr(v, POINTER) for v in values[:2])
    c = Code(builder)
    factor = c.everywhere(values[3])

    def step(at, none):
      value = builder.fmul(factor, c.load(x, builder.mul(at, INT64(4)), vector(FLOAT)))
      c.store(c.rounded(value), out, builder.mul(at, INT64(2)))
      return none

    over(c, values[2], [], step)
    return target.get_dummy_value()

  return types.void(types.int64, types.int64, types.int64, types.float32), code


@intrinsic
def mix(context, out, x, count, factor):
  """out += factor * x, of `count` numbers in float32."""

  def code(target, builder, signature, values):
    out, x = (builder.inttoptr(v, POINTER) for v in values[:2])
    c = Code(builder)
    factor = c.everywhere(values[3])

    def step(at, none):
      where = builder.mul(at, INT64(4))
      before, more = (c.load(base, where, vector(FLOAT)) for base in (out, x))
      c.store(builder.fadd(before, builder.fmul(factor, more)), out, where)
      return none

    over(c, values[2], [], step)
    return target.get_dummy_value()

  return types.void(types.int64, types.int64, types.int64, types.float32), code


@intrinsic
def normalise(context, x, scale, out, count, epsilon):
  """out = x / sqrt(mean(x²) + epsilon) * scale, of `count` numbers in float32; `out` is bfloat16."""

  def code(target, builder, signature, values):
    x, scale, out = (builder.inttoptr(v, POINTER) for v in values[:3])
    c = Code(builder)
    place = lambda at: builder.mul(at, INT64(4))

    def squares(at, totals):
      value = c.load(x, place(at), vector(FLOAT))
      return [builder.fadd(totals[0], builder.fmul(value, value))]

    total = reduced(c, *over(c, values[3], [numbers(0.0)], squares), add=True)
    mean = builder.fadd(builder.fdiv(total, builder.sitofp(values[3], FLOAT)), values[4])
    root = function(builder, "llvm.sqrt.f32", ir.FunctionType(FLOAT, [FLOAT]))
    factor = c.everywhere(builder.fdiv(FLOAT(1.0), builder.call(root, [mean])))

    def write(at, none):
      value, by = (c.load(base, place(at), vector(FLOAT)) for base in (x, scale))
      c.store(c.rounded(builder.fmul(builder.fmul(value, factor), by)), out, builder.mul(at, INT64(2)))
      return none

    over(c, values[3], [], write)
    return target.get_dummy_value()

  return types.void(*[types.int64] * 4, types.float32), code
