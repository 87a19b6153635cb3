"""Programs to threads of tokens and back. Each tag is a single special token."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from pasta_jax.lang.automaton import DIGITS, LENGTHS, MAX_DECLARED, ORDINARY, Tags, TokenTable
from pasta_jax.lang.forms import Forms
from pasta_jax.lang.head import head
from pasta_jax.lang.positions import PositionRule, span
from pasta_jax.lang.program import Node, Program, Promise, Sync, Text, normalise
from pasta_jax.lang.syntax import HEAD_OPEN, TAG_TEXTS, length_texts
from pasta_jax.lang.thread import Fork, Reading, Thread, read_all


class TextTokenizer(Protocol):
  """What the language needs of a tokenizer (`weights.tokenizer.Tokenizer` is one)."""

  vocab_size: int
  eos_id: int
  special_ids: frozenset[int]

  def encode(self, text: str) -> list[int]: ...
  def token_bytes(self, token: int) -> bytes: ...
  def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]: ...
  def digit_values(self) -> dict[int, tuple[int, int]]: ...


class Vocabulary:
  """A tokenizer with the six tags: ids `tag_ids`, else six new ones, `base_size` to `base_size + 5`.

  `base_size` is the number of rows of the model's embedding, which may exceed the tokenizer's vocabulary.
  Every control token of the tokenizer that the tags do not take ends a response. A topic's tokens begin with
  a blank (" cost" is one token where "cost" may be three), which is not part of the topic. `promise` and `number`
  are the forms of promises (`lang.forms`): in the form "head" one is the first tag, its number, and the third tag;
  with lengths as tokens it is the token of its length, which with topics is the last tag. Lengths have the ids
  `length_ids`, else 64 new ones after all others, and are tokens of the vocabulary in this form alone.
  """

  def __init__(
    self,
    tokenizer: TextTokenizer,
    base_size: int | None = None,
    tag_ids: Sequence[int] = (),
    promise: str = "topic",
    number: str = "digits",
    length_ids: Sequence[int] = (),
  ):
    self.tokenizer, self.promise, self.number = tokenizer, promise, number
    self.base_size = tokenizer.vocab_size if base_size is None else base_size
    ids = tuple(tag_ids) or tuple(range(self.base_size, self.base_size + len(TAG_TEXTS)))
    size = max(self.base_size, max(ids) + 1)
    self._length_ids = tuple(length_ids) or tuple(range(size, size + len(LENGTHS)))
    lengths = self._length_ids if number == "token" else ()
    self.tag_ids = (*ids, *lengths)  # every row of the vocabulary that is PASTA's
    self.size = max(size, *(i + 1 for i in self.tag_ids))
    controls = sorted(set(tokenizer.special_ids) - {tokenizer.eos_id, *self.tag_ids})
    opening, middle, close, async_, end, sync = ids
    self.tags = Tags(opening, middle, close, async_, end, sync, eos=(tokenizer.eos_id, *controls))
    self._tag_texts = dict(zip(ids, TAG_TEXTS)) | ({opening: HEAD_OPEN} if promise == "head" else {})
    self._tag_texts |= dict(zip(lengths, length_texts(promise)))
    self.table = TokenTable.build(self.size, self.tags, tokenizer.digit_values(), promise, lengths)

  def speaking(self, form: Forms) -> "Vocabulary":
    """The same vocabulary with promises of another form."""
    if (form.promise, form.number) == (self.promise, self.number):
      return self
    return Vocabulary(
      self.tokenizer, self.base_size, self.tags.ids, form.promise, form.number, self._length_ids
    )

  def encode(self, program: Iterable[Node], rule: PositionRule, *, finished: bool = True) -> Thread:
    """The main thread of a program; promises get the number that `rule` writes for their true length.

    Raises ValueError for a promise of another form."""
    return self._encode_thread(normalise(program), rule, (), (self.tags.eos[0],) if finished else ())

  def _encode_thread(self, nodes: Program, rule: PositionRule, head: tuple, tail: tuple) -> Thread:
    tokens = list(head)
    forks: list[Fork] = []
    for node in nodes:
      if isinstance(node, Text):
        tokens += self.tokenizer.encode(node.text)
      elif isinstance(node, Sync):
        tokens.append(self.tags.sync)
      else:
        child = self._encode_thread(node.body, rule, (self.tags.async_,), (self.tags.end,))
        number = rule.written(span(child, rule), LENGTHS[-1] if self.number == "token" else MAX_DECLARED)
        if (node.topic is None) != (self.promise == "head"):
          raise ValueError(f"a promise with topic {node.topic!r} is not of the form {self.promise!r}")
        tokens += self._promise(node.topic, number)
        forks.append(Fork(len(tokens) - 1, number, child))
    return Thread(tuple(tokens) + tail, tuple(forks))

  def _promise(self, topic: str | None, number: int | None) -> list[int]:
    """The tokens of a promise."""
    tags, encode = self.tags, self.tokenizer.encode
    about = [] if topic is None else [tags.open, *encode(" " + topic)]
    if self.number == "token":
      if number not in LENGTHS:
        raise ValueError(f"no token says the length {number}")
      return [*about, self._length_ids[LENGTHS.index(number)]]
    digits = [] if number is None else encode(str(number))
    if topic is None:
      return [tags.open, *digits, tags.close]
    return [*about, *([tags.middle, *digits] if digits else []), tags.close]

  def text(self, tokens: Sequence[int]) -> str:
    """Ordinary tokens as text; bytes that are not UTF-8 (a character cut off) become U+FFFD, and embedding
    rows without a token become nothing."""
    known = (int(t) for t in tokens if t < self.tokenizer.vocab_size)
    return b"".join(self.tokenizer.token_bytes(t) for t in known).decode("utf-8", "replace")

  def bytes_of_tokens(self) -> list[bytes]:
    """[V] the bytes of each token's text; none of tags and of embedding rows without a token."""
    known = range(self.tokenizer.vocab_size)
    texts = [
      b"" if self.table.classes[t] not in (ORDINARY, DIGITS) else self.tokenizer.token_bytes(t) for t in known
    ]
    return texts + [b""] * (self.size - len(texts))

  def label(self, token: int) -> str:
    """One token for a dump: a tag's text, or the token's own."""
    return self._tag_texts[token] if token in self._tag_texts else self.text([token])

  def about(self, reading: Reading, at: int) -> str:
    """What the promise with its last token at own index `at` says its chunk is about: its topic, or its head."""
    text = self.text(reading.topics.get(at, ()))
    return head(text) if self.promise == "head" else text.strip()

  def decode(self, main: Thread, rule: PositionRule, readings: Sequence[Reading] | None = None) -> Program:
    """The program that a response wrote: text, kept promises and syncs; ill-formed tags leave nothing.

    `readings` are its threads' (`thread.read_all`), where they are known.
    """
    known = read_all(main, self.table, numbered=rule.numbered) if readings is None else readings
    return self._decode_thread(main, iter(known))

  def _decode_thread(self, thread: Thread, readings: Iterator[Reading]) -> Program:
    reading = next(readings)
    forks = {f.at: f for f in thread.forks}
    nodes: list[Node] = []
    text: list[int] = []
    for i, token in enumerate(thread.tokens):
      if reading.is_text[i]:
        text.append(token)
      if i not in forks and token != self.tags.sync:
        continue
      nodes.append(Text(self.text(text)))
      text = []
      if i in forks:
        topic = None
        if self.promise == "topic":
          topic = self.text(reading.topics.get(i, ())).removeprefix(" ")
        nodes.append(Promise(topic, reading.declared.get(i), self._decode_thread(forks[i].child, readings)))
      else:
        nodes.append(Sync())
    return normalise([*nodes, Text(self.text(text))])
