"""Training on several processes, one a host.

Every process runs the same program over the same data files, in a shared folder. Each holds its shards of the
same arrays (`model.sharding`), and the first one writes files.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pasta_jax.utils.locks import LOCK, locked


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


def is_first() -> bool:
  """Whether this is the process that writes files."""
  return jax.process_index() == 0


def any_of(flag: bool) -> bool:
  """Whether the flag is set in any process, the same answer in all. All processes must call this."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.array(flag)).any())


def from_first(make: Callable[[], Any]) -> Any:
  """The JSON value that `make()` returns in the first process, in every process; the others do not call it.
  All processes must call this.

  A ValueError or OSError in the first process is raised there, and as a ValueError in the others.
  """
  if jax.process_count() == 1:
    return make()
  value, error = None, None
  if is_first():
    try:
      value = make()
    except (ValueError, OSError) as caught:
      error = caught
  sent = np.frombuffer(json.dumps([value, error and str(error)]).encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(sent))))
  sent = sent if is_first() else np.zeros(size, np.uint8)
  value, message = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(sent)).tobytes())
  if message is not None:
    raise error or ValueError(message)
  return value


@contextlib.contextmanager
def writing_in(workdir: Path) -> Iterator[None]:
  """All processes write in a folder as one run: the first holds the folder's lock (`utils.locks`).

  Raises LockedError, or in the other processes ValueError, if another run holds it.
  """
  with contextlib.ExitStack() as held:
    from_first(lambda: held.enter_context(locked(workdir / LOCK)))
    yield


def to_host(tree: Any, mesh: Mesh) -> Any:
  """Arrays on the mesh as whole arrays on every host, gathered one after another; in a single process, the
  arrays unchanged."""
  if jax.process_count() == 1:
    return tree
  whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
  return jax.tree.map(lambda x: np.asarray(whole(x)), tree)
