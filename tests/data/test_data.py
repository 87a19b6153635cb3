"""Annotated rows to programs, examples to packed rows, batches as a function of seed and step."""

import dataclasses
import gzip
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_language import BYTES
from test_layout import live_matrix, trees, visible_matrix

from pasta_jax.data.examples import chunk_lengths, encoded, examples, mix, program_of
from pasta_jax.data.packing import PackedBatch, PackedBatches, fill_rows, pack_row, single_batches
from pasta_jax.lang.cost import cost
from pasta_jax.lang.layout import NO_TARGET, Layout, layout
from pasta_jax.lang.positions import PositionRule
from pasta_jax.lang.program import Program, Promise, Sync, Text, promises, reading_order
from pasta_jax.lang.syntax import parse, print_program
from pasta_jax.lang.thread import Thread
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.train.attention import attention_mask
from pasta_jax.utils.jsonl import DataError, read_jsonl

RELAXED = settings(deadline=None)
SEED = Path(__file__).parents[2] / "data" / "seed.jsonl"
RULE = PositionRule()


def row(response: str, chunks=(), syncs=(), prompt: str = "p", name: str = "r") -> dict:
  """`chunks` are (start, end) or (start, end, topic)."""
  spans = [{"start": c[0], "end": c[1], "topic": c[2] if len(c) > 2 else f"{c[0]}-{c[1]}"} for c in chunks]
  return {"id": name, "prompt": prompt, "response": response, "chunks": spans, "syncs": list(syncs)}


# Rows to programs.

RESPONSES = st.lists(
  st.sampled_from(["a", "bc", " ", "\n", "\n\n", "1. ", "2) ", "- ", "**3. b**", "## 4. ", "<sync/>", "é"]),
  max_size=25,
).map("".join)


@st.composite
def annotated(draw) -> dict:
  """Spans that nest or lie apart, neighbours often touching; syncs anywhere."""
  response = draw(RESPONSES)
  spans: list[tuple[int, int]] = []

  def inside(start: int, end: int, depth: int):
    points = sorted(draw(st.lists(st.integers(start, end), max_size=6)))
    for a, b in zip(points[::2], points[1::2]):
      if a < b:
        spans.append((a, b))
        if depth < 2 and draw(st.booleans()):
          inside(a, b, depth + 1)

  inside(0, len(response), 0)
  syncs = draw(st.lists(st.integers(0, len(response)), max_size=4))
  return row(response, draw(st.permutations([(a, b, str(n)) for n, (a, b) in enumerate(spans)])), syncs)


def events(program: Program) -> list[tuple[str, object]]:
  """("open" or "close", topic) and ("sync", offset), in writing order."""
  found: list[tuple[str, object]] = []
  offset = 0

  def go(nodes: Program):
    nonlocal offset
    for node in nodes:
      if isinstance(node, Text):
        offset += len(node.text)
      elif isinstance(node, Sync):
        found.append(("sync", offset))
      else:
        found.append(("open", node.topic))
        go(node.body)
        found.append(("close", node.topic))

  go(program)
  return found


@settings(deadline=None, max_examples=300)
@given(data=annotated())
def test_program_reads_as_the_response_and_keeps_the_plan(data: dict):
  program = program_of(data)
  assert reading_order(program) == data["response"]
  order = events(program)
  assert [offset for kind, offset in order if kind == "sync"] == sorted(set(data["syncs"]))
  spans = {c["topic"]: (c["start"], c["end"]) for c in data["chunks"]}
  spans = {topic: (a, b) for topic, (a, b) in spans.items() if data["response"][a:b].strip()}
  assert sorted(topic for kind, topic in order if kind == "open") == sorted(spans)
  place = {event: i for i, event in enumerate(order)}
  for topic, (start, end) in spans.items():
    opened, closed = place["open", topic], place["close", topic]
    for other, (a, b) in spans.items():
      if start <= a and b <= end and (start, end) != (a, b):
        assert opened < place["open", other] < closed, "a chunk contains what its span contains"
      elif end <= a:
        assert closed < place["open", other], "chunks keep the order of their spans"
    for s in set(data["syncs"]):
      if s <= start:
        assert place["sync", s] < opened, "a sync before a chunk is not part of it"
      elif s >= end:
        assert closed < place["sync", s], "a sync after a chunk waits for it"


