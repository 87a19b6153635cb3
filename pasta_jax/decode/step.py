"""One decode step: up to W branches take one token each, as a vmap over branches that share the pool.

`step` is a pure function from State to State. It gathers W threads, runs the vmapped one-token forward pass
(which reads the pool and returns its own keys and values), writes these to the pool side by side, and applies
what the tokens mean to the table of threads: forks, joins, positions, ends, limits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pasta_jax.decode import guard
from pasta_jax.decode.sampling import Sampling, ban, draw, gram_hash, penalise
from pasta_jax.decode.settings import Limits, StepFeatures
from pasta_jax.decode.state import (
  DONE,
  FREE,
  LENGTH,
  POOL,
  RUNNING,
  STOP,
  UNFINISHED,
  WAITING,
  State,
  earlier,
)
from pasta_jax.lang import automaton as A
from pasta_jax.model.attention import MASK_VALUE, layer_mask, sliding_window_mask
from pasta_jax.model.transformer import Transformer, soft_cap


class Tables(NamedTuple):
  """Per token id [V]: what `automaton.TokenTable` says, and which tokens the repetition penalty is for."""

  classes: jax.Array  # int32
  value: jax.Array  # int32
  scale: jax.Array  # int32
  penalised: jax.Array  # bool
  async_tag: jax.Array  # int32, not per token: the id that a chunk begins with
  open_tag: jax.Array  # int32, the id that a promise begins with


class Branch(NamedTuple):
  """One thread's turn; every field has a leading axis W outside the vmap."""

  token: jax.Array  # int32, to be read
  position: jax.Array  # int32
  visible: jax.Array  # [P] bool
  key: jax.Array  # [2] uint32
  view: guard.View  # of the thread behind `token`
  taken: jax.Array  # [M] bool: this promise that it knows has the topic so far, but for one more token
  gram: jax.Array  # uint32, hash of its last tokens (`sampling.gram_hash`)


