"""Fakes that the decoding tests share: a tokenizer of 24 words, and models of a few thousand random weights.

A random model left alone writes one token again and again. These models carry the group of the token just
read on ten channels of their residual stream, so a table of group-to-group scores in the head makes them
write promises, numbers, syncs and ends at chosen rates; all other channels are random.
"""

import collections
import dataclasses
import os
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pasta_jax.lang import automaton as A
from pasta_jax.lang.forms import Forms
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.model.attention import dense_attention, sliding_window_mask
from pasta_jax.model.config import ModelConfig
from pasta_jax.model.transformer import Transformer

WORDS = ["#", "tree", "stone", "river", "cloud", "amber", "lemon", "tiger", "of", "a", "the", "in"]
DIGITS = ["0", "1", "2", "3", "4", "5", "7", "9", "12", "345", "1000", "12345"]

# PASTA_TEST_SCALE=20 draws twenty times as many programs.
SCALE = int(os.environ.get("PASTA_TEST_SCALE", "1"))
seeds = st.integers(0, 2**31 - 1)
prompts = st.lists(st.integers(1, 25), min_size=1, max_size=8)


def examples(n: int) -> settings:
  """Settings of a property over `n` programs: always the same ones, and not shrunk, as a seed has no size."""
  return settings(
    max_examples=n * SCALE,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
  )


def over_programs(check, n: int, *strategies, always: Sequence[tuple] = ((),), tally=collections.Counter):
  """`check(tally, seed, prompt, …)` over n programs that hypothesis draws, and over twenty that never change.

  What hypothesis draws depends on the modules that happen to be imported (it collects constants from them),
  so the tally that is returned, which says whether there was something to check, is of the twenty alone. They
  take turns with the further arguments in `always`.
  """

  @examples(n)
  @given(st.tuples(seeds, prompts, *strategies))
  def drawn(arguments):
    check(tally(), *arguments)

  drawn()
  counts = tally()
  for i in range(20):
    rng = np.random.default_rng(i)
    check(counts, i, rng.integers(1, 26, rng.integers(1, 9)).tolist(), *always[i % len(always)])
  print(dict(counts))
  return counts


class TinyTokenizer:
  """Words, numbers (some of several digits, some absurd) and `#`, the token that ends a turn."""

  vocab_size = len(WORDS) + len(DIGITS)
  eos_id = 0
  special_ids = frozenset({0})

  def encode(self, text: str) -> list[int]:
    return [(WORDS + DIGITS).index(word) for word in text.split()]

  def token_bytes(self, token: int) -> bytes:
    if token >= self.vocab_size:
      raise ValueError(f"token {token} is not in the vocabulary of {self.vocab_size}")
    return f"{(WORDS + DIGITS)[token]} ".encode()

  def digit_values(self) -> dict[int, tuple[int, int]]:
    return {len(WORDS) + i: (int(d), 10 ** len(d)) for i, d in enumerate(DIGITS)}


# Two rows of the model's vocabulary belong to no token, as in models whose embedding is padded.
VOCABULARY = Vocabulary(TinyTokenizer(), base_size=26)
# By the forms of promise and number; lengths that are tokens are 64 rows more.
VOCABULARIES = {
  (promise, number): VOCABULARY.speaking(Forms(promise=promise, number=number))
  for promise in ("topic", "head")
  for number in ("digits", "token")
}
CONFIG = ModelConfig(
  vocab_size=32, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=32, tie_embeddings=False
)

CONFIGS = {"digits": CONFIG, "token": dataclasses.replace(CONFIG, vocab_size=96)}  # by the form of numbers

# What a token does in a sentence: its class, with the words that stand in topics as a tenth group, so that
# models need not know the automaton's state to write whole promises; lengths that are tokens are an eleventh.
_TOPIC, _LENGTH = 9, 10
_TOPIC_WORDS = [WORDS.index(w) for w in ("of", "a", "the", "in", "lemon")]