@RELAXED
@given(
  response=RESPONSES,
  spans=st.lists(st.tuples(st.integers(-1, 12), st.integers(-1, 12)), max_size=4),
  syncs=st.lists(st.integers(-1, 12), max_size=3),
)
def test_any_spans_make_a_program_or_an_error(response: str, spans: list[tuple[int, int]], syncs: list[int]):
  crossing = any(a < c < b < d for a, b in spans for c, d in spans)
  outside = any(not 0 <= a < b <= len(response) for a, b in spans)
  outside = outside or any(not 0 <= s <= len(response) for s in syncs)
  try:
    program = program_of(row(response, spans, syncs))
  except DataError as error:
    assert crossing or outside
    assert str(error).startswith("row r: ")
  else:
    assert not crossing and not outside
    assert reading_order(program) == response
    assert len(list(promises(program))) == sum(bool(response[a:b].strip()) for a, b in spans)


@pytest.mark.parametrize(
  ("response", "chunks", "syncs", "printed"),
  [
    # What stands between chunks is the main thread's (test_separators).
    ("1. Ab.\n2. Cd.\nEf.", [(0, 7), (7, 14)], [], "1. [Ab.]\n2. [Cd.]\nEf."),
    ("Ab.\n\nCd.", [(0, 5), (5, 8)], [], "[Ab.]\n\n[Cd.]"),
    ("(1) A (2) B", [(0, 6), (6, 11)], [], "(1) [A] (2) [B]"),
    ("A B", [(0, 3), (0, 1), (2, 3)], [], "[[A] [B]]"),
    ("A B", [(0, 3), (0, 3)], [], "[[A B]]"),
    ("   ", [(0, 3)], [], "   "),
    # Syncs: between chunks, at a chunk's first character, inside, at its end, at both ends of the text.
    ("A B C", [(0, 2), (2, 4)], [2], "[A] |[B] C"),
    ("A B C", [(0, 2), (2, 4)], [4], "[A] [B] |C"),
    ("A B C", [(0, 1)], [2, 2], "[A] |B C"),
    ("A B C", [(0, 5), (0, 1)], [2], "[[A] |B C]"),
    ("A B C", [(0, 5), (2, 3)], [2, 3], "[A |[B]| C]"),
    ("A B", [(0, 3), (0, 1)], [0], "|[[A] B]"),
    ("1. A", [(0, 4)], [0, 2], "|1.| [A]"),
    ("A\n- B", [(0, 1), (1, 5)], [3], "[A]\n-| [B]"),  # before the first visible character of a chunk
    ("A", [(0, 1)], [0, 1], "|[A]|"),
  ],
)
def test_placing_by_hand(response: str, chunks: list, syncs: list[int], printed: str):
  """`[` and `]` are a chunk's tags with the promise before them, `|` is a sync."""
  found = print_program(program_of(row(response, chunks, syncs)))
  found = re.sub(r'<promise topic="[^"]*"/><async>', "[", found)
  assert found.replace("</async>", "]").replace("<sync/>", "|") == printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunks": [{"start": 0, "end": 3, "topic": "a"}, {"start": 2, "end": 5, "topic": "b"}]},
         "row r: chunk 0..3 overlaps another without nesting"),
        ({"chunks": [{"start": 0, "end": 9, "topic": "a"}]}, "row r: chunk 0..9 is not inside the response"),
        ({"chunks": [{"start": 2, "end": 2, "topic": "a"}]}, "row r: chunk 2..2 is not inside the response"),
        ({"chunks": [{"start": 2, "topic": "a"}]}, "row r: chunks.0.end field required"),
        ({"chunks": [{"start": 2, "end": 3}]}, "row r: chunks.0.topic field required"),
        ({"chunks": [{"start": "2", "end": 3, "topic": "a"}]}, "row r: chunks.0.start must be a valid integer"),
        ({"chunks": [{"start": 2.0, "end": 3, "topic": "a"}]}, "row r: chunks.0.start must be a valid"),
        ({"chunks": [{"start": True, "end": 3, "topic": "a"}]}, "row r: chunks.0.start must be a valid integer"),
        ({"chunks": [{"start": 2, "end": 10**400, "topic": "a"}]}, "row r: chunk 2..1000"),
        ({"chunks": [{"start": 2, "end": 3, "topic": None}]}, "row r: chunks.0.topic must be a valid string"),
        ({"chunks": [{"start": 2, "end": 3, "topic": "\ud800"}]}, "row r: the topic of chunk 2..3 is no text"),
        ({"chunks": {"start": 2}}, "row r: chunks must be a valid list"),
        ({"chunks": [{"start": 0, "end": 6, "topic": "a"}] * 65}, "row r: chunks nest deeper than 64"),
        ({"syncs": [7]}, "row r: sync 7 is not inside the response"),
        ({"syncs": ["1"]}, "row r: syncs.0 must be a valid integer"),
        ({"response": None}, "row r: response field required"),
        ({"response": "\udc00"}, "row r: the response has half of a surrogate pair"),
        ({"where": "a.jsonl, row 3", "syncs": [7]}, "a.jsonl, row 3: sync 7"),
    ],
)  # fmt: skip
def test_unusable_rows(change: dict, message: str):
  with pytest.raises(DataError, match=f"^{re.escape(message)}"):
    program_of(row("abcdef") | change)