def pool_attention(visible: jax.Array, near: jax.Array | None, softcap: float):
  """`attend` of one branch: its own token and the pool entries that it sees; `near` [P] of local layers."""

  def attend(cache, q, k, v, local):
    seen = layer_mask(visible, near, local)
    keys, values = cache  # [K, H, P], [K, P, H]
    q, k, v = q.astype(keys.dtype), k.astype(keys.dtype), v.astype(values.dtype)
    scores = jnp.einsum("kgh,khp->kgp", q, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(seen, soft_cap(scores, softcap), MASK_VALUE)
    own = soft_cap(jnp.einsum("kgh,kh->kg", q, k, preferred_element_type=jnp.float32), softcap)
    peak = jnp.maximum(jnp.max(scores, axis=-1), own)
    weights, own_weight = jnp.exp(scores - peak[..., None]), jnp.exp(own - peak)
    weights = jnp.where(seen, weights, 0.0)
    context = jnp.einsum(
      "kgp,kph->kgh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
    context = context + own_weight[..., None] * v[:, None].astype(jnp.float32)
    return context / (jnp.sum(weights, axis=-1) + own_weight)[..., None], (k, v)

  return attend


def branch_step(
  model: Transformer,
  state: State,
  branch: Branch,
  tables: Tables,
  sampling: Sampling,
  limits: Limits,
  features: StepFeatures,
):
  """One branch's token through the model: (keys and values per layer, next token, its log p, logits [V])."""
  caches = list(zip(state.pool.keys, state.pool.values))
  near = sliding_window_mask(branch.position[None], state.log.position, model.config.window)
  attend = pool_attention(branch.visible, None if near is None else near[0], model.config.attention_softcap)
  hidden, new = model(branch.token, branch.position, attend, caches)
  logits = model.logits(hidden)
  scores = logits
  if features.use_repetition_penalty:
    # The token that is being read has no entry yet, but must not be said twice in a row either.
    tokens = jnp.append(state.log.token, branch.token)
    written = (
      jnp.append(branch.visible & (state.log.thread >= 0), branch.view.index >= 0) & tables.penalised[tokens]
    )
    scores = penalise(scores, tokens, written & (branch.view.state == A.TEXT), sampling.repetition_penalty)
  if features.no_repeat:
    # What followed the same tokens before may not follow them again; tags are left alone. All threads count:
    # chunks that do not see each other say the same thing too.
    again = (
      earlier(state) & (state.log.gram == branch.gram) & (branch.gram != 0) & (branch.view.state == A.TEXT)
    )
    kinds = tables.classes[state.log.chosen]
    scores = ban(scores, state.log.chosen, again & ((kinds == A.ORDINARY) | (kinds == A.DIGITS)))
  if features.promises:
    scores = scores.at[tables.open_tag].add(sampling.promise_bias)
  allowed = guard.allowed(branch.view, limits, features)[tables.classes]
  if features.guard:
    allowed &= ~guard.absurd(branch.view, tables.value, tables.scale)
    # No topic twice: the token that would complete one that was promised may not come.
    scores = ban(scores, state.threads.kept_last, branch.taken & (branch.view.state == A.TOPIC))
  scores = jnp.where(allowed, scores, MASK_VALUE)
  key = jax.random.fold_in(jax.random.wrap_key_data(branch.key), branch.view.index + 1)
  token = draw(scores, key, sampling, features)
  log_p = logits[token] - jax.nn.logsumexp(logits)
  return new, token, log_p, logits


def step(
  model: Transformer,
  state: State,
  tables: Tables,
  sampling: Sampling,
  *,
  width: int,
  limits: Limits,
  features: StepFeatures,
) -> State:
  """Gives the next `width` threads of the round their turn; a finished request is left as it is.

  Needs `used + width` <= P: the lanes without a thread write behind the used entries.
  """
  t = state.threads
  m = t.status.shape[0]
  due = (t.status == RUNNING) & (t.round == state.round) & (state.finish == UNFINISHED)
  lane = jnp.nonzero(due, size=width, fill_value=m)[0]  # [W] thread numbers, lowest first; m: no thread
  live = lane < m
  at = jnp.minimum(lane, m - 1)

  # What the token to be read means.
  token, index, number = t.token[at], t.index[at], t.number[at]
  is_main = at == 0
  kind = t.kind[at]
  before = t.state[at]
  action, after = jnp.asarray(A.ACTION)[before, kind], jnp.asarray(A.NEXT_STATE)[before, kind]
  ends = (action == A.FINISH) & ~is_main
  opens = (kind == A.OPEN) & (before == A.TEXT)
  digit = (kind == A.DIGITS) & (before == A.NUMBER)
  number = jnp.where(
    digit, A.append_digits(number, tables.value[token], tables.scale[token]), jnp.where(opens, -1, number)
  )
  in_topic = (before == A.TOPIC) & ((kind == A.ORDINARY) | (kind == A.DIGITS))
  topic = jnp.where(
    in_topic,
    t.topic[at] * jnp.uint32(1_000_003) + token.astype(jnp.uint32) + jnp.uint32(1),
    jnp.where(opens, jnp.uint32(0), t.topic[at]),
  )
  topic_before = jnp.where(in_topic, t.topic[at], t.topic_before[at])
  topic_last = jnp.where(in_topic, token, jnp.where(opens, -1, t.topic_last[at]))
  topic_length = jnp.where(in_topic, t.topic_length[at] + 1, jnp.where(opens, 0, t.topic_length[at]))
  declared = jnp.minimum(number, A.MAX_DECLARED)
  wants = live & (action == A.FORK) & (t.depth[at] < limits.max_depth)
  child = state.n_threads + jnp.cumsum(wants) - 1
  forks = wants & (child < m)
  child = jnp.where(forks, child, m)

  # What the branch sees and knows behind that token.
  entry = state.used + jnp.arange(width)
  rows = t.visible[at]
  known = rows[:, t.fork_entry]  # [W, M]: this thread's promise
  if features.no_repeat:  # those of threads that it does not see too, as with runs of tokens (`branch_step`)
    known |= earlier(state)[t.fork_entry]
  taken = (
    known & (jnp.arange(m) > 0) & (t.status != FREE) & (t.kept_last >= 0) & (t.kept_before == topic[:, None])
  )
  recent = (
    jnp.concatenate([t.recent[at][:, 1:], token[:, None]], axis=1) if t.recent.shape[1] else t.recent[at]
  )
  recent = jnp.where((index >= 0)[:, None], recent, t.recent[at])
  joinable = (t.owner == at[:, None]) & (t.status != FREE)
  rank = state.served + jnp.arange(width)
  view = guard.View(
    state=after,
    is_main=is_main,
    index=index,
    number=number,
    topic_length=topic_length,
    may_open=(rank < state.room) & (t.depth[at] < limits.max_depth),
    may_sync=joinable.any(axis=1) | forks,
  )
  branch = Branch(token, t.position[at], rows, t.key[at], view, taken, gram_hash(recent))
  new, chosen, log_p, logits = jax.vmap(
    lambda b: branch_step(model, state, b, tables, sampling, limits, features)
  )(branch)

  # Into the pool and the log, side by side. What is written is made to depend on the tokens chosen (ids are
  # never negative), that is, on every read of the pool: XLA then updates the pool in place, where it would
  # otherwise copy each layer's arrays twice a step.
  put = jax.lax.dynamic_update_slice
  zero = jnp.zeros((), jnp.int32)
  late = lambda x: jnp.where((chosen >= 0)[:, None, None], x, 0)
  keys = [
    put(pool, late(k).transpose(1, 2, 0), (zero, zero, state.used))
    for pool, (k, _) in zip(state.pool.keys, new)
  ]
  values = [
    put(pool, late(v).transpose(1, 0, 2), (zero, state.used, zero))
    for pool, (_, v) in zip(state.pool.values, new)
  ]
  note = lambda log, x: put(log, x.astype(log.dtype), (state.used,))
  log = state.log._replace(
    token=note(state.log.token, token),
    thread=note(state.log.thread, jnp.where(index < 0, -1, at)),
    position=note(state.log.position, t.position[at]),
    round=note(state.log.round, jnp.full(width, state.round)),
    step=note(state.log.step, jnp.full(width, state.steps + 1)),
    chosen=note(state.log.chosen, chosen),
    gram=note(state.log.gram, branch.gram),
    log_p=note(state.log.log_p, log_p),
  )
  if features.return_logits:
    log = log._replace(logits=put(state.log.logits, logits, (state.used, zero)))

  # The threads that had their turn.
  next_kind = tables.classes[chosen]
  next_action = jnp.asarray(A.ACTION)[after, next_kind]
  is_over = is_main & (next_kind == A.EOS)  # the main thread's last token need not be read back
  status = jnp.where(ends | is_over, DONE, jnp.where(next_action == A.JOIN, WAITING, RUNNING))
  gap = jnp.where(forks, features.rule.gap(declared), 0)
  seen = rows | ((entry[:, None] == jnp.arange(rows.shape[1])) & live[:, None])
  own = jnp.where(live, lane, m)
  set_own = lambda field, x: field.at[own].set(x.astype(field.dtype), mode="drop")
  t = t._replace(
    status=set_own(t.status, status),
    token=set_own(t.token, jnp.where(ends, token, chosen)),
    kind=set_own(t.kind, jnp.where(ends, kind, next_kind)),
    index=set_own(t.index, jnp.where(ends, index, index + 1)),
    position=set_own(t.position, t.position[at] + 1 + gap),
    round=set_own(t.round, t.round[at] + 1),
    state=set_own(t.state, after),
    number=set_own(t.number, number),
    topic=set_own(t.topic, topic),
    topic_before=set_own(t.topic_before, topic_before),
    topic_last=set_own(t.topic_last, topic_last),
    recent=set_own(t.recent, recent),
    topic_length=set_own(t.topic_length, topic_length),
    children=set_own(t.children, t.children[at] + forks),
    length=set_own(t.length, index + 1),
    visible=set_own(t.visible, seen),
  )

  # Their children.
  path = jax.vmap(lambda key, n: jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key), n)))
  # Folded twice, so that no token's key is a child's key.
  child_key = path(path(branch.key, jnp.full(width, 0x7FFFFFFF)), t.children[at])
  set_child = lambda field, x: field.at[child].set(x.astype(field.dtype), mode="drop")
  every = lambda value: jnp.full(width, value)
  t = t._replace(
    status=set_child(t.status, every(RUNNING)),
    token=set_child(t.token, every(tables.async_tag)),
    kind=set_child(t.kind, every(A.ORDINARY)),  # the interpreter wrote it: it is only read
    index=set_child(t.index, every(0)),
    position=set_child(t.position, branch.position + 1),
    round=set_child(t.round, every(state.round + 1)),
    state=set_child(t.state, every(A.TEXT)),
    number=set_child(t.number, every(-1)),
    depth=set_child(t.depth, t.depth[at] + 1),
    parent=set_child(t.parent, at),
    owner=set_child(t.owner, at),
    ordinal=set_child(t.ordinal, t.children[at] - 1),
    declared=set_child(t.declared, declared),
    kept_before=set_child(t.kept_before, topic_before),
    kept_last=set_child(t.kept_last, topic_last),
    recent=set_child(t.recent, jnp.full_like(recent, -1)),
    fork_entry=set_child(t.fork_entry, entry),
    fork_index=set_child(t.fork_index, index),
    key=set_child(t.key, child_key),
    visible=set_child(t.visible, seen),
  )

  served = live.sum()
  state = state._replace(
    pool=state.pool._replace(keys=keys, values=values),
    log=log,
    threads=t,
    used=state.used + served,
    served=state.served + served,
    steps=state.steps + (served > 0),
    n_threads=state.n_threads + forks.sum(),
  )
  return end_of_round(state, limits, features)


