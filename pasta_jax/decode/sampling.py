"""From logits to a token: penalty, temperature, top-k, top-p, min-p. Pure functions of one branch ([V])."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pasta_jax.decode.settings import SamplingConfig, StepFeatures
from pasta_jax.model.attention import MASK_VALUE


class Sampling(NamedTuple):
  """`SamplingConfig` as arrays: changing a number does not compile anything anew."""

  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  min_p: jax.Array
  repetition_penalty: jax.Array
  promise_bias: jax.Array


def as_arrays(c: SamplingConfig) -> Sampling:
  """The numbers of a config on the device."""
  f = jnp.float32
  return Sampling(
    f(c.temperature), jnp.int32(c.top_k), f(c.top_p), f(c.min_p), f(c.repetition_penalty), f(c.promise_bias)
  )


def penalise(logits: jax.Array, tokens: jax.Array, remembered: jax.Array, penalty: jax.Array) -> jax.Array:
  """Repetition penalty (Keskar et al. 2019): a remembered token's positive logit is divided, a negative one
  multiplied by `penalty`, once however often it was seen.

  `tokens` [P] are the pool's, `remembered` [P] those among them that count: the memory is the row of
  visibility itself, so it forks and joins with it.
  """
  old = logits[tokens]
  new = jnp.where(old > 0, old / penalty, old * penalty)
  return logits.at[jnp.where(remembered, tokens, logits.shape[0])].set(new, mode="drop")


def gram_hash(recent: jax.Array) -> jax.Array:
  """Hash of a thread's last n tokens, [..., n] -> [...] uint32; 0 where there are fewer (a negative
  entry)."""
  powers = jnp.asarray([pow(1_000_003, i, 1 << 32) for i in range(recent.shape[-1])], jnp.uint32)
  mixed = jnp.sum((recent + 1).astype(jnp.uint32) * powers, axis=-1, dtype=jnp.uint32) | jnp.uint32(1)
  return jnp.where((recent >= 0).all(axis=-1), mixed, jnp.uint32(0))


def ban(scores: jax.Array, tokens: jax.Array, which: jax.Array) -> jax.Array:
  """Scores with those of `tokens` for which `which` holds put out of reach."""
  return scores.at[jnp.where(which, tokens, scores.shape[0])].set(MASK_VALUE, mode="drop")


def draw(logits: jax.Array, key: jax.Array, sampling: Sampling, features: StepFeatures) -> jax.Array:
  """The next token. `key` is the thread's, folded with the token's index in its thread.

  A Gumbel number for every token, a quarter of a step for many requests on CPU, and worth it: one uniform
  number against cumulative probabilities changes its answer wherever rounding moves one of V boundaries
  across it, and then what is sampled depends on the requests beside it.
  """
  if features.greedy:
    return jnp.argmax(logits).astype(jnp.int32)
  logits = logits / jnp.maximum(sampling.temperature, 1e-6)
  if features.use_top_k_p:
    order = jnp.sort(logits, descending=True)
    rank_limit = jnp.where(sampling.top_k > 0, sampling.top_k, logits.shape[0])
    kept = jnp.arange(logits.shape[0]) < rank_limit
    weights = jax.nn.softmax(jnp.where(kept, order, MASK_VALUE))
    kept &= jnp.cumsum(weights) - weights < sampling.top_p  # the likeliest token always stays
    logits = jnp.where(logits < jnp.min(jnp.where(kept, order, jnp.inf)), MASK_VALUE, logits)
  floor = jnp.max(logits) + jnp.log(jnp.maximum(sampling.min_p, 1e-30))
  logits = jnp.where(logits < floor, MASK_VALUE, logits)
  return jax.random.categorical(key, logits).astype(jnp.int32)