def test_null_chunks_and_syncs_are_none():
  absent = {"id": "r", "prompt": "p", "response": "abcdef"}
  assert program_of(absent | {"chunks": None, "syncs": None}) == program_of(absent) == (Text("abcdef"),)


def test_many_chunks_and_syncs_take_linear_time():
  n = 45_000
  chunks = [{"start": 2 * i, "end": 2 * i + 2, "topic": "t"} for i in range(n)]
  started = time.monotonic()
  program = program_of({"response": "a " * n, "chunks": chunks, "syncs": list(range(2 * n))})
  assert len(list(promises(program))) == n and time.monotonic() - started < 10  # minutes if it is quadratic


def test_seed_data_are_programs():
  rows = read_jsonl(SEED)
  nested = 0
  for r in rows:
    program = program_of(r)
    assert reading_order(program) == r["response"]
    assert parse(print_program(program)) == program
    assert len(list(promises(program))) == len(r["chunks"])
    assert sum(kind == "sync" for kind, _ in events(program)) == len(r["syncs"])
    nested += any(p.body and any(isinstance(n, Promise) for n in p.body) for p in promises(program))
  assert nested > 10


# Rows to examples.

ROWS = [
  row(
    "1. Ab cd ef gh ij kl mn op.\n2. Cd ef gh ij kl mn op qr.\n3. Ef gh ij kl mn op qr st.",
    [(0, 28), (28, 56), (56, 83)],
    prompt="three",
    name="fast",
  ),
  row("A " + "long " * 30, [], prompt="plain", name="plain"),
  row("A B", [(0, 1)], prompt="slow", name="slow"),
  row("C D", [], prompt="plain too", name="plain too"),
  row("x" * 400, [(0, 200)], prompt="long", name="long"),
]


def chosen(selection) -> list[str]:
  """The prompts of a selection."""
  return [BYTES.text(e.tokens[e.index < 0][1:-1]) for e in selection.examples]


def test_selection_and_its_reasons():
  kept = examples(ROWS, BYTES, RULE, annotation="plan", max_length=300, min_speedup=1.0)
  assert chosen(kept) == ["three", "plain", "plain too"]
  assert (kept.too_long, kept.too_slow, kept.too_thin, kept.too_plain) == (1, 1, 0, 0)
  kept = examples(ROWS, BYTES, RULE, annotation="plan", max_length=300, min_speedup=1.0, plain_share=0.5)
  assert chosen(kept) == ["three", "plain"] and kept.too_plain == 1
  kept = examples(ROWS, BYTES, RULE, annotation="plan", max_length=10_000, plain_share=0.0)
  assert chosen(kept) == ["three", "slow", "long"] and kept.too_plain == 2


