"""The interpreter's state on the device: a pool of keys and values, a log of its entries, a table of threads.

Shapes: P pool entries, M threads at most, K key-value heads, H head width. Everything is a pytree of fixed
shapes; one request has one state.

The pool's first entries are the prompt's; behind them, the entries that the branches of a step write lie next
to each other. A thread is a row of visibility over the pool: **a fork copies the parent's row, a join ORs the
children's rows into it**, and a row gains what its own thread writes.

Time goes in rounds. In a round every runnable thread takes one token, in the order of thread numbers, as many
at a time as the step is wide; forks are numbered in that order. So neither numbers, nor limits, nor what a
thread sees depend on the width: a narrow machine replays what a wide one does (schedule invariance).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pasta_jax.lang.automaton import ORDINARY

# Status of a thread.
FREE, RUNNING, WAITING, DONE = range(4)
# Why a response ended.
UNFINISHED, STOP, LENGTH, POOL = range(4)
FINISH_REASONS = ("unfinished", "stop", "length", "pool")


class Pool(NamedTuple):
  """Keys and values, one array a layer. Stored so that neither product of attention transposes them."""

  keys: list[jax.Array]  # n_layers x [K, H, P]
  values: list[jax.Array]  # n_layers x [K, P, H]


class Log(NamedTuple):
  """What each pool entry is; read by the host for streaming and for the trace."""

  token: jax.Array  # [P] int32
  thread: jax.Array  # [P] int32, -1 for the prompt
  position: jax.Array  # [P] int32
  round: jax.Array  # [P] int32, in which the entry was written
  step: jax.Array  # [P] int32, decode step in which it was written
  chosen: jax.Array  # [P] int32, the token chosen behind this entry
  gram: (
    jax.Array
  )  # [P] uint32, hash of the thread's last tokens up to this one (`sampling.gram_hash`); 0: too few
  log_p: jax.Array  # [P] float32, the model's log-probability of the token chosen behind this entry
  logits: jax.Array  # [P, V] float32 where `StepFeatures.return_logits`, else [P, 0]


class Threads(NamedTuple):
  """The table of threads; number 0 is the main thread, and parents come before their children."""

  status: jax.Array  # [M] int32
  token: jax.Array  # [M] int32, chosen but not yet read back
  kind: jax.Array  # [M] int32, class of that token (`lang.automaton`)
  index: jax.Array  # type: ignore[assignment]  # [M] int32, of that token in the thread's own tokens; -1: the prompt's last
  position: jax.Array  # [M] int32, where that token will stand
  round: jax.Array  # [M] int32, in which it will be read back
  state: jax.Array  # [M] int32, of the tag automaton, before that token
  number: jax.Array  # [M] int32, read so far in the current promise; -1: no digit yet
  topic: jax.Array  # [M] uint32, hash of the current promise's topic so far
  topic_before: jax.Array  # [M] uint32, the same without its last token
  topic_last: jax.Array  # [M] int32, that token
  topic_length: jax.Array  # [M] int32
  children: jax.Array  # [M] int32, promises kept so far
  depth: jax.Array  # [M] int32
  parent: jax.Array  # [M] int32, -1 for the main thread
  owner: jax.Array  # [M] int32: whose next sync joins it; the parent, or who adopted it; -1 once joined
  ordinal: jax.Array  # [M] int32, among the parent's children
  declared: jax.Array  # [M] int32, number in its promise; -1: none
  kept_before: jax.Array  # [M] uint32, hash of its promise's topic without the last token
  kept_last: jax.Array  # [M] int32, that token; -1 for an empty topic
  recent: (
    jax.Array
  )  # [M, n] int32, own tokens read last, oldest first; -1: none (n: `StepFeatures.no_repeat` - 1, or 0)
  fork_entry: jax.Array  # [M] int32, pool entry of its promise's last token
  fork_index: jax.Array  # [M] int32, index of that token in the parent's own tokens
  length: jax.Array  # [M] int32, own tokens read back
  key: jax.Array  # [M, 2] uint32, from the request's seed and the path of ordinals
  visible: jax.Array  # [M, P] bool


class State(NamedTuple):
  """One request."""

  pool: Pool
  log: Log
  threads: Threads
  used: jax.Array  # int32, pool entries in use
  prompt: jax.Array  # int32, pool entries of the prompt
  round: jax.Array  # int32, the current one, from 1
  served: jax.Array  # int32, threads that had their turn in this round
  room: jax.Array  # int32, promises that may be opened in this round before the table is full
  runnable: jax.Array  # int32, threads that still wait for their turn in this round
  steps: jax.Array  # int32, decode steps so far
  n_threads: jax.Array  # int32
  finish: jax.Array  # int32, index into FINISH_REASONS


def fill(n: int, value: int) -> jax.Array:
  """[n] int32."""
  return jnp.full((n,), value, jnp.int32)


def initial(
  keys: list[jax.Array],
  values: list[jax.Array],
  prompt: jax.Array,
  length: jax.Array,
  seed: jax.Array,
  *,
  max_threads: int,
  capacity: int,
  logits: int,
  recent: int = 0,
) -> State:
  """The state behind a prefill.

  `keys`, `values`: per layer [S, K, H] of the padded prompt; `prompt` [S] its tokens and `length` how many of
  them are real. The prompt's last token becomes the main thread's first one to be read. `capacity` P >= S;
  `logits` is V to capture them, else 0; `recent` the length of `Threads.recent`.
  """
  m, p = max_threads, capacity
  n = length - 1
  padded = p - prompt.shape[0]
  pool = Pool(
    [jnp.pad(k.transpose(1, 2, 0), ((0, 0), (0, 0), (0, padded))) for k in keys],
    [jnp.pad(v.transpose(1, 0, 2), ((0, 0), (0, padded), (0, 0))) for v in values],
  )
  log = Log(
    token=jnp.pad(prompt, (0, padded)),
    thread=fill(p, -1),
    position=jnp.arange(p, dtype=jnp.int32),
    round=fill(p, 0),
    step=fill(p, 0),
    chosen=fill(p, 0),
    gram=jnp.zeros(p, jnp.uint32),
    log_p=jnp.zeros(p),
    logits=jnp.zeros((p, logits)),
  )
  main = jnp.arange(m) == 0
  no_hash = jnp.zeros(m, jnp.uint32)
  threads = Threads(
    status=jnp.where(main, RUNNING, FREE),
    token=jnp.where(main, prompt[n], 0),
    kind=fill(m, ORDINARY),
    index=fill(m, -1),
    position=jnp.where(main, n, 0),
    round=fill(m, 1),
    state=fill(m, 0),
    number=fill(m, -1),
    topic=no_hash,
    topic_before=no_hash,
    topic_last=fill(m, -1),
    topic_length=fill(m, 0),
    children=fill(m, 0),
    depth=fill(m, 0),
    parent=fill(m, -1),
    owner=fill(m, -1),
    ordinal=fill(m, 0),
    declared=fill(m, -1),
    kept_before=no_hash,
    kept_last=fill(m, -1),
    recent=jnp.full((m, recent), -1, jnp.int32),
    fork_entry=fill(m, 0),
    fork_index=fill(m, 0),
    length=fill(m, 0),
    key=_keys(seed, m),
    visible=main[:, None] & (jnp.arange(p) < n)[None, :],
  )
  one = jnp.ones((), jnp.int32)
  return State(
    pool,
    log,
    threads,
    used=n,
    prompt=n,
    round=one,
    served=0 * one,
    room=one * (m - 1),
    runnable=one,
    steps=0 * one,
    n_threads=one,
    finish=0 * one,
  )


def _keys(seed: jax.Array, m: int) -> jax.Array:
  return jnp.tile(jax.random.key_data(jax.random.key(seed)), (m, 1))


def reseed(state: State, seed: jax.Array) -> State:
  """The state behind a prefill as another seed would have it: samples of one prompt share its prefill."""
  t = state.threads
  return state._replace(threads=t._replace(key=_keys(seed, t.status.shape[0])))


def grow(state: State, capacity: int) -> State:
  """The same state with a larger pool."""
  more = capacity - state.log.token.shape[0]

  def along(axis):
    return lambda x: jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])

  pool = Pool([along(2)(k) for k in state.pool.keys], [along(1)(v) for v in state.pool.values])
  log = jax.tree.map(along(0), state.log)
  threads = state.threads._replace(visible=along(1)(state.threads.visible))
  return state._replace(pool=pool, log=log, threads=threads)


def earlier(state: State) -> jax.Array:
  """[P] bool: entries written before this round. What looks at other threads' entries looks at these only, so
  that the width of a step changes nothing."""
  return (jnp.arange(state.log.round.shape[0]) < state.used) & (state.log.round < state.round)


def summary(state: State) -> dict[str, Any]:
  """The scalars that the host steers by."""
  return {"used": state.used, "runnable": state.runnable, "finish": state.finish, "steps": state.steps}
