"""The limits on a whole response: when it ends, and how many promises a round may open."""

import jax
import jax.numpy as jnp

from pasta_jax.decode.settings import Limits
from pasta_jax.decode.state import LENGTH, POOL, STOP, UNFINISHED, State
from pasta_jax.decode.threads import DONE, RUNNING, WAITING, Thread
from pasta_jax.lang import automaton as A


def finish_reason(state: State, t: Thread, todo: jax.Array, limits: Limits) -> jax.Array:
  """Why the response ends before the next round, in which `todo` threads would write; UNFINISHED if it goes
  on."""
  running, waiting = t.status == RUNNING, t.status == WAITING
  # A chunk's last token is read back only so that others may join it: the response need not wait for it.
  last = running & (t.parent >= 0) & ((t.kind == A.END) | (t.kind == A.EOS))
  complete = (t.status[0] == DONE) & ~(running & ~last).any() & ~waiting.any()
  too_long = state.used - state.prompt + todo > limits.max_new_tokens
  too_large = state.used + todo > limits.kv_buckets[-1]
  return jnp.where(complete, STOP, jnp.where(too_long, LENGTH, jnp.where(too_large, POOL, UNFINISHED)))


def promise_room(state: State, t: Thread, todo: jax.Array, limits: Limits) -> jax.Array:
  """Promises that may be opened in the next round: free rows of the table, less one for each promise that is
  being written.

  None near the end of the response, where a promise would be cut off before it is written.
  """
  running = t.status == RUNNING
  writing = A.inside(t.state) & (running | (t.status == WAITING))
  opening = running & ~A.inside(t.state) & ((t.kind == A.OPEN) | (t.kind == A.LENGTH))
  free = t.status.shape[0] - state.n_threads - (writing | opening).sum()
  left = limits.max_new_tokens - (state.used - state.prompt)
  return jnp.where(left < (todo + 1) * limits.tail, 0, free)