def test_rows_of_many_or_thin_chunks_are_left_out():
  """Of 3, 1 and 1 chunks; those of "three" have the tags and 20 to 22 tokens of text."""
  choose = lambda **how: examples(
    ROWS, BYTES, RULE, annotation="plan", max_length=10_000, plain_share=0.0, **how
  )
  sizes = {name: chunk_lengths(encoded(program_of(r), BYTES, RULE)) for r in ROWS if (name := r["prompt"])}
  assert sizes["slow"] == [3] and sizes["plain"] == [] and len(sizes["three"]) == 3
  assert chosen(choose(max_parts=3)) == ["three", "slow", "long"]
  few = choose(max_parts=2)
  assert chosen(few) == ["slow", "long"] and few.too_thin == 1
  mean = sum(sizes["three"]) / 3
  assert chosen(choose(min_part=4)) == ["three", "long"]
  assert chosen(choose(min_part=mean)) == ["three", "long"]
  thin = choose(min_part=mean + 0.1)
  assert chosen(thin) == ["long"] and thin.too_thin == 2


@pytest.mark.parametrize("strategy", ["pred_10x", "fixed", "sum"])
def test_baseline_has_the_same_rows_without_tags(strategy: str):
  settings_ = dict(max_length=300, min_speedup=1.0, plain_share=0.5)
  with_tags = examples(ROWS, BYTES, PositionRule(strategy), annotation="plan", **settings_)
  without = examples(ROWS, BYTES, PositionRule(strategy), annotation="none", **settings_)
  assert chosen(with_tags) == chosen(without)
  assert dataclasses.astuple(with_tags)[1:] == dataclasses.astuple(without)[1:]
  responses = {r["prompt"]: r["response"] for r in ROWS}
  for prompt, e in zip(chosen(without), without.examples):
    own = e.tokens[e.index >= 0]
    assert BYTES.text(own[:-1]) == responses[prompt] and own[-1] == BYTES.tags.eos[0]
    assert not e.masked_intervals.any() and not e.threads.any()
    np.testing.assert_array_equal(e.positions, np.arange(len(e)))
    np.testing.assert_array_equal(e.targets[:-1][e.index[1:] >= 0], own)


def test_examples_are_laid_out_after_the_chat_prompt():
  only = examples(ROWS[:1], BYTES, RULE, annotation="plan", max_length=300).examples[0]
  expected = layout(BYTES.encode(program_of(ROWS[0]), RULE), RULE, BYTES.table, [257, *b"three", 257])
  for field in dataclasses.fields(Layout):
    np.testing.assert_array_equal(getattr(only, field.name), getattr(expected, field.name))


def test_selection_of_the_seed_data(smollm2_checkpoint):
  """The figures of the README are roughly right with the real tokenizer."""
  vocabulary = Vocabulary(smollm2_checkpoint.tokenizer)
  rows = read_jsonl(SEED)[:60]
  kept = examples(rows, vocabulary, RULE, annotation="plan", max_length=1024)
  assert len(kept.examples) + kept.too_long == len(rows) and kept.too_long < 3
  speedups = [
    cost(vocabulary.encode(program_of(r), RULE), vocabulary.table).theoretical_parallelism
    for r in rows
    if r["chunks"]
  ]
  assert 1.4 < np.exp(np.mean(np.log(speedups))) < 2.5


def test_a_row_that_the_vocabulary_cannot_encode_is_named(smollm2_checkpoint):
  vocabulary = Vocabulary(smollm2_checkpoint.tokenizer)
  bad_rows = [row("a\x04"), row("a", prompt="\x04"), row("a") | {"prompt": None}]
  for bad in ({**r, "id": "r7"} for r in bad_rows):
    with pytest.raises(DataError, match="^row r7: "):
      examples([row("fine"), bad], vocabulary, RULE, annotation="plan", max_length=100)


# Files.


@pytest.fixture
def files(tmp_path: Path) -> Path:
  (tmp_path / "a.jsonl").write_text('{"id": 1}\n\n{"id": 2}\n')
  with gzip.open(tmp_path / "b.jsonl.gz", "wt") as f:
    f.write(json.dumps({"id": "é"}) + "\n")
  return tmp_path