def _groups(number: str) -> np.ndarray:
  classes = VOCABULARIES["topic", number].table.classes
  groups = np.where(np.isin(np.arange(len(classes)), _TOPIC_WORDS), _TOPIC, classes)
  return np.where(classes == A.LENGTH, _LENGTH, groups)


# Scores of the next token's group behind a token's group, in the order of `automaton`.
#     ORDINARY DIGITS OPEN MIDDLE CLOSE ASYNC END SYNC EOS topic
_HABITS = np.array(
  [
    [1.2, -3, 2.2, -3, -3, -4, 2.5, 0.7, 1.9, -2],  # ORDINARY
    [-2, -2, -3, -3, 3.0, -4, 0.0, -3, -2, -3],  # DIGITS
    [-2, -3, -4, -4, -3, -4, -3, -4, -3, 3.0],  # OPEN
    [-3, 3.0, -4, -4, -2, -4, -3, -4, -3, -3],  # MIDDLE
    [1.2, -3, 1.9, -4, -4, -4, 2.0, 2.6, 2.1, -3],  # CLOSE
    [2.2, -3, 1.7, -4, -4, -4, 1.7, 0.0, -3, -2],  # ASYNC
    [1.0, -3, 0.5, -4, -4, -4, -1, -1, 2.0, -3],  # END
    [1.5, -3, 1.0, -4, -4, -4, 2.6, -2, 2.6, -3],  # SYNC
    [1.0, -3, 0.0, -4, -4, -4, 2.0, 0.0, 2.0, -3],  # EOS
    [-3, -3, -4, 2.5, -0.5, -4, -3, -4, -3, 1.5],  # topic
  ]
)
# With heads a promise is OPEN, DIGITS, CLOSE, and stands behind text.
_HEAD_HABITS = _HABITS.copy()
_HEAD_HABITS[A.OPEN] = [-3, 3.0, -4, -2, -0.5, -4, -3, -4, -3, -3]
_HEAD_HABITS[A.ORDINARY, A.OPEN], _HEAD_HABITS[9, A.OPEN] = 2.6, 2.0
_HEAD_HABITS[A.CLOSE, A.OPEN] = _HEAD_HABITS[A.ASYNC, A.OPEN] = 0.0


def _habits(promise: str, number: str) -> np.ndarray:
  """Scores by groups. With lengths as tokens one takes the place of a topic's MIDDLE, or of a head's OPEN."""
  habits = _HEAD_HABITS if promise == "head" else _HABITS
  if number == "digits":
    return habits
  habits = np.pad(habits, (0, 1), constant_values=-4)
  instead = A.OPEN if promise == "head" else A.MIDDLE
  habits[:, _LENGTH], habits[:, instead] = habits[:, instead], -4
  habits[_LENGTH] = habits[A.CLOSE]
  return habits


# The group behind each group in endless promises: OPEN, topic, MIDDLE, DIGITS, CLOSE, OPEN, and so in chunks.
_ENDLESS = [A.OPEN, A.CLOSE, 9, A.DIGITS, A.OPEN, A.OPEN, A.OPEN, A.OPEN, A.OPEN, A.MIDDLE]


def _endless(promise: str, number: str) -> list[int]:
  """The same with lengths as tokens: OPEN, topic, LENGTH, or a word and LENGTH."""
  if number == "digits":
    return _ENDLESS
  if promise == "head":
    return [_LENGTH] * _LENGTH + [A.ORDINARY]
  return [A.OPEN, A.OPEN, _TOPIC, *[A.OPEN] * 6, _LENGTH, A.OPEN]


def model(config: ModelConfig = CONFIG) -> Transformer:
  """A model to build an Interpreter around; `weights` gives it others."""
  return Transformer(config, rngs=nnx.Rngs(0))


_MODELS = {number: nnx.split(model(config)) for number, config in CONFIGS.items()}
GRAPH = _MODELS["digits"][0]


