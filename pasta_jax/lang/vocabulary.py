"""Programs to threads of tokens and back. Tags are single special tokens behind the base vocabulary."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from pasta_jax.lang.automaton import Tags, TokenTable
from pasta_jax.lang.layout import PositionRule, span
from pasta_jax.lang.program import Node, Program, Promise, Sync, Text, normalise
from pasta_jax.lang.syntax import TAG_TEXTS
from pasta_jax.lang.thread import Fork, Thread, read


class TextTokenizer(Protocol):
  """What the language needs of a tokenizer (`model.tokenizer.Tokenizer` is one)."""

  vocab_size: int
  eos_id: int
  special_ids: frozenset[int]

  def encode(self, text: str) -> list[int]: ...
  def token_bytes(self, token: int) -> bytes: ...
  def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]: ...
  def digit_values(self) -> dict[int, tuple[int, int]]: ...


class Vocabulary:
  """A tokenizer with the six tags: ids `tag_ids`, else behind the others, `base_size` to `base_size + 5`.

  A topic's tokens begin with a blank (" cost" is one token where "cost" may be three), which is not part of
  the topic.

  `base_size` is the number of rows of the model's embedding, which may exceed the tokenizer's vocabulary.
  The tokenizer's control tokens all end a response, but for those that the tags take.
  """

  def __init__(self, tokenizer: TextTokenizer, base_size: int | None = None, tag_ids: Sequence[int] = ()):
    self.tokenizer = tokenizer
    self.base_size = tokenizer.vocab_size if base_size is None else base_size
    ids = tuple(tag_ids) or tuple(range(self.base_size, self.base_size + len(TAG_TEXTS)))
    self.size = max(self.base_size, max(ids) + 1)
    controls = sorted(set(tokenizer.special_ids) - {tokenizer.eos_id, *ids})
    opening, middle, close, async_, end, sync = ids
    self.tags = Tags(opening, middle, close, async_, end, sync, eos=(tokenizer.eos_id, *controls))
    self._tag_texts = dict(zip(ids, TAG_TEXTS))
    self.table = TokenTable.build(self.size, self.tags, tokenizer.digit_values())

  # Programs to tokens.

  def encode(self, program: Iterable[Node], rule: PositionRule, *, finished: bool = True) -> Thread:
    """The main thread of a program; promises get the number that `rule` writes for their true length."""
    thread = self._encode_thread(
      normalise(program), rule, head=(), tail=(self.tags.eos[0],) if finished else ()
    )
    return thread

  def _encode_thread(
    self, nodes: Program, rule: PositionRule, head: tuple[int, ...], tail: tuple[int, ...]
  ) -> Thread:
    tokens = list(head)
    forks: list[Fork] = []
    for node in nodes:
      if isinstance(node, Text):
        tokens += self.tokenizer.encode(node.text)
      elif isinstance(node, Sync):
        tokens.append(self.tags.sync)
      else:
        child = self._encode_thread(node.body, rule, (self.tags.async_,), (self.tags.end,))
        number = rule.written(span(child, rule))
        tokens += [self.tags.open, *self.tokenizer.encode(" " + node.topic)]
        if number is not None:
          tokens += [self.tags.middle, *self.tokenizer.encode(str(number))]
        tokens.append(self.tags.close)
        forks.append(Fork(len(tokens) - 1, number, child))
    return Thread(tuple(tokens) + tail, tuple(forks))

  # Tokens to programs.

  def text(self, tokens: Sequence[int]) -> str:
    """Ordinary tokens as text; bytes that are no UTF-8 (a character cut off) become U+FFFD.

    A model may write a row of its embedding that no token has; that leaves nothing.
    """
    known = (int(t) for t in tokens if t < self.tokenizer.vocab_size)
    return b"".join(self.tokenizer.token_bytes(t) for t in known).decode("utf-8", "replace")

  def label(self, token: int) -> str:
    """One token as a person would want it in a dump: a tag's text, or the token's own."""
    return self._tag_texts[token] if token in self._tag_texts else self.text([token])

  def decode(self, thread: Thread, rule: PositionRule, *, is_main: bool = True) -> Program:
    """The program that a thread wrote: its text, kept promises and syncs; ill-formed tags leave nothing."""
    reading = read(thread, self.table, is_main=is_main, numbered=rule.numbered)
    forks = {f.at: f for f in thread.forks}
    nodes: list[Node] = []
    text: list[int] = []
    for i, token in enumerate(thread.tokens):
      if reading.is_text[i]:
        text.append(token)
      fork = forks.get(i)
      if fork is None and token != self.tags.sync:
        continue
      nodes.append(Text(self.text(text)))
      text = []
      if fork is not None:
        body = self.decode(fork.child, rule, is_main=False)
        topic = self.text(reading.topics.get(i, ())).removeprefix(" ")
        nodes.append(Promise(topic, reading.declared.get(i), body))
      else:
        nodes.append(Sync())
    nodes.append(Text(self.text(text)))
    return normalise(nodes)