def test_mix(files: Path):
  a, b = files / "a.jsonl", files / "b.jsonl.gz"
  ids = lambda spec: [r["id"] for r in mix(spec)]
  assert ids([f"{a}"]) == [1, 2]
  assert ids([f"{a}*2", f"{b}"]) == [1, 2, 1, 2, "é"]
  assert ids([f"{b}", f"{a}*1"]) == ["é", 1, 2]
  assert ids([f"{a}*0", f"{b}"]) == ["é"]
  assert ids([]) == []
  assert [r["where"] for r in mix([f"{a}"])] == [f"{a}, row 1", f"{a}, row 2"]


@pytest.mark.parametrize("name", ["a*.jsonl", "a*3", "[a],b:c.jsonl", "~"])
def test_mix_takes_any_name(files: Path, name: str):
  (files / "a.jsonl").rename(files / name)
  assert len(mix([f"{files / name}"])) == 2 and len(mix([f"{files / name}*3"])) == 6


@pytest.mark.parametrize("times", ["", "x", "-1", "1.5", "2*3", " 2", "²", "99999"])
def test_mix_refuses_a_malformed_number(files: Path, times: str):
  entry = f"{files / 'a.jsonl'}*{times}"
  with pytest.raises(DataError, match=re.escape(f"data: {entry!r} is not of the form FILE or FILE*TIMES")):
    mix([entry])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", b'{"id": 1}\n{"id": \n', "bad.jsonl, line 2: not JSON (Expecting value"),
        ("bad.jsonl", b'{"id": 1}\n\n[1]\n', "bad.jsonl, line 3: expected an object, found list"),
        ("bad.jsonl", b'{"id": 1}\n{"id": "\xff"}\n', "bad.jsonl, line 2: not UTF-8 (invalid start byte at byte 8)"),
        ("bad.jsonl.gz", b"no gzip", "bad.jsonl.gz: "),
        ("bad.jsonl.gz", gzip.compress(b'{"id": 1}\n' * 99)[:-9], "bad.jsonl.gz: "),
    ],
    ids=["cut line", "list", "not UTF-8", "not gzip", "cut gzip"],
)  # fmt: skip
def test_unusable_files(tmp_path: Path, name: str, content: bytes, message: str):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(DataError) as error:
    mix([str(tmp_path / name)])
  assert str(error.value).startswith(f"{tmp_path}/{message}")


def test_missing_file(tmp_path: Path):
  with pytest.raises(DataError, match="no such data file: .*none.jsonl"):
    mix([str(tmp_path / "none.jsonl")])


# Packing.

LENGTH, LEVELS = 64, 3


def example_of(n: int, length: int) -> Layout:
  """An example of `length` tokens n."""
  return layout(Thread((n,) * length), RULE, BYTES.table)


def laid(main: Thread) -> Layout:
  return layout(main, RULE, BYTES.table, (63, 58))


@settings(deadline=None, max_examples=40)
@given(mains=st.lists(trees(), max_size=5))
def test_packed_rows_are_their_examples_side_by_side(mains: list[Thread]):
  parts = [e for e in map(laid, mains) if e.masked_intervals.shape[1] <= LEVELS and len(e) <= LENGTH]
  for indices in fill_rows([len(e) for e in parts], LENGTH)[:1]:
    inside = [parts[i] for i in indices]
    packed = pack_row(inside, LENGTH, LEVELS)
    expected = np.zeros((LENGTH, LENGTH), bool)
    live = np.eye(LENGTH, dtype=bool)
    at = 0
    for number, e in enumerate(inside, 1):
      where = slice(at, at + len(e))
      expected[where, where] = visible_matrix(e)
      live[where, where] = live_matrix(e)
      for field in ("tokens", "positions", "targets"):
        np.testing.assert_array_equal(getattr(packed, field)[0, where], getattr(e, field))
      np.testing.assert_array_equal(packed.segment_ids[0, where], number)
      at += len(e)
    expected[at:, at:] = np.eye(LENGTH - at, dtype=bool)  # padding sees itself
    np.testing.assert_array_equal(attention_mask(packed.as_dict())[0], expected)
    np.testing.assert_array_equal(attention_mask(packed.as_dict(), "live")[0], live)
    assert not packed.segment_ids[0, at:].any() and not packed.tokens[0, at:].any()
    assert (packed.targets[0, at:] == NO_TARGET).all()
    assert all(x.dtype == np.int32 and x.shape[:2] == (1, LENGTH) for x in packed.as_dict().values())


