"""A thread on the device: what it knows, how it is born, what a token does to it, and how threads are joined.

A field is declared once, in `Thread`, and set once at birth, in `born`. Shapes are those of one thread; the
table of a request has a leading axis M in every leaf, the threads of a step have W. What a thread sees is in
`decode.sight`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from pasta_jax.lang import automaton as A
from pasta_jax.lang.head import TokenHashes
from pasta_jax.lang.positions import PositionRule

FREE, RUNNING, WAITING, DONE = range(4)  # status


class Thread(struct.PyTreeNode):
  """One thread. Scalars are int32 unless another type is given; number 0 is the main thread, and parents have
  lower numbers than their children."""

  # The token that comes next: chosen, but not yet read back into the pool.
  status: jax.Array
  token: jax.Array
  kind: jax.Array  # class of that token (`lang.automaton`)
  index: jax.Array  # of that token in the thread's own tokens; -1: the prompt's last
  position: jax.Array  # of that token; of a thread that is done: one after its last
  round: jax.Array  # in which it will be read back
  # The tag automaton, before that token.
  state: jax.Array
  number: jax.Array  # of the current promise so far; -1: no digit yet
  topic: (
    jax.Array
  )  # uint32, hash of the current promise's topic so far, or of its head (`lang.head`; 0: none)
  topic_before: jax.Array  # uint32, without its last token, so that the guard can mask a repeated topic's end
  topic_last: jax.Array  # that token
  topic_length: jax.Array
  recent: jax.Array  # [n] own tokens read last, oldest first; -1: none (n: `no_repeat` - 1, or 0)
  length: jax.Array  # own tokens read back
  children: jax.Array  # promises kept so far
  # Fixed at birth, but for the owner.
  key: jax.Array  # [2] uint32, from the request's seed and the path of ordinals
  parent: jax.Array  # -1 for the main thread
  owner: jax.Array  # whose next sync joins it: the parent, or the thread that adopted it; -1 once joined
  depth: jax.Array
  ordinal: jax.Array  # among the parent's children
  declared: jax.Array  # number in its promise; -1: none
  kept_before: jax.Array  # uint32, hash of its promise's topic without the last token, or of its head
  kept_last: jax.Array  # that token; -1 for an empty topic or head
  fork_entry: jax.Array  # pool entry of its promise's last token
  fork_index: jax.Array  # index of that token in the parent's own tokens


def born(*, token, index, position, round, key, recent, depth=0, parent=-1, ordinal=0, declared=-1,
         kept_before=0, kept_last=-1, fork_entry=0, fork_index=0) -> Thread:  # fmt: skip
  """A thread before its first token, which the prompt or the interpreter wrote: it is only read."""
  i, u = jnp.int32, jnp.uint32
  return Thread(
    status=i(RUNNING), token=i(token), kind=i(A.ASYNC), index=i(index), position=i(position), round=i(round),
    state=i(A.TEXT), number=i(-1), topic=u(0), topic_before=u(0), topic_last=i(-1), topic_length=i(0),
    recent=jnp.full_like(recent, -1), length=i(0), children=i(0), key=key, parent=i(parent), owner=i(parent),
    depth=i(depth), ordinal=i(ordinal), declared=i(declared), kept_before=u(kept_before),
    kept_last=i(kept_last), fork_entry=i(fork_entry), fork_index=i(fork_index),
  )  # fmt: skip


class TokenRead(NamedTuple):
  """A thread whose token has been read, and what that token asks for."""

  thread: Thread
  forks: jax.Array  # bool: a promise is complete
  ends: jax.Array  # bool: a chunk's last token; `advance` ends the main thread


def read_token(
  thread: Thread, value: jax.Array, scale: jax.Array, hashes: TokenHashes, automaton: A.Automaton
) -> TokenRead:
  """Runs the tag automaton of a form of promises over the thread's token, whose digits are worth `value`
  (`TokenTable`)."""
  t = thread
  action = jnp.asarray(automaton.action)[t.state, t.kind]
  opens = (t.kind == A.OPEN) & ~A.inside(t.state)
  digit = (t.kind == A.DIGITS) & (t.state == A.NUMBER)
  plain = (t.kind == A.ORDINARY) | (t.kind == A.DIGITS)
  about = _read_head(t, plain, hashes) if automaton.promise == "head" else _read_topic(t, plain, opens)
  number = jnp.where(digit, A.append_digits(t.number, value, scale), jnp.where(opens, -1, t.number))
  if automaton.number == "token":
    number = jnp.where(t.kind == A.LENGTH, value, t.number)
  recent = jnp.append(t.recent[1:], t.token) if t.recent.size else t.recent
  after = t.replace(
    state=jnp.asarray(automaton.next_state)[t.state, t.kind],
    number=number,
    recent=jnp.where(t.index >= 0, recent, t.recent),
    **about,
  )
  return TokenRead(after, action == A.FORK, (action == A.FINISH) & (t.parent >= 0))


def _read_topic(t: Thread, plain: jax.Array, opens: jax.Array) -> dict[str, jax.Array]:
  """The fields of the topic after the thread's token, which is `plain`, or `opens` a promise."""
  in_topic = (t.state == A.TOPIC) & plain
  longer = t.topic * jnp.uint32(1_000_003) + t.token.astype(jnp.uint32) + jnp.uint32(1)
  pick = lambda read, fresh, old: jnp.where(in_topic, read, jnp.where(opens, fresh, old))
  return dict(
    topic=pick(longer, jnp.uint32(0), t.topic),
    topic_before=jnp.where(in_topic, t.topic, t.topic_before),
    topic_last=pick(t.token, -1, t.topic_last),
    topic_length=pick(t.topic_length + 1, 0, t.topic_length),
  )


