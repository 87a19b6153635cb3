"""Which pool entries a thread sees, in each form of visibility (docs/language.md section 3).

`Thread.sight` is what a thread knows of it:

  promise   [P] bool, the entries that it sees. A fork copies the parent's row, a thread adds what it reads, a join
            ORs the rows of its chunks (`threads.join`).
  live      [M] int32, `until`: it sees entry e of thread u, read in an earlier round, iff e < until[u]. Forks alone
            change it: a chunk sees what its parent sees, the parent itself up to the promise, and whoever sees the
            promise sees the chunk. A place follows from the parent, never from the owner, so syncs and adoption
            change nothing. No [M, P] array of threads is needed.

Every function takes `live`, which is static: whether the form is `live`. P: pool entries, M: rows of the table, W:
lanes of a step.
"""

import jax
import jax.numpy as jnp

from pasta_jax.decode.state import State

ALL = 2**30  # `until` of a thread that is seen as far as it has come; above every entry


def main_thread(live: bool, capacity: int, prompt: jax.Array, max_threads: int) -> jax.Array:
  """The main thread's sight after a prefill of `prompt` entries."""
  if live:
    return jnp.zeros(max_threads, jnp.int32).at[0].set(ALL)
  return jnp.arange(capacity) < prompt


def seen(live: bool, state: State, sight: jax.Array) -> jax.Array:
  """[W, P] bool: what threads with the sights [W, …] see in this round. Unused entries are never seen."""
  if not live:
    return sight
  log, entries = state.log, jnp.arange(state.log.thread.shape[0])
  until = sight.at[:, jnp.maximum(log.thread, 0)].get(mode="clip")
  before = (entries < state.used) & (log.round < state.round)
  return before & ((log.thread < 0) | (entries < until))


def after_turn(live: bool, sight: jax.Array, entry: jax.Array, is_live: jax.Array) -> jax.Array:
  """One thread's sight after it has read pool entry `entry`; `is_live` False: an idle lane."""
  return sight if live else sight | (is_live & (jnp.arange(sight.shape[0]) == entry))


def of_chunk(
  live: bool, sight: jax.Array, parent: jax.Array, entry: jax.Array, number: jax.Array
) -> jax.Array:
  """The sight of chunk `number`, whose promise in `parent` ended with pool entry `entry`: **a fork copies the
  parent's row**, after the parent's turn."""
  if not live:
    return sight
  return sight.at[parent].set(entry + 1, mode="drop").at[number].set(ALL, mode="drop")


def of_others(
  live: bool, sight: jax.Array, parents: jax.Array, entries: jax.Array, chunks: jax.Array
) -> jax.Array:
  """[M, …] the sights of all threads after the forks of a step [W]: whoever sees a promise sees its chunk as far as
  it comes. Chunks with row M are none."""
  if not live:
    return sight
  column = jnp.where(sight.at[:, parents].get(mode="clip") > entries, ALL, 0)  # [M, W]
  return sight.at[:, chunks].set(column, mode="drop")


def grown(live: bool, sight: jax.Array, more: int) -> jax.Array:
  """[M, …] the sights in a pool with `more` entries."""
  return sight if live else jnp.pad(sight, ((0, 0), (0, more)))