def test_deeper_nesting_than_the_batch_holds_is_refused():
  program = parse('<promise topic="a"/><async><promise topic="b"/><async>x</async>y</async>')
  deep = laid(BYTES.encode(program, RULE))
  with pytest.raises(ValueError, match="an example nests chunks 2 deep, the batch has 1 levels"):
    pack_row([deep], LENGTH, 1)


@given(lengths=st.lists(st.integers(1, 20), max_size=30))
def test_rows_are_filled_first_fit_and_never_overflow(lengths: list[int]):
  rows = fill_rows(lengths, 20)
  assert sorted(i for r in rows for i in r) == list(range(len(lengths)))
  place = {i: n for n, r in enumerate(rows) for i in r}
  space = [20] * len(rows)
  for i, n in enumerate(lengths):
    assert all(space[r] < n for r in range(place[i])), "an earlier row had room"
    space[place[i]] -= n
  assert min(space, default=0) >= 0


def test_example_longer_than_a_row_is_refused():
  with pytest.raises(ValueError, match="an example of 21 tokens does not fit a row of 20"):
    fill_rows([3, 21], 20)


def contents(batch: PackedBatch) -> list[list[int]]:
  """For each row, the examples (of `example_of`) in it."""
  found = []
  for tokens, segment_ids in zip(batch.tokens, batch.segment_ids):
    found.append([int(tokens[segment_ids == s][0]) for s in range(1, segment_ids.max() + 1)])
  return found


@RELAXED
@given(
  lengths=st.lists(st.integers(1, 20), min_size=1, max_size=20),
  batch_size=st.integers(1, 5),
  seed=st.integers(0, 9),
  steps=st.lists(st.integers(0, 30), max_size=4),
)
def test_batches(lengths: list[int], batch_size: int, seed: int, steps: list[int]):
  """Each epoch has every example once, before its last batch is filled up; steps are independent."""
  data = [example_of(n, length) for n, length in enumerate(lengths)]
  make = lambda: PackedBatches(data, batch_size=batch_size, length=20, levels=1, seed=seed)
  batches = make()
  first = 0
  for epoch in range(3):
    n = batches.steps_in_epoch(epoch)
    rows = [r for step in range(first, first + n) for r in contents(batches(step))]
    assert len(rows) == n * batch_size
    seen = [i for r in rows for i in r]
    once = [
      i
      for r in rows[: next(k for k in range(len(rows) + 1) if sum(map(len, rows[:k])) >= len(data))]
      for i in r
    ]
    assert sorted(once) == list(range(len(data))) and set(seen) == set(once)
    first += n
  for step in steps:
    resumed, again = make()(step), batches(step)
    for field in dataclasses.fields(PackedBatch):
      np.testing.assert_array_equal(getattr(resumed, field.name), getattr(again, field.name))
    assert resumed.tokens.shape == (batch_size, 20) and resumed.masked_intervals.shape == (
      batch_size,
      20,
      1,
      2,
    )


def test_order_changes_with_seed_and_epoch():
  data = [example_of(n, 20) for n in range(40)]
  orders = set()
  for seed in (0, 1):
    batches = PackedBatches(data, batch_size=40, length=20, levels=1, seed=seed)
    for step in (0, 1):
      orders.add(tuple(i for r in contents(batches(step)) for i in r))
  assert len(orders) == 4


def test_no_examples_is_an_error():
  with pytest.raises(ValueError, match="no training example is left"):
    PackedBatches([], batch_size=1, length=20, levels=1, seed=0)


@RELAXED
@given(lengths=st.lists(st.integers(1, 20), max_size=20), batch_size=st.integers(1, 5))
def test_validation_batches_hold_each_example_once(lengths: list[int], batch_size: int):
  data = [example_of(n, length) for n, length in enumerate(lengths)]
  batches = single_batches(data, batch_size=batch_size, length=20, levels=1)
  assert all(b.tokens.shape == (batch_size, 20) for b in batches)
  assert sorted(i for b in batches for r in contents(b) for i in r) == list(range(len(data)))
  learned = sum(int((b.targets != NO_TARGET).sum()) for b in batches)
  assert learned == sum(lengths) - len(lengths)
