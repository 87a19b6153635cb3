"""Training by several processes, one a host: they start together, hold pieces of the same arrays, and write
once.

Every process runs the same program over the same data files, in a folder that all of them see. What is
divided is the mesh's affair (`train.sharding`).
"""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def start(coordinator: str, count: int, index: int) -> None:
  """Joins the other processes, before JAX is used. Nothing is needed on Cloud TPU, under SLURM or Open MPI;
  elsewhere the first process's address ("host:port"), how many there are, and which one this is, from 0.

  Raises ValueError, one line, if they do not find each other.
  """
  given = [bool(coordinator), count > 0, index >= 0]
  if any(given) and not all(given):
    raise ValueError(
      "--coordinator, --processes and --process go together; leave all three out on Cloud TPU and SLURM"
    )
  if count and index >= count:
    raise ValueError(f"--process={index} is none of 0 to {count - 1}")
  try:
    if all(given):
      jax.distributed.initialize(coordinator, count, index)
    else:
      jax.distributed.initialize()
  except (RuntimeError, ValueError) as error:
    raise ValueError(
      f"the processes did not find each other ({' '.join(str(error).split())[:300]})"
    ) from None


def is_first() -> bool:
  """Whether this process is the one that writes what is written once."""
  return jax.process_index() == 0


def any_of(flag: bool) -> bool:
  """Whether the flag is set in one of the processes, the same answer in all. They must all ask."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.array(flag)).any())


def to_host(tree: Any, mesh: Mesh) -> Any:
  """Whole arrays on every host, one after another, of arrays that lie on the mesh; as they are in a single
  process."""
  if jax.process_count() == 1:
    return tree
  whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
  return jax.tree.map(lambda x: np.asarray(whole(x)), tree)
