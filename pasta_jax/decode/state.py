"""The state of one request on the device: keys and values, a log of the entries, a table of threads.

Shapes: P pool entries, M threads at most, K key-value heads, H head width. All shapes are fixed.

The pool's first entries are the prompt's. After them the entries that the branches of a step write lie next
to each other.

Time goes in rounds. In a round every runnable thread takes one token, in the order of thread numbers, as many
at a time as the step is wide; forks are numbered in that order. So neither numbers, nor limits, nor what a
thread sees depend on the width: a narrow machine replays what a wide one does (schedule invariance).
"""

import jax
import jax.numpy as jnp
from flax import struct

from pasta_jax.decode.packed import Packed
from pasta_jax.decode.threads import FREE, Thread, born

# Why a response ended.
UNFINISHED, STOP, LENGTH, POOL = range(4)
FINISH_REASONS = ("unfinished", "stop", "length", "pool")


class KVPool(struct.PyTreeNode):
  """Keys and values, one array a layer. Stored so that neither product of attention transposes them."""

  keys: list[jax.Array]  # n_layers x [K, H, P]
  values: list[jax.Array]  # n_layers x [K, P, H]


class TokenLog(struct.PyTreeNode):
  """What each pool entry is; the host reads it for streaming and for the trace."""

  token: jax.Array  # [P] int32
  thread: jax.Array  # [P] int32, -1 for the prompt
  position: jax.Array  # [P] int32
  round: jax.Array  # [P] int32, in which the entry was written
  step: jax.Array  # [P] int32, decode step in which it was written
  next_token: jax.Array  # [P] int32, the token chosen after this entry
  ngram_hash: jax.Array  # [P] uint32, of the thread's last tokens up to this one (`sampling`); 0: too few
  log_p: jax.Array  # [P] float32, the model's log-probability of `next_token`


class State(struct.PyTreeNode):
  """One request."""

  pool: KVPool
  entries: Packed  # `log`
  logits: jax.Array  # [P, V] float32, of the entries, where `StepFeatures.return_logits`; else [P, 0]
  table: Packed  # `threads`
  sight: jax.Array  # [M, …], what each thread sees (`decode.sight`)
  used: jax.Array  # int32, pool entries in use
  prompt: jax.Array  # int32, pool entries of the prompt, without its last token, which the first step reads
  round: jax.Array  # int32, the current one, from 1
  served: jax.Array  # int32, threads that had their turn in this round
  room: jax.Array  # int32, promises that may be opened in this round before the table is full
  runnable: jax.Array  # int32, threads that still wait for their turn in this round
  steps: jax.Array  # int32, decode steps so far
  n_threads: jax.Array  # int32
  finish: jax.Array  # int32, index into FINISH_REASONS

  @property
  def log(self) -> TokenLog:
    """Every leaf [P]."""
    return self.entries.unpack()

  @property
  def threads(self) -> Thread:
    """Every leaf [M, …]."""
    return self.table.unpack()


def initial(keys: list[jax.Array], values: list[jax.Array], prompt: jax.Array, length: jax.Array, seed: jax.Array, *,
            main_sight: jax.Array, max_threads: int, capacity: int, logits: int, recent: int = 0) -> State:  # fmt: skip
  """The state after a prefill.

  `keys`, `values`: per layer [S, K, H] of the padded prompt; `prompt` [S] its tokens, of which `length` are
  real. The prompt's last token is the first one that the main thread reads. `capacity` P >= S; `logits` is V
  to keep them, else 0; `recent` the length of `Thread.recent`; `main_sight` what the main thread sees.
  """
  n = length - 1
  padded = capacity - prompt.shape[0]
  pool = KVPool(
    [jnp.pad(k.transpose(1, 2, 0), ((0, 0), (0, 0), (0, padded))) for k in keys],
    [jnp.pad(v.transpose(1, 0, 2), ((0, 0), (0, padded), (0, 0))) for v in values],
  )
  entries = jnp.arange(capacity, dtype=jnp.int32)
  blank = jnp.zeros_like(entries)
  log = TokenLog(
    token=jnp.pad(prompt, (0, padded)), thread=blank - 1, position=entries, round=blank, step=blank,
    next_token=blank, ngram_hash=blank.astype(jnp.uint32), log_p=jnp.zeros(capacity),
  )  # fmt: skip
  main = born(token=prompt[n], index=-1, position=n, round=1, key=_key(seed), recent=blank[:recent])
  every = lambda x: jnp.broadcast_to(x, (max_threads, *x.shape))
  threads = jax.tree.map(every, main)
  threads = threads.replace(status=threads.status.at[1:].set(FREE))
  one = jnp.int32(1)
  return State(
    pool=pool, entries=Packed.of(log), logits=jnp.zeros((capacity, logits)), table=Packed.of(threads),
    sight=every(main_sight), used=n, prompt=n, round=one, served=0 * one, room=one * (max_threads - 1), runnable=one,
    steps=0 * one, n_threads=one, finish=0 * one,
  )  # fmt: skip


def _key(seed: jax.Array) -> jax.Array:
  return jax.random.key_data(jax.random.key(seed))


def reseed(state: State, seed: jax.Array) -> State:
  """The state after a prefill as another seed would have it: samples of one prompt share its prefill."""
  key = jnp.broadcast_to(_key(seed), state.threads.key.shape)
  return state.replace(table=state.table.update(key=key))


def grow(state: State, capacity: int, sight: jax.Array) -> State:
  """The same state with a larger pool; `sight` is that of its threads in it."""
  more = capacity - state.logits.shape[0]
  along = lambda axis: lambda x: jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])
  pool = KVPool([along(2)(k) for k in state.pool.keys], [along(1)(v) for v in state.pool.values])
  return state.replace(
    pool=pool, entries=jax.tree.map(along(1), state.entries), logits=along(0)(state.logits), sight=sight
  )


def earlier(state: State) -> jax.Array:
  """[P] bool: entries written before this round, the prompt's included. Whatever reads threads that are not
  visible reads only these, so that the width of a step changes nothing."""
  return (jnp.arange(state.log.round.shape[0]) < state.used) & (state.log.round < state.round)
