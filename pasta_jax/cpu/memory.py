"""What numba has no words for: memory by its address, atomic addition, and calls of C functions.

All are numba intrinsics, for compiled code only. An address is an int64.
"""

import os
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

INT64 = ir.IntType(64)
POINTER = ir.IntType(8).as_pointer()
# LLVM's instruction for a core that waits in a loop, by machine, and its argument.
_PAUSE = {
  "x86_64": ("llvm.x86.sse2.pause", ()),
  "aarch64": ("llvm.aarch64.hint", (1,)),
  "arm64": ("llvm.aarch64.hint", (1,)),
}


def at(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
  """A pointer to a value of this type."""
  return builder.inttoptr(address, kind.as_pointer())


def function(builder: ir.IRBuilder, name: str, kind: ir.FunctionType) -> ir.Function:
  """A function that is not in the module, or an intrinsic of LLVM."""
  return builder.module.globals.get(name) or ir.Function(builder.module, kind, name)


def _loads(kind: ir.Type, gives: types.Type = types.int64) -> Any:
  """The value at an address; an integer is widened."""

  def code(target, builder, signature, values):
    value = builder.load(at(builder, values[0], kind))
    return builder.sext(value, INT64) if gives == types.int64 and kind.width < 64 else value

  return intrinsic(lambda context, address: (gives(types.int64), code))


def _stores(kind: ir.Type, takes: types.Type = types.int64) -> Any:
  """Puts a value at an address; an integer is narrowed."""

  def code(target, builder, signature, values):
    narrow = takes == types.int64 and kind.width < 64
    builder.store(builder.trunc(values[1], kind) if narrow else values[1], at(builder, values[0], kind))
    return target.get_dummy_value()

  return intrinsic(lambda context, address, value: (types.void(types.int64, takes), code))


load, store = _loads(INT64), _stores(INT64)
load_int32, store_int32 = _loads(ir.IntType(32)), _stores(ir.IntType(32))
load_int16, store_int16 = _loads(ir.IntType(16)), _stores(ir.IntType(16))
load_float, store_float = _loads(ir.FloatType(), types.float32), _stores(ir.FloatType(), types.float32)


@intrinsic
def load_bfloat(context, address):
  """The bfloat16 at an address, as a float32."""

  def code(target, builder, signature, values):
    bits = builder.zext(builder.load(at(builder, values[0], ir.IntType(16))), ir.IntType(32))
    return builder.bitcast(builder.shl(bits, ir.IntType(32)(16)), ir.FloatType())

  return types.float32(types.int64), code


@intrinsic
def add_atomic(context, address, value):
  """Adds to the int64 at an address and returns what was there. What other threads wrote before their additions can
  be read after it."""

  def code(target, builder, signature, values):
    return builder.atomic_rmw("add", at(builder, values[0], INT64), values[1], "acq_rel")

  return types.int64(types.int64, types.int64), code


@intrinsic
def pause(context):
  """Tells the core that it waits in a loop."""

  def code(target, builder, signature, values):
    if found := _PAUSE.get(binding.get_default_triple().split("-")[0]):
      name, given = found
      int32 = ir.IntType(32)
      kind = ir.FunctionType(ir.VoidType(), [int32] * len(given))
      builder.call(function(builder, name, kind), [int32(n) for n in given])
    return target.get_dummy_value()

  return types.void(), code


@intrinsic
def give_way(context):
  """Lets another thread of the system run on this core, where there is POSIX's call for it."""

  def code(target, builder, signature, values):
    if os.name == "posix":
      builder.call(function(builder, "sched_yield", ir.FunctionType(ir.IntType(32), [])), [])
    return target.get_dummy_value()

  return types.void(), code


@intrinsic
def fill(context, address, size):
  """Puts zeros into `size` bytes from an address on."""

  def code(target, builder, signature, values):
    one = ir.IntType(8)
    kind = ir.FunctionType(ir.VoidType(), [POINTER, one, INT64, ir.IntType(1)])
    zeros = [builder.inttoptr(values[0], POINTER), one(0), values[1], ir.IntType(1)(0)]
    builder.call(function(builder, "llvm.memset.p0.i64", kind), zeros)
    return target.get_dummy_value()

  return types.void(types.int64, types.int64), code


@intrinsic
def prefetch(context, address):
  """Starts to read the line of memory at an address into the core's second cache."""

  def code(target, builder, signature, values):
    int32 = ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [POINTER, int32, int32, int32])
    read, second, data = int32(0), int32(2), int32(1)
    address = builder.inttoptr(values[0], POINTER)
    builder.call(function(builder, "llvm.prefetch.p0", kind), [address, read, second, data])
    return target.get_dummy_value()

  return types.void(types.int64), code


@intrinsic
def allocate(context, size):
  """The address of new memory of `size` bytes, from malloc."""

  def code(target, builder, signature, values):
    malloc = function(builder, "malloc", ir.FunctionType(POINTER, [INT64]))
    return builder.ptrtoint(builder.call(malloc, values), INT64)

  return types.int64(types.int64), code


@intrinsic
def free(context, address):
  """Gives back memory of `allocate`."""

  def code(target, builder, signature, values):
    release = function(builder, "free", ir.FunctionType(ir.VoidType(), [POINTER]))
    builder.call(release, [builder.inttoptr(values[0], POINTER)])
    return target.get_dummy_value()

  return types.void(types.int64), code


@intrinsic
def call(context, address, argument):
  """Calls the C function at an address, of one pointer, and returns its result, a pointer."""

  def code(target, builder, signature, values):
    kind = ir.FunctionType(INT64, [INT64])
    return builder.call(at(builder, values[0], kind), [values[1]])

  return types.int64(types.int64, types.int64), code


@intrinsic(prefer_literal=True)
def symbol(context, name):
  """The address of a C function, by a constant name that `llvmlite.binding.add_symbol` has made known before this
  code is compiled, or loaded from numba's cache."""
  named = name.literal_value

  def code(target, builder, signature, values):
    return builder.ptrtoint(function(builder, named, ir.FunctionType(ir.VoidType(), [POINTER])), INT64)

  return types.int64(name), code


@intrinsic(prefer_literal=True)
def text(context, words):
  """The address of a constant string, which a zero byte ends."""
  written = words.literal_value

  def code(target, builder, signature, values):
    return builder.ptrtoint(target.insert_const_string(builder.module, written), INT64)

  return types.int64(words), code
