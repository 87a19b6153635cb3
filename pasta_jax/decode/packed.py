"""Records of many small fields as one array: a step writes one array, where it would write dozens.

A record is a `PyTreeNode` of arrays [N, …] of 32 bits. Packed, its fields are rows of one int32 array, bit for bit. A
field is declared by the record alone: its shape and type are those that it has when it is first packed.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

Field = tuple[str, tuple[int, ...], Any]  # name, shape without N, type


class Packed(struct.PyTreeNode):
  """N records. A field has rows of its own: whoever reads it of all records reads contiguous numbers."""

  rows: jax.Array  # [rows, N] int32
  record: type = struct.field(pytree_node=False)
  fields: tuple[Field, ...] = struct.field(pytree_node=False)

  @classmethod
  def of(cls, record: Any) -> "Packed":
    """Packs a record."""
    fields = tuple((name, x.shape[1:], x.dtype) for name, x in vars(record).items())
    return cls(_pack(record, fields), type(record), fields)

  def unpack(self) -> Any:
    """The record, of host arrays if the rows are on the host."""
    values, at = {}, 0
    for name, shape, dtype in self.fields:
      size = math.prod(shape)
      x = self.rows[at : at + size].view(dtype).reshape(*shape, self.rows.shape[1])
      values[name], at = x.transpose(-1, *range(len(shape))), at + size
    return self.record(**values)

  def take(self, at: jax.Array) -> "Packed":
    """Records `at` [K]; numbers are clipped. The barrier has them read once, where XLA would read them again in every
    kernel that uses a field."""
    return self.replace(rows=jax.lax.optimization_barrier(self.rows.at[:, at].get(mode="clip")))

  def put(self, at: jax.Array, record: Any) -> "Packed":
    """With `record` [K, …] in the places `at` [K]; what has the place N is dropped."""
    return self.replace(rows=self.rows.at[:, at].set(_pack(record, self.fields), mode="drop"))

  def write(self, start: jax.Array, record: Any) -> "Packed":
    """With `record` [K, …] in the K places from `start` on."""
    new = _pack(record, self.fields)
    return self.replace(rows=jax.lax.dynamic_update_slice_in_dim(self.rows, new, start, axis=1))

  def update(self, **values: jax.Array) -> "Packed":
    """With other values [N, …] of some fields."""
    return self.replace(rows=_pack(self.unpack().replace(**values), self.fields))


def _pack(record: Any, fields: tuple[Field, ...]) -> jax.Array:
  """[rows, N] int32."""
  rows = []
  for name, shape, dtype in fields:
    x = getattr(record, name).astype(dtype).view(jnp.int32)
    rows.append(jnp.moveaxis(x, 0, -1).reshape(math.prod(shape), x.shape[0]))
  return jnp.concatenate(rows)
