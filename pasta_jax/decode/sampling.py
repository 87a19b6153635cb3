"""From logits to a token: penalty, bans, bias, guard, then temperature, top-k, top-p, min-p. One branch
([V])."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pasta_jax.decode import guard
from pasta_jax.decode.settings import Limits, SamplingConfig, StepFeatures
from pasta_jax.decode.state import State, earlier
from pasta_jax.decode.threads import Thread
from pasta_jax.lang import automaton as A
from pasta_jax.lang.head import TokenHashes
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.model.attention import MASK_VALUE


class TokenTables(NamedTuple):
  """Per token id [V]: what `automaton.TokenTable` says, and which tokens the repetition penalty is for."""

  classes: jax.Array  # int32
  value: jax.Array  # int32
  scale: jax.Array  # int32
  penalised: jax.Array  # bool
  opening: jax.Array  # bool: a promise begins with it
  heads: TokenHashes  # of the text of heads; [1] where promises have topics
  async_tag: jax.Array  # int32, not per token: the id that a chunk begins with
  lengths: jax.Array  # [64] int32, the ids of lengths, shortest first; [0] where they are digits

  @classmethod
  def build(cls, vocabulary: Vocabulary, rows: int) -> "TokenTables":
    """Of a model with `rows` rows in its head."""
    table = vocabulary.table
    with_head, lengths = table.automaton.promise == "head", jnp.asarray(table.lengths)
    hashes = TokenHashes.of(vocabulary.bytes_of_tokens() if with_head else [b""])
    opening = jnp.zeros(rows, bool).at[lengths if with_head and lengths.size else table.tags.open].set(True)
    cut = lambda x: jnp.asarray(x[:rows])
    return cls(cut(table.classes), cut(table.value), cut(table.scale), cut(penalised_tokens(vocabulary)),
               opening, TokenHashes(*map(cut, hashes)), jnp.int32(table.tags.async_), lengths)  # fmt: skip


def penalised_tokens(vocabulary: Vocabulary) -> np.ndarray:
  """[V] bool, True where a token is penalised for repetition: ordinary tokens that are one word of four
  letters or more.

  Digits, punctuation, blanks, short function words and the tags are spared: text needs them again and again,
  and tags must not depend on earlier text.
  """
  penalised = np.zeros(vocabulary.size, bool)
  for token in range(vocabulary.tokenizer.vocab_size):
    if vocabulary.table.classes[token] == A.ORDINARY:
      text = vocabulary.tokenizer.token_bytes(token).decode("utf-8", "replace").strip()
      penalised[token] = text.isalpha() and len(text) >= 4
  return penalised


class Branch(NamedTuple):
  """What a branch's forward pass and choice read. A leading axis W outside the vmap."""

  thread: Thread  # before its token is read
  sees: jax.Array  # [P] bool: pool entries
  view: guard.View  # of the same thread after it
  # [M] bool: it knows that promise, and has its head, or one more token (`kept_last`) would repeat its topic
  taken: jax.Array
  ngram: jax.Array  # uint32, hash of its last tokens


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


def pick(logits: jax.Array, state: State, branch: Branch, tables: TokenTables, sampling: Sampling,
         limits: Limits, features: StepFeatures) -> tuple[jax.Array, jax.Array]:  # fmt: skip
  """(the token after the one that the branch reads, the model's log-probability of it)."""
  token = choose(logits, state, branch, tables, sampling, limits, features)
  return token, logits[token] - jax.nn.logsumexp(logits)


def choose(logits: jax.Array, state: State, branch: Branch, tables: TokenTables, sampling: Sampling,
           limits: Limits, features: StepFeatures) -> jax.Array:  # fmt: skip
  """The token after the one that the branch reads: what is remembered, wanted and allowed, then `draw`."""
  thread, view = branch.thread, branch.view
  in_text = ~A.inside(view.state)
  scores = logits
  if features.use_repetition_penalty:
    # The token that is being read has no entry yet, but must not come twice in a row either.
    tokens = jnp.append(state.log.token, thread.token)
    written = jnp.append(branch.sees & (state.log.thread >= 0), view.index >= 0) & tables.penalised[tokens]
    scores = penalise(scores, tokens, written & in_text, sampling.repetition_penalty)
  if features.promises:
    scores = jnp.where(tables.opening, scores + sampling.promise_bias, scores)
  allowed = guard.allowed(view, limits, features)[tables.classes]
  if features.guard:
    allowed &= ~guard.absurd(view, tables.value, tables.scale)
  scores = jnp.where(allowed, scores, MASK_VALUE)
  # Bans come last: they are scattered into the array that the choice made, and no copy of it.
  if features.no_repeat:
    # What followed the same tokens before may not follow them again, tags excepted. All threads count: chunks
    # that do not see each other say the same thing too.
    log = state.log
    again = earlier(state) & (log.ngram_hash == branch.ngram) & (branch.ngram != 0) & in_text
    kinds = tables.classes[log.next_token]
    scores = ban(scores, log.next_token, again & ((kinds == A.ORDINARY) | (kinds == A.DIGITS)))
  if features.guard:
    # No topic twice: the token that would complete one that was promised may not come.
    scores = ban(scores, state.threads.kept_last, branch.taken & (view.state == A.TOPIC))
  key = jax.random.fold_in(jax.random.wrap_key_data(thread.key), view.index + 1)
  as_class = features.promises and features.length != "apart"
  return draw(scores, key, tables.lengths[: None if as_class else 0], sampling, features)


