"""How arrays are sharded in training and in decoding: a mesh of devices and one table of rules; XLA's
partitioner (GSPMD) does the rest.

    data    rows of a batch, requests; parameters are replicated
    fsdp    rows of a batch; parameters and the optimiser's moments are sharded (Zhao et al. 2023)
    tensor  heads and feed-forward columns (Shoeybi et al. 2019), and the vocabulary

In decoding, rows are few and parameters many: requests are split over `data` alone, parameters stay where they are,
and the partial sums of products travel instead (Pope et al. 2022, section 3.2.2: 2D weight-stationary).

Traced functions read the mesh from `jax.set_mesh`; without a mesh, or on a mesh of one device, they add no
constraint, so losses and updates are the same code on one device and on many.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that shard a batch

# Name of an array → axes of its last dimensions. Arrays without a rule (norm scales, tag rows, counters) are
# replicated. An optimiser's moments have the name of their parameter. Those of the fused form, `transformer.FUSED`,
# are sharded over `tensor` by key-value heads and by columns, as their parts: its layers need no other communication.
_Axes = str | tuple[str, ...] | None
_RULES: tuple[tuple[str, tuple[_Axes, ...]], ...] = (
  (r"embed\.embedding", (("tensor", "fsdp"), None)),  # rows only: a token's lookup then reads a whole row
  (r"(q|k|v|gate|up|head)\.kernel", ("fsdp", "tensor")),
  (r"(o|down)\.kernel", ("tensor", "fsdp")),
  (r"qkv\.kernel", ("fsdp", "tensor", None)),
  (r"qkv\.kernel", ("fsdp", None, "tensor")),  # fewer key-value heads than devices: any columns
  (r"qkv\.bias", ("tensor", None)),
  (r"gate_up\.kernel", ("fsdp", None, "tensor")),
  (r"qkv\.kernel_scale", ("tensor", None)),  # scales of output channels, as those are
  (r"gate_up\.kernel_scale", (None, "tensor")),
  (r"head\.kernel_scale", ("tensor",)),
  (r"(o|down)\.kernel_scale", ("fsdp",)),
  (r"(q|k|v|gate|up)\.lora_a", ("fsdp", None)),
  (r"(q|k|v|gate|up)\.lora_b", (None, "tensor")),
  (r"(o|down)\.lora_a", ("tensor", None)),
  (r"(o|down)\.lora_b", (None, "fsdp")),
)
PER_PAIR = ("reference", "weight")  # leaves of a batch [P, …], one entry a pair; the others have one a row


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh of `config.mesh` (`mesh_shape`) over these devices, or all."""
  devices = jax.devices() if devices is None else devices
  shape = mesh_shape(sizes, len(devices))
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def decoding_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
  """`config.mesh` as decoding takes it: where fsdp has "all devices that the others leave", requests are split over
  these. A number for fsdp splits the parameters in decoding too."""
  return {**sizes, "data": -1, "fsdp": 1} if sizes["fsdp"] == -1 else dict(sizes)