def end_of_round(state: State, limits: Limits, features: StepFeatures) -> State:
  """When every thread had its turn: adoptions, joins, limits, and the next round."""
  t = state.threads
  m = t.status.shape[0]
  over = ~((t.status == RUNNING) & (t.round == state.round)).any() & (state.finish == UNFINISHED)

  # Chunks of a thread that ended pass to the thread that will join it; through several, if those ended too.
  owner = t.owner
  for _ in range(max(limits.max_depth - 1, 0)):
    safe = jnp.maximum(owner, 0)
    owner = jnp.where((owner > 0) & (t.status[safe] == DONE), t.owner[safe], owner)
  owner = jnp.where(over, owner, t.owner)

  owned = (owner[None, :] == jnp.arange(m)[:, None]) & (t.status != FREE)[None, :]  # [thread, chunk]
  ready = over & (t.status == WAITING) & ~(owned & (t.status != DONE)[None, :]).any(axis=1)
  joins = owned & ready[:, None]
  joined = joins.any(axis=0)

  def merge(visible):
    counts = jnp.dot(joins.astype(jnp.float32), visible.astype(jnp.float32))
    return visible | (counts > 0)

  visible = jax.lax.cond(joined.any(), merge, lambda v: v, t.visible)
  furthest = jnp.max(jnp.where(joins, t.position[None, :], 0), axis=1)
  n_joined = jnp.sum(jnp.where(joins, t.length[None, :], 0), axis=1)
  position = jnp.where(ready, features.rule.at_sync(t.position, furthest, n_joined), t.position)
  status = jnp.where(ready, RUNNING, t.status)
  t = t._replace(
    owner=jnp.where(joined, -1, owner),
    visible=visible,
    position=position,
    status=status,
    round=jnp.where(ready, state.round + 1, t.round),
  )

  running = status == RUNNING
  # A chunk's last token is read back only for those who may join it.
  last = running & (jnp.arange(m) > 0) & ((t.kind == A.END) | (t.kind == A.EOS))
  complete = (status[0] == DONE) & ~(running & ~last).any() & ~(status == WAITING).any()
  todo = running.sum()
  new = state.used - state.prompt
  capacity = limits.kv_buckets[-1]
  finish = jnp.where(
    complete,
    STOP,
    jnp.where(
      new + todo > limits.max_new_tokens, LENGTH, jnp.where(state.used + todo > capacity, POOL, UNFINISHED)
    ),
  )
  writing = (t.state != A.TEXT) & (running | (status == WAITING))
  pending_open = running & (t.state == A.TEXT) & (t.kind == A.OPEN)
  room = m - state.n_threads - (writing | pending_open).sum()
  # Near the end of the response a promise would be cut off: none is opened that has no room to be written.
  room = jnp.where(limits.max_new_tokens - new < (todo + 1) * limits.tail, 0, room)
  keep = lambda new, old: jnp.where(over, new, old)
  left = ((t.status == RUNNING) & (t.round == state.round)).sum()
  return state._replace(
    threads=t,
    round=state.round + over,
    served=keep(0, state.served),
    room=keep(room, state.room),
    runnable=keep(todo, left),
    finish=keep(finish, state.finish),
  )