def weights(
  seed: int | tuple[int, ...],
  kind: str = "habits",
  promise: str = "topic",
  number: str = "digits",
  config: ModelConfig | None = None,
):
  """Random parameters, to be put into `Interpreter.params`.

  kind       what the model writes
  habits     promises with topics and numbers, nested ones, syncs and ends, now and then an ill-formed tag
  storm      tags in any order: every tag column is strong
  silent     never a tag
  clockwork  after each group one certain group, drawn at random: the stuff of endless loops
  endless    promises in promises, and nothing else

  `promise` and `number` are the form of the promises that habits write; `config` is that of the model, if not the one
  of `CONFIGS`.
  """
  rng = np.random.default_rng(seed)
  groups = _groups(number)
  blank = _MODELS[number][1] if config is None else nnx.split(model(config))[1]
  n = groups.max() + 1
  draw = lambda x: rng.normal(size=x.shape) * len(x) ** -0.5 if x.ndim > 1 else np.ones(x.shape)
  params = jax.tree.map(draw, nnx.to_pure_dict(blank))
  table, head = params["embed"]["embedding"], params["head"]["kernel"]
  table *= 2.5  # [V, D]: noise of the size of the group's mark
  table[:, :n] = 2 * np.eye(n)[groups]
  for layer in params["layers"].values():
    for kernel in (layer["attn"]["o"]["kernel"], layer["mlp"]["down"]["kernel"]):
      kernel *= 3
      kernel[:, :n] = 0  # layers leave the mark alone
    layer["attn"]["q"]["kernel"] *= 8  # what is attended to changes from token to token
  head *= 0.7
  is_tag = np.arange(len(groups)) >= VOCABULARY.base_size
  if kind == "habits":
    head[:n] = (_habits(promise, number) - np.log(np.bincount(groups)))[:, groups]
  elif kind == "storm":
    head[:, is_tag] *= 8.0
    head[:n] = rng.normal(size=(n, n))[:, groups] + 1.0 * is_tag
  elif kind == "silent":
    head[:n] = -60.0 * is_tag
  else:
    then = np.array(_endless(promise, number) if kind == "endless" else rng.integers(0, n, n))
    head[:n] = 20.0 * (then[:, None] == groups) + 0.2 * _habits(promise, number)[:, groups]
  state = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  full = jax.tree.map(lambda x: x, blank)
  nnx.replace_by_pure_dict(full, state)
  return full


def cast(params, dtype):
  """The same with matrices in another dtype."""
  return jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, params)


def other_family(config: ModelConfig, params):
  """(graph, parameters) of a model with further features: the same weights, and small random ones for what is
  new."""
  graph, state = nnx.split(model(config))
  rng, given = np.random.default_rng(1), dict(jax.tree_util.tree_leaves_with_path(params))

  def fill(path, leaf):
    if any("norm" in str(p) for p in path):
      return 1 - config.norm_offset + 0.1 * jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)
    return given[path] if path in given else 0.3 * jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)

  return graph, jax.tree_util.tree_map_with_path(fill, state)


@partial(jax.jit, static_argnums=0)
def _dense(graph, params, tokens, positions, mask):
  decoder = nnx.merge(graph, params)
  window_mask = sliding_window_mask(positions[None], positions[None], decoder.config.window)
  attend = dense_attention(mask[None], window_mask=window_mask, softcap=decoder.config.attention_softcap)
  hidden, _ = decoder(tokens[None], positions[None], attend)
  return decoder.logits(hidden)[0]


def dense_logits(params, tokens, positions, mask, length: int = 128, graph=GRAPH) -> np.ndarray:
  """[n, V]: one dense forward over n tokens, padded to `length` so that it is compiled once."""
  n = len(tokens)
  assert n <= length, f"{n} tokens do not fit a padded row of {length}"
  padded_mask = np.zeros((length, length), bool)
  padded_mask[:n, :n] = mask
  pad = lambda x: np.pad(np.asarray(x, np.int32), (0, length - n))
  return np.asarray(_dense(graph, params, pad(tokens), pad(positions), padded_mask))[:n]


