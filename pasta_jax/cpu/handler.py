"""Handlers of XLA's foreign function interface in numba: what is in a call, errors, and work that threads share.

A handler is a C function of one pointer, to the frame of the call, that returns 0 or an error. XLA runs it on one
thread; `share` asks XLA's own pool for more. The structures are those of `xla/ffi/api/c_api.h`, which comes with
jaxlib: `mismatch` compares.
"""

import os
import re

import jax
from numba import njit

from pasta_jax.cpu.memory import (
  add_atomic,
  allocate,
  call,
  free,
  give_way,
  load,
  load_int32,
  pause,
  store,
  store_int32,
)

# Offsets in bytes. Every structure begins with its size and a pointer to extensions, a field at a multiple of eight.
_EXTENSIONS = 8
_API, _CONTEXT, _ARGUMENTS, _N_RESULTS, _RESULTS = 16, 24, 72, 96, 112  # of a frame
_DTYPE, _DATA, _RANK, _DIMS = 16, 24, 32, 40  # of a buffer
_ERROR_CREATE, _SCHEDULE, _THREADS = 48, 136, 144  # of the interface: pointers to functions
_KIND, _METADATA = 8, 24  # of an extension; the second: what a handler says of itself
_MAJOR, _MINOR = 24, 28  # of metadata

# Those parts of the header that the offsets follow from.
_FIELDS = {
  "XLA_FFI_CallFrame": ("struct_size", "extension_start", "api", "ctx", "stage", "args", "rets", "attrs"),
  "XLA_FFI_Args": ("struct_size", "extension_start", "size", "types", "args"),
  "XLA_FFI_Rets": ("struct_size", "extension_start", "size", "types", "rets"),
  "XLA_FFI_Buffer": ("struct_size", "extension_start", "dtype", "data", "rank", "dims"),
  "XLA_FFI_ThreadPool_Schedule_Args": ("struct_size", "extension_start", "ctx", "task", "data"),
  "XLA_FFI_ThreadPool_NumThreads_Args": ("struct_size", "extension_start", "ctx", "num_threads"),
  "XLA_FFI_Error_Create_Args": ("struct_size", "extension_start", "message", "errc"),
  "XLA_FFI_Metadata": ("struct_size", "api_version", "traits"),
  "XLA_FFI_Api_Version": ("struct_size", "extension_start", "major_version", "minor_version"),
}
_FUNCTIONS = (
  "Error_Create Error_GetMessage Error_Destroy Handler_Register Stream_Get Type_Register ExecutionContext_Get "
  "State_Set State_Get DeviceMemory_Allocate DeviceMemory_Free ThreadPool_Schedule ThreadPool_NumThreads"
).split()
F32, BF16, INT8, INT32, PRED = 11, 16, 2, 4, 1  # dtypes of buffers
_ASKS = 1  # the kind of an extension that asks for metadata
_INVALID = 3  # the error's code: an argument is invalid


