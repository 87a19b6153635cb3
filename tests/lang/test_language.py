"""PASTA-LANG's text form, its token form, and the table that gives every token sequence a meaning."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pasta_jax.lang import automaton as A
from pasta_jax.lang.automaton import Tags, TokenTable, append_digits
from pasta_jax.lang.forms import Forms
from pasta_jax.lang.positions import STRATEGIES, PositionRule
from pasta_jax.lang.program import (
  Program,
  Promise,
  Sync,
  Text,
  normalise,
  promises,
  reading_order,
  unseparated,
)
from pasta_jax.lang.syntax import MAX_DEPTH, OPENINGS, TAG_TEXTS, PastaSyntaxError, parse, print_program
from pasta_jax.lang.thread import Fork, Thread, read, read_all, walk
from pasta_jax.lang.vocabulary import Vocabulary

RELAXED = settings(deadline=None)  # a loaded machine is no failure


class ByteTokenizer:
  """A token for each byte, two control tokens, two tokens of several digits (which `encode` never uses)."""

  vocab_size = 260
  eos_id = 256
  special_ids = frozenset({256, 257})

  def encode(self, text: str) -> list[int]:
    return list(text.encode())

  def token_bytes(self, token: int) -> bytes:
    if not 0 <= token < self.vocab_size:
      raise ValueError(f"token {token} is not in the vocabulary")
    return bytes([token]) if token < 256 else (b"<eos>", b"<control>", b"42", b"1234567")[token - 256]

  def digit_values(self) -> dict[int, tuple[int, int]]:
    return {48 + d: (d, 10) for d in range(10)} | {258: (42, 100), 259: (1234567, 10_000_000)}

  def chat_prompt(self, messages) -> list[int]:
    return [257, *self.encode(messages[-1]["content"]), 257]


# Five padding rows, as models have whose embedding is larger than the vocabulary.
BYTES = Vocabulary(ByteTokenizer(), base_size=265)

# Texts and programs.

LOOKS_LIKE_A_TAG = st.sampled_from([
    *TAG_TEXTS, *OPENINGS, "\\", "\\\\", "\\\\\\", '"', "<", "/>", "\n", "<promise", '<promise topic="x" tokens="3"/>',
    "<sync />", "</async", "<|im_end|>", "<|im_start|>", "é", "🦜", "12",
])  # fmt: skip
TEXTS = st.lists(st.text(max_size=4) | LOOKS_LIKE_A_TAG, max_size=5).map("".join)


def programs(texts=TEXTS, heads=True):
  """Programs in no particular form: empty and neighbouring texts, syncs anywhere, chunks three deep or so; with
  `heads`, promises of both forms."""
  leaf = st.builds(Text, texts) | st.just(Sync())
  topics = texts | st.sampled_from(["", " ", "cost ", " cost", "  two words"])
  topics = st.none() | topics if heads else topics
  numbers = st.none() | st.integers(0, 999_999_999)
  bodies = st.lists(leaf, max_size=2)
  for _ in range(3):
    promise = st.builds(Promise, topics, numbers, bodies.map(tuple))
    bodies = st.lists(st.one_of(leaf, promise), max_size=4)
  return bodies.map(tuple)


def chunk(body: str, topic: str = "t") -> str:
  return f'<promise topic="{topic}"/><async>{body}</async>'


# The text form.


@RELAXED
@given(program=programs())
@example(program=(Text("\\"), Sync()))
@example(program=(Text("\\<sync/>\\\\"), Promise('\\"', 0, (Text("\\"),))))
@example(program=(Promise("\\", None, (Text("<sync/>\\"), Promise("", 7, (Text("\\\\</async>\\"),)))),))
@example(program=(Text("<pro"), Text('mise topic="'), Sync(), Text("<sync"), Sync()))
def test_parse_undoes_print(program: Program):
  printed = print_program(program)
  assert parse(printed) == normalise(program)
  assert print_program(parse(printed)) == printed


@pytest.mark.parametrize(
    ("program", "printed"),
    [
        ((Text("plain \\ text <b>"),), "plain \\ text <b>"),
        ((Text("C:\\"),), "C:\\"),  # at the end of the text nothing needs an escape
        ((Text("C:\\"), Sync()), "C:\\\\<sync/>"),
        ((Text("<sync/>"),), "\\<sync/>"),
        ((Text("\\<sync/>"),), "\\\\\\<sync/>"),
        ((Promise("a", None, (Text("b\\"),)),), '<promise topic="a"/><async>b\\\\</async>'),
        ((Promise('say "\\"', 20, ()),), '<promise topic="say \\"\\\\\\"" tokens="20"/><async></async>'),
        ((Promise('a" tokens="3', 4, ()),), '<promise topic="a\\" tokens=\\"3" tokens="4"/><async></async>'),
        ((Text("a"), Text(""), Promise("t", None, (Sync(),)), Sync()),
         'a<promise topic="t"/><async><sync/></async><sync/>'),
        ((Text('"/> <promise /> <promise topic=\'x\'/>'),), '"/> <promise /> <promise topic=\'x\'/>'),
        ((Promise(None, None, (Promise(None, 40, (Text("x"),)),)),),
         '<promise/><async><promise tokens="40"/><async>x</async></async>'),
        # Either form is escaped in text, whatever the form of the promises around it.
        ((Text("<promise/>"), Promise("t", None, (Text('<promise tokens="'),))),
         '\\<promise/><promise topic="t"/><async>\\<promise tokens="</async>'),
        ((Text('\\<promise topic="'), Promise(None, 7, ())),
         '\\\\\\<promise topic="<promise tokens="7"/><async></async>'),
    ],
)  # fmt: skip
def test_printed_form(program: Program, printed: str):
  assert print_program(program) == printed
  assert parse(printed) == normalise(program)


NEVER_CLOSED = 'promise is never closed: expected topic="…" tokens="…"/>'
MALFORMED = [
  ("x</async>", 1, 2, "</async> without <async>"),
  ("x\\\\</async>", 1, 4, "</async> without <async>"),
  ("\\<sync/></async>", 1, 9, "</async> without <async>"),
  (chunk("a") + "\n</async>", 2, 1, "</async> without <async>"),
  ("é\n\n <async>x</async>", 3, 2, "<async> without a promise before it"),
  ('a\nb<promise topic="t', 2, 2, NEVER_CLOSED),
  ('<promise topic="t\\"/><async></async>', 1, 1, NEVER_CLOSED),
  ('<promise topic="t" tokens="4"><async></async>', 1, 1, NEVER_CLOSED),
  ('<promise topic="t"tokens="4"/><async></async>', 1, 1, NEVER_CLOSED),
  ('<promise topic="t" tokens="4x"/><async></async>', 1, 28, "tokens must be a number, not '4x'"),
  ('<promise topic="t" tokens=""/><async></async>', 1, 28, "tokens must be a number, not ''"),
  ('<promise topic="t" tokens="-3"/><async></async>', 1, 28, "tokens must be a number, not '-3'"),
  ('<promise topic="t" tokens="٣"/><async></async>', 1, 28, "tokens must be a number, not '٣'"),
  (
    '<promise topic="t" tokens="1234567890"/><async></async>',
    1,
    28,
    "tokens must be a number, not '1234567890'",
  ),
  ('<promise topic="two\nlines" tokens="x"/><async></async>', 2, 16, "tokens must be a number, not 'x'"),
  ('<promise tokens="4', 1, 1, 'promise is never closed: expected tokens="…"/>'),
  ('<promise tokens="4x"/><async></async>', 1, 18, "tokens must be a number, not '4x'"),
  ("<promise/> <async></async>", 1, 11, "promise is not followed by <async>"),
  ('<promise topic="t"/>', 1, 21, "promise is not followed by <async>"),
  ('<promise topic="t"/> <async></async>', 1, 21, "promise is not followed by <async>"),
  ('<promise topic="t"/>\\<async></async>', 1, 21, "promise is not followed by <async>"),
  ('<promise topic="t"/><async>x', 1, 21, "<async> is never closed"),
  ('<promise topic="t"/><async>x\\</async>', 1, 21, "<async> is never closed"),
  (f'\n<promise topic="t"/><async>{chunk("a")}', 2, 21, "<async> is never closed"),
]


@pytest.mark.parametrize(("source", "line", "column", "message"), MALFORMED)
def test_malformed_text(source: str, line: int, column: int, message: str):
  with pytest.raises(PastaSyntaxError) as error:
    parse(source)
  assert str(error.value) == f"line {line}, column {column}: {message}"


@RELAXED
@given(source=st.lists(LOOKS_LIKE_A_TAG | st.sampled_from([chunk("a"), chunk("")]), max_size=12).map("".join))
def test_any_text_is_a_program_or_an_error_with_its_place(source: str):
  try:
    program = parse(source)
  except PastaSyntaxError as error:
    before = source[: error.at].split("\n")
    assert str(error).startswith(f"line {len(before)}, column {len(before[-1]) + 1}: ")
    # The place is that of a tag, of a number, or of what stands where <async> should.
    rest = source[error.at :]
    assert rest.startswith(OPENINGS) or source[: error.at].endswith(('tokens="', '"/>', "<promise/>"))
  else:
    assert parse(print_program(program)) == program


@given(text=TEXTS.filter(lambda text: not any(tag in text for tag in OPENINGS)))
def test_text_without_tags_stands_as_it_is(text: str):
  assert print_program((Text(text),)) == text
  assert parse(text) == normalise((Text(text),))


def test_nesting_has_a_limit_and_no_recursion_error():
  def nested(depth: int) -> str:
    return depth * '<promise topic="t"/><async>' + "x" + depth * "</async>"

  program = parse(nested(MAX_DEPTH))
  assert print_program(program) == nested(MAX_DEPTH)
  assert len(list(promises(program))) == MAX_DEPTH
  column = MAX_DEPTH * len('<promise topic="t"/><async>') + len('<promise topic="t"/>') + 1
  for depth in (MAX_DEPTH + 1, 5000):
    message = f"line 1, column {column}: chunks nest deeper than {MAX_DEPTH}"
    with pytest.raises(PastaSyntaxError, match=message):
      parse(nested(depth))


def test_long_runs_of_backslashes_take_linear_time():
  """Quadratic time would be half an hour here."""
  text = "\\" * 300_000 + "x"
  assert parse(print_program((Text(text),))) == (Text(text),)
  assert parse(print_program((Text(text + "\\"), Sync()))) == (Text(text + "\\"), Sync())
  with pytest.raises(PastaSyntaxError):
    parse('<promise topic="' + text)


@given(program=programs())
def test_reading_order_is_the_text_without_tags(program: Program):
  def texts(nodes):
    for node in nodes:
      if isinstance(node, Text):
        yield node.text
      elif isinstance(node, Promise):
        yield from texts(node.body)

  assert reading_order(program) == "".join(texts(program)) == reading_order(normalise(program))
  assert normalise(normalise(program)) == normalise(program)


@pytest.mark.parametrize(
  ("source", "count"),
  [
    (f"a {chunk('b')}\n{chunk('c')}<sync/> d", 0),
    (f"a{chunk(' b ')}{chunk('c')}", 0),  # whoever writes the blank
    (f"{chunk('a')}b {chunk('c')}", 1),
    (f"a {chunk('b.')}{chunk('- c.')} {chunk('d')}<sync/>.", 3),  # both at a join, and one before a full stop
    (f"a {chunk(chunk('b') + chunk('c'))}d", 3),
    (f"a{chunk('')}b{chunk('  ')}c", 0),  # nothing to separate
  ],
)
def test_promises_without_a_separator_are_counted(source: str, count: int):
  assert unseparated(parse(source)) == count


# The token form.


def expressible(text: str) -> bool:
  """Whether SmolLM2 has all bytes of a text: it lacks 04 06 13 14 16 1D, and F1 F2 (planes 4 to 11)."""
  return not set(text.encode()) & set(b"\x04\x06\x13\x14\x16\x1d\xf1\xf2")


def without_numbers(program: Program, form: str) -> Program:
  """The program with promises of the form, without numbers."""

  def plain(node):
    if not isinstance(node, Promise):
      return node
    return Promise((node.topic or "") if form == "topic" else None, None, without_numbers(node.body, form))

  return tuple(map(plain, program))


def bare_promises(program: Program) -> int:
  """Promises with no text of their thread since its last promise, sync or <async>."""
  bare, text = 0, False
  for node in normalise(program):
    if isinstance(node, Promise):
      bare += (not text) + bare_promises(node.body)
    text = isinstance(node, Text)
  return bare


def check_round_trip(vocabulary: Vocabulary, program: Program, strategy: str):
  rule, form = PositionRule(strategy), vocabulary.promise
  program = without_numbers(program, form)
  main = vocabulary.encode(program, rule)
  decoded = vocabulary.decode(main, rule)
  assert without_numbers(decoded, form) == normalise(program)
  ill = sum(r.malformed for r in read_all(main, vocabulary.table, numbered=rule.numbered))
  assert ill == (bare_promises(program) if form == "head" else 0)
  chunks = list(walk(main))[1:]
  assert [p.tokens is not None for p in promises(decoded)] == [rule.numbered] * len(chunks)
  for thread in walk(main):
    # What the fork carries is what its tokens say: training and decoding reserve the same gap.
    reading = read(thread, vocabulary.table, is_main=thread is main, numbered=rule.numbered)
    assert {f.at: f.declared for f in thread.forks} == reading.declared
  for c in chunks:
    assert c.tokens[0] == vocabulary.tags.async_ and c.tokens[-1] == vocabulary.tags.end
  assert main.tokens[-1] == vocabulary.tokenizer.eos_id
  assert vocabulary.encode(program, rule, finished=False).tokens == main.tokens[:-1]
  controls = set(vocabulary.tags.eos) & {x for t in walk(main) for x in t.tokens[: -1 if t is main else None]}
  assert not controls, "text became control tokens"


@RELAXED
@given(program=programs(), strategy=st.sampled_from(STRATEGIES), promise=st.sampled_from(["topic", "head"]))
def test_tokens_decode_to_the_program(program: Program, strategy: str, promise: str):
  check_round_trip(BYTES.speaking(Forms(promise=promise)), program, strategy)
  if PositionRule(strategy).in_tens:
    check_round_trip(BYTES.speaking(Forms(promise=promise, number="token")), program, strategy)


@pytest.mark.parametrize(("form", "topic"), [("topic", None), ("head", "t")])
def test_a_promise_of_another_form_is_refused(form: str, topic: str | None):
  with pytest.raises(ValueError, match=f"not of the form '{form}'"):
    BYTES.speaking(Forms(promise=form)).encode((Text("x"), Promise(topic, None, ())), PositionRule())


@settings(deadline=None, max_examples=60)
@given(program=programs(TEXTS.filter(expressible)), strategy=st.sampled_from(STRATEGIES))
def test_tokens_of_the_default_model_decode(smollm2_checkpoint, program: Program, strategy: str):
  check_round_trip(Vocabulary(smollm2_checkpoint.tokenizer), program, strategy)


def test_tokens_of_the_default_model(smollm2_checkpoint):
  vocabulary = Vocabulary(smollm2_checkpoint.tokenizer)
  assert (vocabulary.base_size, vocabulary.size) == (49152, 49158)
  program = parse('Hi<promise topic="the cost"/><async>A b.</async><sync/>c<|im_end|>')
  main = vocabulary.encode(program, PositionRule())
  assert [vocabulary.label(t) for t in main.tokens] == [
      "Hi", '<promise topic="', " the", " cost", '" tokens="', "1", "0", '"/>', "<sync/>", "c",
      "<", "|", "im", "_", "end", "|", ">", "<|im_end|>",
  ]  # fmt: skip
  assert [vocabulary.label(t) for t in main.forks[0].child.tokens] == ["<async>", "A", " b", ".", "</async>"]
  with pytest.raises(ValueError, match="U\\+0004"):
    vocabulary.encode((Promise("\x04", None, ()),), PositionRule())


def test_numbers_count_both_tags_and_the_gaps_inside():
  program = parse(chunk("12345678" + chunk("abc")))
  inner = 2 + 3
  for strategy, expected in {
      "pred_1x": [2 + 8 + len("( t,5)") + inner, inner],
      # The outer chunk spans its own tokens, `t` with its blank, two digits and three tags among them.
      "pred_10x": [-(-(2 + 8 + 7 + 10) // 10) * 10, 10],
      "max": [20, 10], "sum": [20, 10], "fixed": [None, None], "oracle": [None, None],
      # Gaps inside are true lengths: 5 positions, not the 10 that the inner promise says.
      "oracle_1x": [2 + 8 + len("( t,5)") + inner, inner], "oracle_10x": [30, 10],
  }.items():  # fmt: skip
    rule = PositionRule(strategy)
    assert [p.tokens for p in promises(BYTES.decode(BYTES.encode(program, rule), rule))] == expected, strategy


def test_a_length_that_is_a_token_is_the_promise_or_its_end():
  words = lambda tokens, v: "".join(v.label(t) for t in tokens)
  for promise, source, want in (
    ("topic", '- <promise topic="t"/><async>abc</async>', '- <promise topic=" t" tokens="10"/>#'),
    ("head", "- t:<promise/><async> abc</async>", '- t:<promise tokens="10"/>#'),
  ):
    vocabulary = BYTES.speaking(Forms(promise=promise, number="token"))
    program = parse(source)
    main = vocabulary.encode(program, PositionRule())
    assert words(main.tokens[:-1], vocabulary) + "#" == want
    assert main.tokens[main.forks[0].at] == vocabulary.table.lengths[0] and main.forks[0].declared == 10
    # They are rows behind the tags, and none in another form.
    assert vocabulary.tag_ids == tuple(range(265, 265 + 70)) and vocabulary.size == 335
    assert BYTES.size == 271 and BYTES.tag_ids == BYTES.tags.ids
  lengths = vocabulary.table.value[vocabulary.table.lengths]
  assert lengths.tolist() == list(range(10, 641, 10))
  # A longer chunk outgrows what it is given.
  main = vocabulary.encode((Text("t"), Promise(None, None, (Text("x" * 700),))), PositionRule())
  assert main.forks[0].declared == 640
  assert vocabulary.decode(main, PositionRule())[1].tokens == 640


def test_lengths_as_tokens_need_promises_that_say_tens():
  for strategy in STRATEGIES:
    if strategy in ("pred_10x", "oracle_10x", "max", "sum"):
      Forms(PositionRule(strategy), number="token")
    else:
      with pytest.raises(ValueError, match=f"number 'token' needs promises that say tens.*not '{strategy}'"):
        Forms(PositionRule(strategy), number="token")


@pytest.mark.parametrize(("strategy", "number"), [("pred_1x", 999), ("pred_10x", 990), ("oracle_10x", 990)])
def test_number_of_a_very_long_chunk_is_one_that_the_interpreter_reads_back(strategy: str, number: int):
  check_round_trip(BYTES, (Promise("t", None, (Text("x" * 2000),)),), strategy)
  assert PositionRule(strategy).written(2002) == number


def test_bytes_that_are_no_text_and_padding_rows_have_a_text():
  assert BYTES.text([0xC3]) == "\ufffd" and BYTES.text([0xC3, 0xA9]) == "é"
  assert BYTES.text([65, 262, 66]) == "AB" and BYTES.label(262) == ""
  assert [BYTES.label(BYTES.base_size + i) for i in range(6)] == list(TAG_TEXTS)


# The automaton.

CLASSES = (A.ORDINARY, A.DIGITS, A.OPEN, A.MIDDLE, A.CLOSE, A.ASYNC, A.END, A.SYNC, A.EOS, A.LENGTH)
TABLES = {
    "topic": {
        #         ORDINARY DIGITS  OPEN   MIDDLE  CLOSE ASYNC END     SYNC     EOS      LENGTH
        A.TEXT:   "text    text    TOPIC  !       !     !     finish  join     finish   !",
        A.TOPIC:  "topic   topic   !      NUMBER  fork  !     !finish !join    !finish  !",
        A.NUMBER: "!       number  !      !       fork  !     !finish !join    !finish  !",
    },
    "head": {
        A.TEXT:   "head    head    !NUMBER !      !     !     finish  join     finish   !",
        A.HEAD:   "text    text    NUMBER !       !     !     finish  join     finish   !",
        A.NUMBER: "!       number  !      !       fork  !     !finish !join    !finish  !",
    },
    "topic/token": {
        A.TEXT:   "text    text    TOPIC  !       !     !     finish  join     finish   !",
        A.TOPIC:  "topic   topic   !      !       !     !     !finish !join    !finish  fork",
    },
    "head/token": {
        A.TEXT:   "head    head    !      !       !     !     finish  join     finish   !fork",
        A.HEAD:   "text    text    !      !       !     !     finish  join     finish   fork",
    },
}  # fmt: skip
TAGS = BYTES.tags
TOKEN_OF = dict(
  zip(
    CLASSES,
    (
      ord("x"),
      ord("7"),
      TAGS.open,
      TAGS.middle,
      TAGS.close,
      TAGS.async_,
      TAGS.end,
      TAGS.sync,
      TAGS.eos[0],
      271,
    ),
  )
)
PREFIX = {
  ("topic", A.TEXT): (),
  ("topic", A.TOPIC): (TAGS.open,),
  ("topic", A.NUMBER): (TAGS.open, ord("t"), TAGS.middle),
  ("head", A.TEXT): (),
  ("head", A.HEAD): (ord("t"),),
  ("head", A.NUMBER): (ord("t"), TAGS.open),
  ("topic/token", A.TEXT): (),
  ("topic/token", A.TOPIC): (TAGS.open,),
  ("head/token", A.TEXT): (),
  ("head/token", A.HEAD): (ord("t"),),
}
CELLS = [
  (form, s, c, cell)
  for form, table in TABLES.items()
  for s, row in table.items()
  for c, cell in zip(CLASSES, row.split(), strict=True)
]


@pytest.mark.parametrize("is_main", [True, False], ids=["main", "chunk"])
@pytest.mark.parametrize(("form", "state", "kind", "cell"), CELLS)
def test_every_state_and_class(form: str, state: int, kind: int, cell: str, is_main: bool):
  does = cell.removeprefix("!")
  leads_to = {"TOPIC": A.TOPIC, "NUMBER": A.NUMBER, "fork": A.TEXT, "join": A.TEXT, "head": A.HEAD}
  leads_to |= {"finish": A.TEXT} if A.inside(state) else {}
  after = leads_to.get(does, state)
  action = {"fork": A.FORK, "finish": A.FINISH, "join": A.JOIN}.get(does, A.NOTHING)
  promise, _, number = form.partition("/")
  table, prefix = A.AUTOMATA[promise, number or "digits"], PREFIX[form, state]
  assert (table.next_state[state, kind], table.action[state, kind]) == (after, action)
  assert table.ill_formed[state, kind] == cell.startswith("!")

  head = () if is_main else (TAGS.async_,)
  tokens = (*head, *prefix, TOKEN_OF[kind])
  vocabulary = BYTES.speaking(Forms(promise=promise, number=number or "digits"))
  if kind == A.LENGTH and not number:
    return  # no token is one
  for numbered in (True, False):
    reading = read(Thread(tokens), vocabulary.table, is_main=is_main, numbered=numbered)
    last = len(tokens) - 1
    assert reading.state == after
    assert reading.is_text[last] == (does in ("text", "head")) and reading.is_topic[last] == (does == "topic")
    assert reading.is_text[:last].sum() == (promise == "head" and state != A.TEXT)
    assert reading.declared == ({last: 10 if kind == A.LENGTH else None} if does == "fork" else {})
    # One token is one fault, however many rules it breaks.
    misplaced = kind == (A.END if is_main else A.EOS)
    unnumbered = does == "fork" and numbered and kind != A.LENGTH
    assert reading.ill_formed == int(cell.startswith("!") or misplaced or unnumbered)


@pytest.mark.parametrize("token", BYTES.tags.eos)
def test_every_control_token_ends_a_response(token: int):
  assert read(Thread((65, token)), BYTES.table, is_main=True).ill_formed == 0
  assert BYTES.table.classes[token] == A.EOS


@pytest.mark.parametrize(
    ("digits", "declared", "ill"),
    [("", None, 1), ("0", 0, 0), ("007", 7, 0), ("999", 999, 0), ("1000", 999, 1), ("9" * 40, 999, 1),
     ("0" * 40 + "12", 12, 0), ("1" + "0" * 40, 999, 1)],
)  # fmt: skip
def test_numbers(digits: str, declared: int | None, ill: int):
  tokens = (TAGS.open, ord("t"), TAGS.middle, *digits.encode(), TAGS.close)
  reading = read(Thread(tokens), BYTES.table, is_main=True)
  assert (reading.declared, reading.ill_formed) == ({len(tokens) - 1: declared}, ill)


@given(pieces=st.lists(st.text("0123456789", min_size=1, max_size=12), min_size=1, max_size=6))
def test_digit_tokens_of_any_length_read_as_one_number(pieces: list[str]):
  tags = Tags(100, 101, 102, 103, 104, 105, eos=(99,))
  table = TokenTable.build(106, tags, {i: (int(p), 10 ** len(p)) for i, p in enumerate(pieces)})
  tokens = (100, 98, 101, *range(len(pieces)), 102)
  number = int("".join(pieces))
  reading = read(Thread(tokens), table, is_main=True)
  assert reading.declared == {len(tokens) - 1: min(number, A.MAX_DECLARED)}
  assert reading.ill_formed == int(number > A.MAX_DECLARED)
  so_far = np.array([-1])
  for value, scale in zip(table.value[: len(pieces), None], table.scale[: len(pieces), None]):
    assert max(int(so_far[0]), 0) * int(scale[0]) + int(value[0]) < 2**31, "the device counts in 32 bits"
    so_far = append_digits(so_far, value, scale)
  assert so_far[0] == min(number, A.MAX_DECLARED + 1)


@pytest.mark.parametrize(
    ("text", "is_main", "ill", "program"),
    [
        # A promise in a promise is ignored; its topic goes on.
        ('O a O b M 7 C', True, 1, 'topic="ab" tokens="7"'),
        ('O a M 7 M O A x 3 C', True, 4, 'topic="a" tokens="73"'),
        ('O a C', True, 1, 'topic="a"'),
        ('O C', True, 1, 'topic=""'),
        ('O a S O b M 1 C', True, 1, '<sync/>topic="b" tokens="1"'),
        ('O a E O b M 1 C', True, 1, 'topic="b" tokens="1"'),
        ('C M A E x', True, 4, "x"),
        ('A A x E', False, 1, "x"),
        ('A x $', False, 1, "x"),
        ('A O a $', False, 1, ""),
        ('O a M 7', True, 1, ""),  # cut off
        ('x O', True, 1, "x"),
    ],
)  # fmt: skip
def test_ill_formed_threads(text: str, is_main: bool, ill: int, program: str):
  names = {
    "O": TAGS.open,
    "M": TAGS.middle,
    "C": TAGS.close,
    "A": TAGS.async_,
    "E": TAGS.end,
    "S": TAGS.sync,
    "$": TAGS.eos[0],
  }
  tokens = tuple(names.get(t, ord(t)) for t in text.split())
  child = Thread((TAGS.async_, TAGS.end))
  reading = read(Thread(tokens), BYTES.table, is_main=is_main)
  thread = Thread(tokens, tuple(Fork(at, n, child) for at, n in reading.declared.items()))
  assert reading.ill_formed + (reading.state != A.TEXT) == ill
  if is_main:
    assert sum(r.malformed for r in read_all(thread, BYTES.table)) == ill
  printed = print_program(
    BYTES.decode(thread, PositionRule(), read_all(thread, BYTES.table, is_main=is_main))
  )
  assert printed.replace("<promise ", "").replace("/><async></async>", "") == program


@RELAXED
@given(
  tokens=st.lists(st.sampled_from([*TOKEN_OF.values(), 258, 259, 262]), max_size=30),
  is_main=st.booleans(),
  form=st.sampled_from(list(TABLES)),
)
def test_every_token_sequence_has_a_meaning(tokens: list[int], is_main: bool, form: str):
  promise, _, number = form.partition("/")
  vocabulary = BYTES.speaking(Forms(promise=promise, number=number or "digits"))
  tokens = [t for t in tokens if t < vocabulary.size]
  thread = Thread(tuple(tokens))
  reading = read(thread, vocabulary.table, is_main=is_main)
  assert not (reading.is_text & reading.is_topic).any()
  assert 0 <= reading.ill_formed <= len(tokens)
  program = vocabulary.decode(thread, PositionRule(), read_all(thread, vocabulary.table, is_main=is_main))
  assert sum(isinstance(n, Sync) for n in program) == tokens.count(TAGS.sync)
  assert not list(promises(program)), "a promise without a fork was refused, and leaves nothing"
