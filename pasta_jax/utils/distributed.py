"""Several processes, one a host, as one run.

Every process runs the same program in a shared folder. Training holds shards of the same arrays in all of them
(`model.sharding`); whatever else there is to do is shared out, and each process does its part by itself
(`utils.shared_records`). The first one writes the files.

What processes say to each other outside of training goes through JAX's coordination service, not through devices:
a process may wait for hours without a collective that times out, and learns meanwhile that another one has failed.
"""

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pasta_jax.utils.locks import LOCK, locked
from pasta_jax.utils.text import message_of, one_line
from pasta_jax.utils.waiting import Stopped, Waiting

SHORTEST, LONGEST = 0.002, 0.5  # seconds between two looks at what others say
_KINDS: dict[str, type[Exception]] = {kind.__name__: kind for kind in (Stopped, Waiting)}


class Elsewhere(ValueError):
  """Another process has failed; the message is one line that names it."""


class _Talk:
  """Where this process is in the conversation. All processes count the same way, so that nothing is heard twice."""

  block = 0  # calls of `as_one` so far
  depth = 0  # of calls of `as_one` that have not ended
  said = 0  # values exchanged so far


def start(coordinator: str, count: int, index: int) -> None:
  """Connects to the other processes; must be called before JAX is used. No argument is needed on Cloud TPU
  and under SLURM or Open MPI; elsewhere the address of the first process ("host:port"), the number of
  processes, and the index of this one, from 0.

  Raises ValueError, one line, if the processes cannot connect.
  """
  given = [bool(coordinator), count > 0, index >= 0]
  if any(given) and not all(given):
    raise ValueError(
      "--coordinator, --processes and --process go together; leave all three out on Cloud TPU and SLURM"
    )
  if coordinator and not re.fullmatch(r".+:[0-9]{1,5}", coordinator):
    raise ValueError(f"--coordinator={coordinator} must be host:port, such as 10.0.0.1:8476")
  if count and index >= count:
    raise ValueError(f"--process={index} must be in 0 to {count - 1}")
  try:
    if all(given):
      jax.distributed.initialize(coordinator, count, index)
    else:
      jax.distributed.initialize()
  except (RuntimeError, ValueError) as error:
    raise ValueError(f"the processes could not connect ({' '.join(str(error).split())[:300]})") from None


def place() -> tuple[int, int]:
  """(index of this process, number of processes). A run of one process asks JAX for no device."""
  return (jax.process_index(), jax.process_count()) if jax.distributed.is_initialized() else (0, 1)


def is_first() -> bool:
  """Whether this is the process that writes files."""
  return place()[0] == 0


def any_of(flag: bool) -> bool:
  """Whether the flag is set in any process, the same answer in all. All processes must call this, at the same
  step of a training: it runs on the devices."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.array(flag)).any())


@contextlib.contextmanager
def as_one() -> Iterator[None]:
  """The block ends in all processes together, with an error in all if it does in one. All must enter it.

  The others learn of a failure at their next `from_first`, `gathered`, `check` or the end of the block, and raise
  Elsewhere, or, as that process did, Stopped or Waiting. A block inside another is part of it. No training, whose
  steps wait for all processes, may run inside.
  """
  if place()[1] == 1 or _Talk.depth:
    yield
    return
  _Talk.block, _Talk.depth, _Talk.said = _Talk.block + 1, 1, 0
  if _Talk.block > 1:  # all have left the block before the last one, and read what was said in it
    _client().key_value_delete(f"pasta/{_Talk.block - 2}/")
  try:
    try:
      yield
    except BaseException as error:
      _say("ended", _described(error))
      _hear("ended", place()[1])
      raise
    _say("ended", None)
    _hear("ended", place()[1])
    check()
  finally:
    _Talk.depth = 0


def from_first(make: Callable[[], Any]) -> Any:
  """The JSON value that `make()` returns in the first process, in every process; the others do not call it.
  All processes must call this.

  A ValueError, an OSError or Waiting in the first process is raised there, and in the others as a ValueError or
  Waiting.
  """
  if place()[1] == 1:
    return make()
  here, _Talk.said = f"first/{_Talk.said}", _Talk.said + 1
  if is_first():
    value, error = None, None
    try:
      value = make()
    except (ValueError, OSError, Waiting) as caught:
      error = caught
    _say(here, [value, error and _described(error)])
    if error:
      raise error
    return value
  [(value, failure)] = _hear(here, 1)
  if failure:
    raise _KINDS.get(failure["kind"], ValueError)(failure["message"])
  return value


def gathered(value: Any) -> list[Any]:
  """The JSON values of all processes, in their order, in every process; waits for all. All must call this."""
  index, count = place()
  if count == 1:
    return [value]
  here, _Talk.said = f"all/{_Talk.said}", _Talk.said + 1
  _say(here, value)
  return _hear(here, count)


def check() -> None:
  """Raises what ended the block of `as_one` in another process, if it did."""
  if place()[1] == 1 or not _Talk.depth:
    return
  for index, failure in _heard("ended").items():
    if failure and index != place()[0]:
      if failure["kind"] in _KINDS:
        raise _KINDS[failure["kind"]](failure["message"])
      own = failure["kind"] == Elsewhere.__name__
      raise Elsewhere(failure["message"] if own else f"process {index}: {failure['message']}")


@contextlib.contextmanager
def writing_in(workdir: Path, lock: str = LOCK) -> Iterator[None]:
  """All processes write in a folder as one run: the first holds the folder's `lock` (`utils.locks`).

  Raises LockedError, or in the other processes ValueError, if another run holds it.
  """
  with contextlib.ExitStack() as held:
    from_first(lambda: held.enter_context(locked(workdir / lock)))
    yield


def to_host(tree: Any, mesh: Mesh) -> Any:
  """Arrays on the mesh as whole arrays on every host, gathered one after another; in a single process, the
  arrays unchanged."""
  if jax.process_count() == 1:
    return tree
  whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
  return jax.tree.map(lambda x: np.asarray(whole(x)), tree)


def _described(error: BaseException) -> dict[str, str]:
  """The kind of an error, and its message in one line."""
  expected = isinstance(error, ValueError | OSError | Waiting | Stopped)
  text = message_of(error) if expected else f"{type(error).__name__}: {error}".removesuffix(": ")
  return {"kind": type(error).__name__, "message": one_line(text)}


def _client() -> Any:
  """JAX's coordination service, which JAX itself gives no name for."""
  from orbax.checkpoint import multihost  # slow to import

  return multihost.get_jax_distributed_client()


def _say(what: str, value: Any) -> None:
  _client().key_value_set(f"pasta/{_Talk.block}/{what}/{place()[0]}", json.dumps(value), allow_overwrite=True)


def _heard(what: str) -> dict[int, Any]:
  """What processes have said so far, by their index."""
  found = _client().key_value_dir_get(f"pasta/{_Talk.block}/{what}/")
  return {int(key.rpartition("/")[2]): json.loads(value) for key, value in found}


def _hear(what: str, count: int) -> list[Any]:
  """What `count` processes say, in their order; waits for it, and raises as `check` if one fails meanwhile."""
  pause = SHORTEST
  while len(found := _heard(what)) < count:
    if what != "ended":
      check()
    time.sleep(pause)
    pause = min(1.2 * pause, LONGEST)
  return [found[i] for i in sorted(found)]
