"""Which pool entries a thread sees, in each form of visibility (docs/language.md section 3).

A row of `State.sight` is what a thread knows of it:

  promise   [P] bool, the entries that it sees. A fork copies the parent's row, a thread adds what it reads, a join
            ORs the rows of its chunks.
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


def seen(live: bool, state: State, rows: jax.Array) -> jax.Array:
  """[W, P] bool: what the threads `rows` [W] see in this round. Unused entries are never seen."""
  sight = state.sight.at[rows].get(mode="clip")
  if not live:
    return sight
  # Entries of this round are the last ones in use. One comparison an entry is left to what reads the mask, which XLA
  # repeats in every layer and head; an index into [W · M] keeps the mask's own order of axes.
  before = state.used - state.served
  until = jnp.append(
    jnp.minimum(sight, before), jnp.broadcast_to(before, (sight.shape[0], 1)), axis=1
  )  # [W, M + 1]
  width, columns = until.shape
  thread = jnp.where(state.log.thread < 0, columns - 1, state.log.thread)  # the last column is the prompt's
  place = jnp.arange(width)[:, None] * columns + thread
  return jnp.arange(thread.shape[0]) < until.reshape(-1).at[place].get(mode="clip")


def after_turns(
  live: bool, state: State, rows: jax.Array, entries: jax.Array, chunks: jax.Array
) -> jax.Array:
  """[M, …] the sights of all threads after threads `rows` [W] have read pool entries `entries`, and promised `chunks`;
  M for none. **A fork copies the parent's row**. In `live` a chunk sees its parent up to the promise, and whoever sees
  the promise sees the chunk as far as it comes."""
  sight = state.sight
  if not live:
    after = sight.at[rows].get(mode="clip") | (jnp.arange(sight.shape[1]) == entries[:, None])
    return sight.at[jnp.append(rows, chunks)].set(jnp.concatenate([after, after]), mode="drop")
  # By elementwise choices: a scatter a row and one a column would cost more than the rest of the form.
  t, numbers = state.threads, jnp.arange(sight.shape[0])
  new = (numbers[:, None] == chunks).any(axis=1)  # [M]
  until = jnp.where(new[:, None], sight.at[t.parent].get(mode="clip"), sight)
  until = jnp.where(new[:, None] & (numbers == t.parent[:, None]), t.fork_entry[:, None] + 1, until)
  sees_promise = until.at[:, t.parent].get(mode="clip") > t.fork_entry  # [M, M]: of the column's chunk
  return jnp.where(new, jnp.where(sees_promise, ALL, 0), until)


def after_joins(live: bool, sight: jax.Array, joins: jax.Array) -> jax.Array:
  """[M, …] the sights after threads have joined others, `joins` [M, M]: **a join ORs their rows into its own**."""

  def merge(visible):  # an OR as a matrix product: no [M, M, P] array
    counts = jnp.dot(joins.astype(jnp.float32), visible.astype(jnp.float32))
    return visible | (counts > 0)

  return sight if live else jax.lax.cond(joins.any(), merge, lambda visible: visible, sight)


def grown(live: bool, sight: jax.Array, more: int) -> jax.Array:
  """[M, …] the sights in a pool with `more` entries."""
  return sight if live else jnp.pad(sight, ((0, 0), (0, more)))