def _header() -> str:
  """The header without its comments; "" where it cannot be read."""
  try:
    with open(os.path.join(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h"), encoding="utf-8") as f:
      return re.sub(r"//.*", "", f.read())
  except OSError:
    return ""


def mismatch() -> str:
  """Why handlers of this module cannot work with the installed jaxlib, in one line; "" if they can."""
  if not (header := _header()):
    return f"the header of XLA's foreign functions is not in {jax.ffi.include_dir()}"
  for name, fields in _FIELDS.items():
    found = re.search(rf"struct {name} {{(.*?)}}", header, re.DOTALL)
    names = tuple(re.findall(r"(\w+)\s*;", found[1])) if found else ()
    if names[: len(fields)] != fields:
      return f"{name} has other fields in this jaxlib ({', '.join(names)})"
  functions = re.findall(r"_XLA_FFI_API_STRUCT_FIELD\(XLA_FFI_(\w+)\)", header)
  if functions[: len(_FUNCTIONS)] != _FUNCTIONS:
    return f"XLA's foreign functions have another interface in this jaxlib ({', '.join(functions)})"
  return ""


def _version(part: str) -> int:
  found = re.search(rf"#define XLA_FFI_API_{part} (\d+)", _header())
  return int(found[1]) if found else -1


MAJOR, MINOR = _version("MAJOR"), _version("MINOR")  # what a handler says that it was written for


@njit
def introduces(frame):
  """Whether XLA only asks what this handler is, and has been answered."""
  extension = load(frame + _EXTENSIONS)
  if extension == 0 or load_int32(extension + _KIND) != _ASKS:
    return False
  metadata = load(extension + _METADATA)
  store_int32(metadata + _MAJOR, MAJOR)
  store_int32(metadata + _MINOR, MINOR)
  return True


@njit
def error(frame, message):
  """The handler's result for a call that cannot be run; `message` is the address of its words."""
  arguments = allocate(32)
  store(arguments, 28)
  store(arguments + 8, 0)
  store(arguments + 16, message)
  store(arguments + 24, _INVALID)
  result = call(load(load(frame + _API) + _ERROR_CREATE), arguments)
  free(arguments)
  return result


@njit
def argument(frame, i):
  """The buffer of an argument."""
  return load(load(frame + _ARGUMENTS) + 8 * i)


@njit
def result(frame, i):
  """The buffer of a result."""
  return load(load(frame + _RESULTS) + 8 * i)


@njit
def results(frame):
  """The number of results."""
  return load(frame + _N_RESULTS)


@njit
def data(buffer):
  """Where the buffer's numbers are."""
  return load(buffer + _DATA)


@njit
def dtype(buffer):
  """One of `F32`, `BF16`, …"""
  return load_int32(buffer + _DTYPE)


@njit
def rank(buffer):
  return load(buffer + _RANK)


@njit
def dim(buffer, i):
  """The size of an axis."""
  return load(load(buffer + _DIMS) + 8 * i)


@njit
def size(buffer):
  """The number of its elements."""
  count = 1
  for i in range(rank(buffer)):
    count *= dim(buffer, i)
  return count


# A job: the part of a call that threads share. It lives until the last thread has left it.
_NEXT, _DONE, _USERS, _TILES = 0, 8, 16, 24
_TURNS = 2000  # of waiting, some ten microseconds
_MESSAGE = 32  # room for the arguments of the interface's functions
JOB = 80  # where what the tiles need begins


@njit
def new_job(tiles, room):
  """A job of so many tiles, with `room` bytes from `JOB` on."""
  job = allocate(JOB + room)
  store(job + _NEXT, 0)
  store(job + _DONE, 0)
  store(job + _USERS, 1)
  store(job + _TILES, tiles)
  return job


@njit
def next_tile(job):
  """The number of a tile that this thread is to compute; -1: none is left."""
  tile = add_atomic(job + _NEXT, 1)
  return tile if tile < load(job + _TILES) else -1


@njit
def tile_done(job):
  add_atomic(job + _DONE, 1)


@njit
def leave(job):
  """What a thread does last with a job."""
  if add_atomic(job + _USERS, -1) == 1:
    free(job)


@njit
def threads(frame):
  """Of XLA's pool."""
  arguments = allocate(40)
  store(arguments, 32)
  store(arguments + 8, 0)
  store(arguments + 16, load(frame + _CONTEXT))
  store(arguments + 24, arguments + 32)
  store(arguments + 32, 1)
  failed = call(load(load(frame + _API) + _THREADS), arguments)
  count = 1 if failed != 0 else load(arguments + 32)
  free(arguments)
  return count


@njit
def share(frame, job, task, most):
  """Asks at most `most` threads of XLA's pool to run `task`, a C function of the job that takes tiles until none is
  left and then leaves. They may come late, or never: the caller takes tiles as they do, and then waits."""
  message = job + _MESSAGE
  store(message, 40)
  store(message + 8, 0)
  store(message + 16, load(frame + _CONTEXT))
  store(message + 24, task)
  store(message + 32, job)
  for _ in range(most):
    add_atomic(job + _USERS, 1)
    if call(load(load(frame + _API) + _SCHEDULE), message) != 0:
      add_atomic(job + _USERS, -1)
      break


@njit
def wait(job):
  """Until every tile is done: those that are not yet are being computed by other threads. Where such a thread has lost
  its core to another program, this one's may be what it needs."""
  turns = 0
  while add_atomic(job + _DONE, 0) < load(job + _TILES):
    turns += 1
    if turns % _TURNS == 0:
      give_way()
    pause()
