"""One decode step: up to W branches take one token each, as a vmap over branches that share the pool. What a
token does to a thread is in `decode.threads`, what it may be in `decode.guard` and `decode.sampling`."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pasta_jax.decode import invariant, sight
from pasta_jax.decode import threads as T
from pasta_jax.decode.attention import append_entries, make_decode_attend
from pasta_jax.decode.guard import View
from pasta_jax.decode.limits import finish_reason, promise_room
from pasta_jax.decode.sampling import Branch, Sampling, TokenTables, ngram_hash, pick
from pasta_jax.decode.settings import Limits, StepFeatures
from pasta_jax.decode.state import UNFINISHED, State, TokenLog, earlier
from pasta_jax.decode.threads import FREE, RUNNING, Thread
from pasta_jax.model.attention import sliding_window_mask
from pasta_jax.model.transformer import Transformer


class Lanes(NamedTuple):
  """The places of a step. The rows of idle lanes are M: reads are clipped, writes dropped."""

  rows: jax.Array  # [W] int32, thread numbers
  live: jax.Array  # [W] bool
  entry: jax.Array  # [W] int32, the pool entry that the lane writes


class Output(NamedTuple):
  """What one forward pass gives. A leading axis W outside the vmap."""

  cache: list[tuple[jax.Array, jax.Array]]  # per layer: key and value [K, H]
  token: jax.Array  # int32, chosen
  log_p: jax.Array  # float32, of that token
  logits: jax.Array  # [V] float32


def step(model: Transformer, state: State, tables: TokenTables, sampling: Sampling, *, width: int, limits: Limits,
         features: StepFeatures) -> State:  # fmt: skip
  """Gives the next `width` threads of the round their turn; a finished request is left as it is.

  Needs `used + width` <= P: lanes without a thread write after the used entries.
  """
  lanes = schedule(state, width)
  threads = state.table.take(lanes.rows).unpack()
  hashes = jax.tree.map(lambda x: x[threads.token], tables.heads)
  read = jax.vmap(partial(T.read_token, automaton=features.automaton))(
    threads, tables.value[threads.token], tables.scale[threads.token], hashes
  )
  forks, children = allocate(state, lanes, read, limits)
  sees = sight.seen(features.live, state, lanes.rows)
  branches = observe(state, lanes, threads, sees, read, forks, limits, features)
  given = model, state, tables, sampling, limits, features
  if features.invariant:
    out = Output(*invariant.forward(*given, lanes.live, branches))
  else:
    out = jax.vmap(partial(forward, *given))(branches)
  state = append(state, lanes, branches, out, features)
  advance = jax.vmap(partial(T.advance, rule=features.rule, automaton=features.automaton))
  advanced = advance(read, forks, out.token, tables.classes[out.token])
  spawned = jax.vmap(T.spawn, (0, 0, 0, None))(read, lanes.rows, lanes.entry, tables.async_tag)
  both = jax.tree.map(lambda *x: jnp.concatenate(x), advanced, spawned)
  state = state.replace(table=state.table.put(jnp.append(lanes.rows, children), both))
  served = lanes.live.sum()
  state = state.replace(
    sight=sight.after_turns(features.live, state, lanes.rows, lanes.entry, children),
    used=state.used + served, served=state.served + served,
    steps=state.steps + (served > 0), n_threads=state.n_threads + forks.sum(),
  )  # fmt: skip
  return end_round(state, limits, features)


def schedule(state: State, width: int) -> Lanes:
  """The threads that have not had their turn in this round, lowest numbers first."""
  t = state.threads
  due = (t.status == RUNNING) & (t.round == state.round) & (state.finish == UNFINISHED)
  # Thread w of those due, from 0, comes after all threads up to which no more than w are due; M where there is none.
  rows = (jnp.cumsum(due) <= jnp.arange(width)[:, None]).sum(axis=1)
  return Lanes(rows, rows < due.shape[0], state.used + jnp.arange(width))


def allocate(state: State, lanes: Lanes, read: T.TokenRead, limits: Limits) -> tuple[jax.Array, jax.Array]:
  """(promises that are granted [W] bool, their chunks' rows [W], M for none): limits on depth and number."""
  m = state.threads.status.shape[0]
  wants = lanes.live & read.forks & (read.thread.depth < limits.max_depth)
  rows = state.n_threads + jnp.cumsum(wants) - 1
  forks = wants & (rows < m)
  return forks, jnp.where(forks, rows, m)


def observe(state: State, lanes: Lanes, threads: Thread, sees: jax.Array, read: T.TokenRead, forks: jax.Array,
            limits: Limits, features: StepFeatures) -> Branch:  # fmt: skip
  """What each branch, which sees the pool entries `sees` [W, P], knows after its token."""
  t, after = state.threads, read.thread
  m, width = t.status.shape[0], lanes.rows.shape[0]
  known = sees[:, t.fork_entry]  # [W, M]: lane w sees the promise of thread m
  if features.no_repeat:
    # Those of threads that it does not see too, as with runs of tokens (`sampling.choose`).
    known |= earlier(state)[t.fork_entry]
  kept = (jnp.arange(m) > 0) & (t.status != FREE) & (t.kept_last >= 0)
  joinable = (t.owner == lanes.rows[:, None]) & (t.status != FREE)
  rank = state.served + jnp.arange(width)
  taken = known & kept & (t.kept_before == after.topic[:, None])
  view = View(
    state=after.state, is_main=after.parent < 0, index=after.index, number=after.number,
    topic_length=after.topic_length, may_open=(rank < state.room) & (after.depth < limits.max_depth),
    may_sync=joinable.any(axis=1) | forks, repeats=taken.any(axis=1) & features.head,
  )  # fmt: skip
  return Branch(threads, sees, view, taken, ngram_hash(after.recent))


def forward(model: Transformer, state: State, tables: TokenTables, sampling: Sampling, limits: Limits,
            features: StepFeatures, branch: Branch) -> Output:  # fmt: skip
  """One branch's token through the model, and the choice of the next one."""
  t = branch.thread
  window = sliding_window_mask(t.position[None], state.log.position, model.config.window)
  attend = make_decode_attend(
    features.attention, branch.sees, None if window is None else window[0], model.config.attention_softcap
  )
  hidden, cache = model(t.token, t.position, attend, list(zip(state.pool.keys, state.pool.values)))
  logits = model.logits(hidden)
  return Output(cache, *pick(logits, state, branch, tables, sampling, limits, features), logits)


def append(state: State, lanes: Lanes, branches: Branch, out: Output, features: StepFeatures) -> State:
  """Writes keys, values and the log of the W lanes next to each other after the used entries: after the tokens have
  been chosen, that is, after every read of the pool."""
  t, used = branches.thread, state.used
  pool = append_entries(features.attention, state.pool, out.cache, used, out.token)
  every = lambda x: jnp.full(lanes.rows.shape, x)
  log = TokenLog(
    token=t.token, thread=jnp.where(t.index < 0, -1, lanes.rows), position=t.position, round=every(state.round),
    step=every(state.steps + 1), next_token=out.token, ngram_hash=branches.ngram, log_p=out.log_p,
  )  # fmt: skip
  logits = state.logits
  if features.return_logits:
    logits = jax.lax.dynamic_update_slice(logits, out.logits, (used, jnp.int32(0)))
  return state.replace(pool=pool, entries=state.entries.write(used, log), logits=logits)


def end_round(state: State, limits: Limits, features: StepFeatures) -> State:
  """After every step; when every thread has had its turn: adoptions, joins, limits, and the next round."""
  t = state.threads
  over = ~((t.status == RUNNING) & (t.round == state.round)).any() & (state.finish == UNFINISHED)
  t = t.replace(owner=jnp.where(over, T.adopt(t, limits.max_depth), t.owner))
  changes, joins = T.join(t, over, state.round, features.rule)
  t = t.replace(**changes)
  running = t.status == RUNNING
  todo = running.sum()
  keep = lambda new, old: jnp.where(over, new, old)
  return state.replace(
    table=state.table.update(**changes),
    sight=sight.after_joins(features.live, state.sight, joins),
    round=state.round + over,
    served=keep(0, state.served),
    room=keep(promise_room(state, t, todo, limits), state.room),
    runnable=keep(todo, (running & (t.round == state.round)).sum()),
    finish=keep(finish_reason(state, t, todo, limits), state.finish),
  )