def local_mesh(sizes: Mapping[str, int]) -> Mesh | None:
  """The mesh that one process decodes on: its share of `config.mesh` (`decoding_sizes`). None if that is one device.

  A process holds whole replicas of the parameters, so that hosts decode requests at their own speed. Raises
  ValueError, one line, if a replica needs more devices than the process has.
  """
  devices, processes = jax.local_devices(), jax.process_count()
  sizes = decoding_sizes(sizes)
  data = sizes["data"] if sizes["data"] == -1 else max(sizes["data"] // processes, 1)
  try:
    shape = mesh_shape({**sizes, "data": data}, len(devices))
  except ValueError as error:
    ours = f" (each of {processes} processes decodes with its own devices)" if processes > 1 else ""
    raise ValueError(f"{error}{ours}") from None
  return None if len(devices) == 1 else make_mesh(dict(zip(AXES, shape)), devices)


def mesh_shape(sizes: Mapping[str, int], devices: int) -> tuple[int, ...]:
  """A size for each axis; one of `sizes` may be -1, for all devices that the others leave.

  Raises ValueError, one line, if the sizes do not multiply to the number of devices.
  """
  shape = [int(sizes[axis]) for axis in AXES]
  given = math.prod(n for n in shape if n != -1)
  if shape.count(-1) > 1 or min(n for n in (*shape, 1) if n != -1) < 1:
    raise ValueError(
      f"mesh={dict(zip(AXES, shape))}: sizes are 1 or more; one may be -1, for all devices left"
    )
  if devices % given if -1 in shape else devices != given:
    wanted = f"a multiple of {given}" if -1 in shape else str(given)
    raise ValueError(f"mesh={dict(zip(AXES, shape))} needs {wanted} devices, not the {devices} here")
  return tuple(devices // given if n == -1 else n for n in shape)


def on_mesh(mesh: Mesh | None, function: Callable) -> Callable:
  """The function, called on a mesh: what it traces reads the mesh. The same function without one."""
  if mesh is None:
    return function

  def call(*args, **kwargs):
    with jax.set_mesh(mesh):
      return function(*args, **kwargs)

  return call


def check_rows(mesh: Mesh, rows: int, name: str) -> None:
  """Raises ValueError, one line, if a batch of `rows` rows (the setting `name`) cannot be divided over the
  mesh."""
  parts = math.prod(mesh.shape[axis] for axis in ROWS)
  if rows % parts:
    raise ValueError(
      f"{name}={rows} rows cannot be divided over {parts} devices (mesh.data x mesh.fsdp): "
      f"choose a multiple of {parts}"
    )


def spec(name: str, shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
  """How an array is sharded, by the first rule for its name whose axes all divide their dimensions; otherwise by the
  first one, without the axes of the mesh (`sizes`) that do not."""
  rules = [axes for rule, axes in _RULES if re.search(rf"(^|\.){rule}$", name) and len(axes) <= len(shape)]
  fitted = [(axes, fitting(axes, shape[len(shape) - len(axes) :], sizes)) for axes in rules]
  if not fitted:
    return PartitionSpec()
  _, best = next((f for f in fitted if list(f[0]) == f[1]), fitted[0])
  return PartitionSpec(*[None] * (len(shape) - len(best)), *best)


def fitting(axes: Sequence[_Axes], shape: Sequence[int], sizes: Mapping[str, int]) -> list[_Axes]:
  """The axes, with None in place of those that do not divide their dimension."""
  parts = lambda axis: math.prod(sizes[a] for a in ((axis,) if isinstance(axis, str) else axis))
  return [axis if axis and n % parts(axis) == 0 else None for axis, n in zip(axes, shape)]


def shardings(mesh: Mesh, tree: Any) -> Any:
  """A NamedSharding for each array of parameters or of a whole `TrainState`, by its name and shape."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: NamedSharding(mesh, spec(_name(path), leaf.shape, mesh.shape)), tree
  )


def shard_put(mesh: Mesh, tree: Any) -> Any:
  """Parameters or a `TrainState` on the mesh (`shard_put_array`)."""
  return jax.tree_util.tree_map_with_path(lambda path, x: shard_put_array(mesh, _name(path), x), tree)


def shard_put_array(mesh: Mesh, name: str, x: Any) -> jax.Array:
  """An array on the mesh; the same array if it has that sharding already. Each of several processes passes
  the whole array and keeps its shards.

  An array with an equivalent but differently named sharding is put again: a jitted step would otherwise be
  compiled once for its first argument and again for its own result.
  """
  where = NamedSharding(mesh, spec(name, x.shape, mesh.shape))
  if isinstance(x, jax.Array) and (not x.is_fully_addressable or x.committed and x.sharding == where):
    return x
  if jax.process_count() == 1:
    return jax.device_put(x, where)
  return jax.make_array_from_callback(x.shape, where, lambda index: np.asarray(x)[index])


def constrain(tree: Any) -> Any:
  """The same for traced values: the results of a step keep the shardings of its arguments."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size <= 1:
    return tree
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: jax.lax.with_sharding_constraint(leaf, spec(_name(path), leaf.shape, mesh.shape)), tree
  )


def constrain_rows(x: jax.Array, *axes: str | None) -> jax.Array:
  """A traced array [B, …] with its rows sharded; `axes` are for the dimensions after the first."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size <= 1:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS, *fitting(axes, x.shape[1:], mesh.shape)))


def constrain_axes(x: jax.Array, *axes: str | None) -> jax.Array:
  """A traced array with an axis of the mesh, or None, for each dimension; axes that do not divide theirs are left
  out. Dimensions that a `jax.vmap` has added are not constrained."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size <= 1:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*fitting(axes, x.shape, mesh.shape)))


def head_axes(kv_heads: int, groups: int) -> tuple[str | None, str | None]:
  """The axes of key-value heads and of the query heads of each, on the mesh that a traced function runs on: `tensor`
  splits key-value heads, or, where it cannot divide them, query heads, and keys and values are replicated."""
  if divides("tensor", kv_heads):
    return "tensor", None
  return None, "tensor" if divides("tensor", groups) else None


def divides(axis: str, n: int) -> bool:
  """Whether an axis of the mesh that a traced function runs on divides a dimension of size `n`."""
  return n % jax.sharding.get_abstract_mesh().shape[axis] == 0


def local_rows(mesh: Mesh, n: int) -> list[int]:
  """Which of the `n` rows of a batch are on this process's devices."""
  parts = NamedSharding(mesh, PartitionSpec(ROWS)).addressable_devices_indices_map((n,))
  return sorted({row for (part,) in parts.values() for row in range(*part.indices(n))})  # type: ignore[misc]


def batch_spec(name: str, axis: int) -> PartitionSpec:
  """How a leaf of a batch is sharded whose rows are dimension `axis`."""
  return PartitionSpec() if name in PER_PAIR else PartitionSpec(*[None] * axis, ROWS)


def shard_put_batch(
  mesh: Mesh,
  batch: Mapping[str, np.ndarray],
  share: tuple[Sequence[int], int] | None = None,
) -> dict[str, jax.Array]:
  """A batch ([B, …], or several [A, B, …]) on the mesh.

  `share` says which rows of the global batch `batch` has (`local_rows`), and how many rows that has; without
  it, every process passes the whole batch. Leaves in PER_PAIR are always whole.
  """
  axis = batch["tokens"].ndim - 2

  def put(name: str, x: np.ndarray) -> jax.Array:
    where = NamedSharding(mesh, batch_spec(name, axis))
    if name in PER_PAIR:
      return jax.make_array_from_callback(x.shape, where, lambda index: x[index])
    rows, n = share or (range(x.shape[axis]), x.shape[axis])
    index_of = {row: at for at, row in enumerate(rows)}

    def part(index) -> np.ndarray:
      wanted = range(*index[axis].indices(n))
      at = index_of[wanted[0]]  # the rows of a device are consecutive
      return x[(*index[:axis], slice(at, at + len(wanted)), *index[axis + 1 :])]

    return jax.make_array_from_callback((*x.shape[:axis], n, *x.shape[axis + 1 :]), where, part)

  return {name: put(name, x) for name, x in batch.items()}


def _name(path: tuple) -> str:
  return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