def paths(thread, path=()):
  """(path of ordinals, thread) of a `lang.thread.Thread` and all below it, in the order of `walk`."""
  yield path, thread
  for i, fork in enumerate(thread.forks):
    yield from paths(fork.child, (*path, i))


def words(tokens) -> str:
  """Tokens as a reader of a failed test wants them."""
  return " ".join(VOCABULARIES["topic", "token"].label(int(t)).strip() or "_" for t in tokens)


class Automaton:
  """What tags mean, restated from the language's description with no table, for one thread's own tokens."""

  def __init__(self, is_main: bool, numbered: bool, promise: str = "topic", number: str = "digits"):
    self.is_main, self.numbered, self.with_head = is_main, numbered, promise == "head"
    self.with_tokens = number == "token"
    self.state, self.number, self.topic, self.text, self.ill = "text", None, [], [], 0
    self.has_head = False  # text since the last promise, sync or <async>

  @property
  def about(self) -> str:
    """What the promise says it is about, for the guard: the words of its head from the first with a letter on."""
    words = [(WORDS + DIGITS)[t] for t in self.topic if t < TinyTokenizer.vocab_size]
    letters = [i for i, word in enumerate(words) if word.isalpha()]
    return "".join(words[letters[0] :]) if letters else ""

  @staticmethod
  def kind(token: int) -> str:
    """The token's class by name."""
    tags = VOCABULARY.tags
    names = dict(zip(tags.ids, ("open", "middle", "close", "async", "end", "sync")))
    names[0] = "eos"
    names |= {32 + i: "length" for i in range(64)}
    return names.get(token, "digits" if len(WORDS) <= token < TinyTokenizer.vocab_size else "ordinary")

  def feed(self, token: int) -> str | None:
    """Reads a token; says "fork", "join" or "end" where it does one of these."""
    kind, inside = self.kind(token), self.state != "text"
    if self.with_tokens and (kind in ("middle", "close") or kind == "open" and self.with_head):
      self.ill += 1
      return None
    if kind == "length":
      return self.feed_length(token)
    if self.with_head and not inside and kind in ("ordinary", "digits", "open"):
      return self.feed_before_a_promise(token, kind)
    if kind in ("ordinary", "digits"):
      if self.state == "text":
        self.text.append(token)
      elif self.state == "topic":
        self.topic.append(token)
      elif kind == "digits":
        self.number = min(int(f"{self.number or 0}{DIGITS[token - len(WORDS)]}"), 10**6)
      else:
        self.ill += 1
    elif kind == "open" and not inside:
      self.state, self.number, self.topic = "topic", None, []
    elif kind == "middle" and self.state == "topic":
      self.state = "number"
    elif kind == "close" and inside:
      self.state, self.has_head = "text", False
      self.ill += self.numbered and (self.number is None or self.number > 999)
      return "fork"
    elif kind in ("end", "sync", "eos"):
      wrong_end = kind != "sync" and (kind == "end") == self.is_main
      self.ill += inside or wrong_end  # a promise is abandoned, or the thread ends in another way
      self.state = "text"
      self.has_head &= kind != "sync" and not inside
      if kind == "sync":
        return "join"
      return None if kind == "end" and self.is_main else "end"
    else:
      self.ill += 1
    return None

  def feed_length(self, token: int) -> str | None:
    """A whole promise behind its head, or the end of one with a topic."""
    if not self.with_head and self.state != "topic":
      self.ill += 1
      return None
    self.ill += self.with_head and not self.has_head
    if not self.has_head:
      self.topic = [] if self.with_head else self.topic
    self.state, self.has_head, self.number = "text", False, (token - 31) * 10
    return "fork"

  def feed_before_a_promise(self, token: int, kind: str) -> None:
    """Text and the beginning of a promise in the form `head`: the text before it is what it is about."""
    if not self.has_head:
      self.topic = []
    if kind == "open":
      self.ill += not self.has_head
      self.state, self.number = "number", None
      return
    self.text.append(token)
    self.topic.append(token)
    self.has_head = True
