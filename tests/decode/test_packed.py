"""Records packed into one array, against the same records as numpy arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from pasta_jax.decode.packed import Packed


class Record(struct.PyTreeNode):
  """Fields of every type and shape that a record may have."""

  a: jax.Array
  b: jax.Array  # [2] uint32
  c: jax.Array  # float32
  d: jax.Array  # [n], or [0]
  e: jax.Array  # [2, 3]
  f: jax.Array  # uint32


def records(rng: np.random.Generator, n: int, recent: int) -> Record:
  """`n` records of random bits: negative numbers, large hashes, NaNs."""
  bits = lambda *shape: rng.integers(0, 1 << 32, (n, *shape), np.uint32)
  ints = lambda *shape: bits(*shape).view(np.int32)
  return Record(ints(), bits(2), bits().view(np.float32), ints(recent), ints(2, 3), bits())


def same(got: Record, want: Record) -> None:
  for field in dataclasses.fields(Record):
    x, y = np.asarray(getattr(got, field.name)), getattr(want, field.name)
    assert (x.shape, x.dtype) == (y.shape, y.dtype), field.name
    np.testing.assert_array_equal(x.view(np.uint32), y.view(np.uint32), field.name)


def on_device(record: Record) -> Record:
  return jax.tree.map(jnp.asarray, record)


@pytest.mark.parametrize("seed", range(6))
def test_operations_are_those_of_each_field(seed):
  rng = np.random.default_rng(seed)
  n, k, recent = int(rng.integers(4, 12)), int(rng.integers(1, 4)), int(rng.integers(0, 4))
  old, new, values = records(rng, n, recent), records(rng, k, recent), records(rng, n, recent)
  packed, added = Packed.of(on_device(old)), on_device(new)
  same(packed.unpack(), old)
  same(jax.device_get(packed).unpack(), old)

  at = rng.integers(0, n + 3, k)  # some beyond the end
  same(jax.jit(Packed.take)(packed, at).unpack(), jax.tree.map(lambda x: x[np.minimum(at, n - 1)], old))

  at = rng.permutation(n + 2)[:k]

  def put(x, y):
    x = x.copy()
    x[at[at < n]] = y[at < n]
    return x

  same(jax.jit(Packed.put)(packed, np.where(at < n, at, n), added).unpack(), jax.tree.map(put, old, new))

  start = int(rng.integers(0, n - k + 1))
  write = lambda x, y: np.concatenate([x[:start], y, x[start + k :]])
  same(jax.jit(Packed.write)(packed, start, added).unpack(), jax.tree.map(write, old, new))

  some = dict(b=values.b, c=values.c, e=values.e)
  update = jax.jit(lambda packed, some: packed.update(**some))
  same(update(packed, jax.tree.map(jnp.asarray, some)).unpack(), old.replace(**some))


def test_many_requests_at_once_are_those_alone():
  rng = np.random.default_rng(9)
  several = [records(rng, 5, 2) for _ in range(3)]
  batch = jax.tree.map(lambda *x: jnp.stack(x), *[Packed.of(on_device(r)) for r in several])
  at = rng.integers(0, 5, (3, 2))
  taken = jax.vmap(lambda packed, at: packed.take(at).unpack())(batch, at)
  for i, record in enumerate(several):
    got = jax.tree.map(lambda x, i=i: x[i], taken)
    same(got, jax.tree.map(lambda x, i=i: x[at[i]], record))


def test_a_write_of_all_fields_is_one():
  """What packing is for."""
  rng = np.random.default_rng(0)
  packed, new = Packed.of(on_device(records(rng, 8, 3))), on_device(records(rng, 2, 3))
  program = lambda f: str(jax.make_jaxpr(f)(packed, new))
  assert program(lambda p, r: p.put(jnp.arange(2), r)).count(" scatter[") == 1
  assert program(lambda p, r: p.write(jnp.int32(3), r)).count(" dynamic_update_slice") == 1