def penalise(logits: jax.Array, tokens: jax.Array, remembered: jax.Array, penalty: jax.Array) -> jax.Array:
  """Repetition penalty (Keskar et al. 2019): a remembered token's positive logit is divided, a negative one
  multiplied by `penalty`, once however often it was seen.

  `tokens` [P] are the pool's, `remembered` [P] those among them that count: the memory is the row of
  visibility itself, so it forks and joins with it.
  """
  old = logits[tokens]
  new = jnp.where(old > 0, old / penalty, old * penalty)
  return logits.at[jnp.where(remembered, tokens, logits.shape[0])].set(new, mode="drop")


def ngram_hash(recent: jax.Array) -> jax.Array:
  """Hash of a thread's last n tokens, [..., n] -> [...] uint32; 0 where there are fewer (a negative
  entry)."""
  powers = jnp.asarray([pow(1_000_003, i, 1 << 32) for i in range(recent.shape[-1])], jnp.uint32)
  mixed = jnp.sum((recent + 1).astype(jnp.uint32) * powers, axis=-1, dtype=jnp.uint32) | jnp.uint32(1)
  return jnp.where((recent >= 0).all(axis=-1), mixed, jnp.uint32(0))


def ban(scores: jax.Array, tokens: jax.Array, which: jax.Array) -> jax.Array:
  """Scores with those of `tokens` for which `which` holds put out of reach."""
  return scores.at[jnp.where(which, tokens, scores.shape[0])].set(MASK_VALUE, mode="drop")


def as_one(logits: jax.Array, lengths: jax.Array) -> jax.Array:
  """Logits in which the first of `lengths` stands for all of them, with the log of their summed probability, and the
  others are out of reach: split over its lengths, a promise would lose to text at every greedy choice."""
  together = jax.nn.logsumexp(logits[lengths])
  return logits.at[lengths].set(MASK_VALUE).at[lengths[0]].set(together)


def length_of(scores: jax.Array, kind: str) -> jax.Array:
  """Which of the lengths a greedy promise gets, of their scores [64], shortest first: the likeliest, or the median,
  the first up to which half of the probability lies."""
  if kind == "likeliest":
    return jnp.argmax(scores)
  return jnp.argmax(jnp.cumsum(jax.nn.softmax(scores)) >= 0.5)


def likeliest(scores: jax.Array) -> jax.Array:
  """The first of the largest scores [V]. On CPU two plain reductions take a third of the time of one over pairs of a
  score and its index."""
  at = jnp.where(scores == jnp.max(scores), jnp.arange(scores.shape[0]), scores.shape[0] - 1)
  return jnp.min(at)


def draw(logits: jax.Array, key: jax.Array, lengths: jax.Array, sampling: Sampling,
         features: StepFeatures) -> jax.Array:  # fmt: skip
  """The next token. `key` is the thread's, folded with the token's index in its thread.

  **Lengths that are tokens are one class** (`as_one`): greedy choices, top-k, top-p and min-p take it as one entry.
  A greedy promise then gets one of them (`length_of`); what is drawn from their own logits needs no other rule.

  Gumbel noise for every token costs up to a quarter of a step on CPU. One uniform number against cumulative
  probabilities would be cheaper, but the rounding of one of V boundaries could change the token, and samples
  would depend on the requests beside them.
  """
  if features.greedy:
    token = likeliest(as_one(logits, lengths) if lengths.size else logits)
    if lengths.size:
      length = lengths[length_of(logits[lengths], features.length)]
      token = jnp.where(token == lengths[0], length, token)
    return token.astype(jnp.int32)
  logits = logits / jnp.maximum(sampling.temperature, 1e-6)
  entries = as_one(logits, lengths) if lengths.size else logits
  floor = jnp.float32(-jnp.inf)
  if features.use_top_k_p:
    order = jnp.sort(entries, descending=True)
    rank_limit = jnp.where(sampling.top_k > 0, sampling.top_k, logits.shape[0])
    kept = jnp.arange(logits.shape[0]) < rank_limit
    weights = jax.nn.softmax(jnp.where(kept, order, MASK_VALUE))
    kept &= jnp.cumsum(weights) - weights < sampling.top_p  # the likeliest token always stays
    floor = jnp.min(jnp.where(kept, order, jnp.inf))
  # The likeliest entry is above every floor, so the one of min-p is the same before and after the others.
  floor = jnp.maximum(floor, jnp.max(entries) + jnp.log(jnp.maximum(sampling.min_p, 1e-30)))
  below = entries < floor
  if lengths.size:
    below = below.at[lengths].set(below[lengths[0]])
  return jax.random.categorical(key, jnp.where(below, MASK_VALUE, logits)).astype(jnp.int32)
