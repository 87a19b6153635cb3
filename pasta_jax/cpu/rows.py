"""Rows of numbers: weights of attention, sums of rows, norms."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pasta_jax.cpu.memory import INT64, POINTER, function
from pasta_jax.cpu.vectors import BFLOAT16, FLOAT, PAIRS, Code, exp, numbers, over, reduced, same, vector

LOWEST = -3.0e38  # the peak where nothing is visible


def _shown(c: Code, mask: ir.Value, at: ir.Value) -> ir.Value:
  return c.builder.icmp_unsigned("!=", c.load(mask, at, vector(ir.IntType(8))), same(ir.IntType(8), 0))


def _floats(c: Code, base: ir.Value, at: ir.Value) -> ir.Value:
  """LANES numbers of an array in float32, from the entry `at` on."""
  return c.load(base, c.builder.mul(at, INT64(4)), vector(FLOAT))


def _bfloats(c: Code, base: ir.Value, at: ir.Value) -> ir.Value:
  """The same of an array in bfloat16."""
  return c.floats(base, c.builder.mul(at, INT64(2)), BFLOAT16)


@intrinsic
def highest(context, scores, mask, count):
  """The largest of `count` scores, float32, whose byte of the mask is not 0; LOWEST if none is."""

  def code(target, builder, signature, values):
    scores, mask = (builder.inttoptr(v, POINTER) for v in values[:2])
    c = Code(builder)

    def step(at, peaks):
      x = _floats(c, scores, at)
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
      x = _floats(c, scores, at)
      weight = exp(c, builder.fsub(x, highest))
      weight = builder.select(_shown(c, mask, at), weight, numbers(0.0))
      if PAIRS:
        _put_bfloats(c, weight, weights, at)
      else:
        _put_floats(c, weight, weights, at)
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


def _scaled(read: Callable, write: Callable) -> Any:
  """An intrinsic (x, out, count, factor) that writes factor * x, of `count` numbers: `read` and `write` know how they
  are stored."""

  def code(target, builder, signature, values):
    x, out = (builder.inttoptr(v, POINTER) for v in values[:2])
    c = Code(builder)
    factor = c.everywhere(values[3])

    def step(at, none):
      write(c, builder.fmul(factor, read(c, x, at)), out, at)
      return none

    over(c, values[2], [], step)
    return target.get_dummy_value()

  given = types.int64, types.int64, types.int64, types.float32
  return intrinsic(lambda context, x, out, count, factor: (types.void(*given), code))


def _put_floats(c: Code, value: ir.Value, out: ir.Value, at: ir.Value) -> None:
  c.store(value, out, c.builder.mul(at, INT64(4)))


def _put_bfloats(c: Code, value: ir.Value, out: ir.Value, at: ir.Value) -> None:
  c.store(c.rounded(value), out, c.builder.mul(at, INT64(2)))


def _add_floats(c: Code, value: ir.Value, out: ir.Value, at: ir.Value) -> None:
  _put_floats(c, c.builder.fadd(_floats(c, out, at), value), out, at)


begin = _scaled(_bfloats, _put_floats)  # from bfloat16 to float32
mix = _scaled(_floats, _add_floats)  # in float32, added to what is there
round_to = _scaled(_floats, _put_bfloats)  # from float32 to bfloat16


@intrinsic
def normalise(context, x, scale, out, count, epsilon):
  """out = x / sqrt(mean(x²) + epsilon) * scale, of `count` numbers in float32; `out` is bfloat16."""

  def code(target, builder, signature, values):
    x, scale, out = (builder.inttoptr(v, POINTER) for v in values[:3])
    c = Code(builder)

    def squares(at, totals):
      value = _floats(c, x, at)
      return [builder.fadd(totals[0], builder.fmul(value, value))]

    total = reduced(c, *over(c, values[3], [numbers(0.0)], squares), add=True)
    mean = builder.fadd(builder.fdiv(total, builder.sitofp(values[3], FLOAT)), values[4])
    root = function(builder, "llvm.sqrt.f32", ir.FunctionType(FLOAT, [FLOAT]))
    factor = c.everywhere(builder.fdiv(FLOAT(1.0), builder.call(root, [mean])))

    def write(at, none):
      value = builder.fmul(_floats(c, x, at), factor)
      _put_bfloats(c, builder.fmul(value, _floats(c, scale, at)), out, at)
      return none

    over(c, values[3], [], write)
    return target.get_dummy_value()

  return types.void(*[types.int64] * 4, types.float32), code
