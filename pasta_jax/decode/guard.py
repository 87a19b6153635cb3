"""Which classes of token a guarded branch may write next: well-formed tags only, within the limits.

Unguarded, every token may come and has a meaning (`lang.automaton`); guarded, ill-formed ones cannot. Text
outside promises is never restricted. Except for the limits on the whole response (threads, tokens left) and
the topics and heads that `StepFeatures.no_repeat` compares, the guard reads only what the branch can see, so it keeps
exactness.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pasta_jax.decode.settings import Limits, StepFeatures
from pasta_jax.lang import automaton as A


class View(NamedTuple):
  """What the guard knows of a branch after the token that it just read. All scalars (one branch)."""

  state: jax.Array
  is_main: jax.Array  # bool
  index: jax.Array  # type: ignore[assignment]  # of the token just read in the thread's own tokens
  number: jax.Array
  topic_length: jax.Array
  may_open: jax.Array  # bool: limits on count and depth allow another promise
  may_sync: jax.Array  # bool: there is a chunk to join
  repeats: jax.Array  # bool: its head is that of a promise that it knows (`lang.head`)


def allowed(view: View, limits: Limits, features: StepFeatures) -> jax.Array:
  """[N_CLASSES] bool. At least one class is always allowed."""
  well_formed = ~jnp.asarray(features.automaton.ill_formed)[view.state]
  if not features.guard:
    well_formed = jnp.ones_like(well_formed)
  if not features.promises:
    return well_formed.at[jnp.array([A.OPEN, A.MIDDLE, A.CLOSE, A.ASYNC, A.END, A.SYNC, A.LENGTH])].set(False)
  if not features.guard:
    return well_formed
  in_topic, in_number = view.state == A.TOPIC, view.state == A.NUMBER
  in_text = ~A.inside(view.state)
  full = view.topic_length >= limits.max_topic
  topic_done = view.topic_length > 0
  numbered = features.rule.numbered
  rules = {
    A.ORDINARY: ~(in_topic & full),
    A.DIGITS: jnp.where(in_number, numbered & (view.number < 100), ~(in_topic & full)),
    A.OPEN: view.may_open & ~view.repeats,
    A.MIDDLE: topic_done & numbered,
    A.CLOSE: jnp.where(in_topic, topic_done & (not numbered), (view.number >= 0) | (not numbered)),
    A.END: in_text & ~view.is_main & (view.index > 0),
    A.SYNC: in_text & view.may_sync,
    A.EOS: in_text & view.is_main,
    A.LENGTH: jnp.where(in_topic, topic_done, view.may_open & ~view.repeats),
  }
  return well_formed & jnp.stack([rules.get(c, jnp.zeros((), bool)) for c in range(A.N_CLASSES)])


def absurd(view: View, value: jax.Array, scale: jax.Array) -> jax.Array:
  """[V] bool: tokens that would make the promise's number larger than a number may be.

  `allowed` is enough where tokens have one digit each; a token of several digits can step over the bound.
  """
  return (view.state == A.NUMBER) & (A.append_digits(view.number, value, scale) > A.MAX_DECLARED)