def _read_head(t: Thread, plain: jax.Array, hashes: TokenHashes) -> dict[str, jax.Array]:
  """The same for a head, which a promise does not end but the next text begins anew."""
  so_far = jnp.where(t.state == A.TEXT, 0, t.topic)
  anew = (so_far == 0) | (hashes.scale == 0)
  longer = jnp.where(anew, hashes.fresh, so_far * hashes.scale + hashes.value)
  topic = jnp.where(plain & ~A.inside(t.state), longer, so_far)
  return dict(topic=topic, topic_before=topic, topic_last=jnp.where(topic > 0, 0, -1))


def advance(read: TokenRead, forks, chosen, kind, rule: PositionRule, automaton: A.Automaton) -> Thread:
  """The thread after its turn: its next token is `chosen`, of class `kind`.

  `forks`: its promise was granted. One token a thread a round is stated here.
  """
  t = read.thread
  joins = jnp.asarray(automaton.action)[t.state, kind] == A.JOIN
  over = read.ends | ((t.parent < 0) & (kind == A.EOS))  # the main thread's last token need not be read back
  return t.replace(
    status=jnp.where(over, DONE, jnp.where(joins, WAITING, RUNNING)),
    token=jnp.where(read.ends, t.token, chosen),
    kind=jnp.where(read.ends, t.kind, kind),
    index=jnp.where(read.ends, t.index, t.index + 1),
    position=t.position + 1 + jnp.where(forks, rule.gap(jnp.minimum(t.number, A.MAX_DECLARED)), 0),
    round=t.round + 1,
    length=t.index + 1,
    children=t.children + forks,
  )


def spawn(read: TokenRead, number, entry, async_tag) -> Thread:
  """The chunk that thread `number` has just promised; `entry` holds the promise's last token.

  Its key folds in its ordinal, after a constant, so that no token's key is a child's key.
  """
  t = read.thread
  path = jax.random.fold_in(jax.random.wrap_key_data(t.key), 0x7FFFFFFF)
  key = jax.random.key_data(jax.random.fold_in(path, t.children + 1))
  return born(
    token=async_tag, index=0, position=t.position + 1, round=t.round + 1, key=key, recent=t.recent,
    depth=t.depth + 1, parent=number, ordinal=t.children, declared=jnp.minimum(t.number, A.MAX_DECLARED),
    kept_before=t.topic_before, kept_last=t.topic_last, fork_entry=entry, fork_index=t.index,
  )  # fmt: skip


def adopt(threads: Thread, levels: int) -> jax.Array:
  """[M] owners: a chunk whose owner is done passes to that owner's owner, `levels` - 1 times at most."""
  owner = threads.owner
  for _ in range(levels - 1):
    above = jnp.maximum(owner, 0)
    owner = jnp.where((owner > 0) & (threads.status[above] == DONE), threads.owner[above], owner)
  return owner


def join(threads: Thread, over: jax.Array, round: jax.Array, rule: PositionRule):
  """Wakes each waiting thread whose chunks are all done, if `round` is `over`: its sync is read in the next round.
  The rule of `lang.joins.Unjoined`, by owners. Returns (the fields that change, [M, M] bool: whom each one joins)."""
  t = threads
  numbers = jnp.arange(t.status.shape[0])
  owned = (t.owner[None, :] == numbers[:, None]) & (t.status != FREE)[None, :]  # [thread, chunk]
  ready = over & (t.status == WAITING) & ~(owned & (t.status != DONE)[None, :]).any(axis=1)
  joins = owned & ready[:, None]
  furthest = jnp.max(jnp.where(joins, t.position[None, :], 0), axis=1)
  n_joined = jnp.sum(jnp.where(joins, t.length[None, :], 0), axis=1)
  changes = dict(
    owner=jnp.where(joins.any(axis=0), -1, t.owner),
    position=jnp.where(ready, rule.at_sync(t.position, furthest, n_joined), t.position),
    status=jnp.where(ready, RUNNING, t.status),
    round=jnp.where(ready, round + 1, t.round),
  )
  return changes, joins
