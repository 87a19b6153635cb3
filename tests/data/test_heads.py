"""Annotated rows in the form `head`: what becomes the head of a part, and what stays of its chunk."""

import pytest
from hypothesis import given, settings
from test_language import BYTES, programs

from pasta_jax.data.examples import examples, program_of, read_annotated
from pasta_jax.data.heads import LEAST_REST, head_end, with_heads
from pasta_jax.lang.forms import Forms
from pasta_jax.lang.head import head
from pasta_jax.lang.positions import PositionRule
from pasta_jax.lang.program import Program, Promise, Sync, Text, promises, reading_order
from pasta_jax.lang.syntax import parse, print_program

REST = " which goes on for long enough to be a chunk"


def heads(program: Program) -> list[tuple[str, str]]:
  """(text of its thread before it, text of its chunk) of every promise, inner ones after the outer one."""
  out, text = [], ""
  for node in program:
    if isinstance(node, Promise):
      out += [(text, reading_order(node.body)), *heads(node.body)]
    text = text + node.text if isinstance(node, Text) else ""
  return out


@pytest.mark.parametrize(
  ("kept", "rest"),
  [
    # A list's marker and number, then a title up to its colon or dash.
    ("1. **Lighting**:", " switch" + REST),
    ("- **Lighting:**", " switch" + REST),
    ("\n\n  2) Lighting and heat:", " switch" + REST),
    ("* __Light__ –", " switch" + REST),
    ("Lighting -", " switch" + REST),
    ("**Method.**", " We did it," + REST),
    ("**1. Lighting**", "\nSwitch" + REST),
    # A line of its own.
    ("## How to light a large room", "\n\nSwitch" + REST),
    ("**Goods**", "\n- silk" + REST),
    # The first words.
    ("- Switch all of your", " lamps" + REST),
    ("For example,", " switch" + REST),
    ("Play mini golf.", " Nobody is good" + REST),
    ("e.g. one two three", " four" + REST),
    ("At 12:30 we all", " left" + REST),  # no colon of a title
    ("See http://a.b/c for more", " of it" + REST),
    ("Well-known and liked things", " are" + REST),
    # Code, tables, dialogue.
    ("```python", "\ndef f(x):\n  return x + 1  # and more\n```"),
    ("```\nfor (int i", " = 0; i < 10; i++) { print(i); }\n```"),
    ("| Lamp | Watts |", "\n|---|---|\n| LED | 8 |\n| Halogen | 40 |"),
    ("| LED | 8", " | bright, cheap, cold to the touch |"),
    ("Alice:", " I thought that you would never come back!"),
    ("ALICE (quietly):", " I thought that you would never come"),
    # Scripts without blanks between words.
    ("照明：", "将所有灯泡换成节能的LED灯泡，随手关灯。"),
    ("1. 照明：", "将所有灯泡换成节能的LED灯泡，随手关灯。"),
    ("首先，", "将所有灯泡换成节能的LED灯泡，随手关灯。"),
    ("将所有灯泡换成节", "能的LED灯泡并且随手关灯这样可以省电"),
    ("**照明**：", "将所有灯泡换成节能的LED灯泡，随手关灯。"),
    ("## 照明", "\n将所有灯泡换成节能的LED灯泡，随手关灯。"),
    ("まず、", "電球をすべてLEDに取り替えて、こまめに消灯します。"),
    ("電球をすべてLE", "Dに取り替えて、こまめに消灯します。"),
    ("เปลี่ยนหลอ", "ดไฟทั้งหมดเป็นหลอดประหยัดพลังงาน"),  # eight letters with their marks
    ("กินข้าวเช้า", "ทุกวันเพื่อสุขภาพที่ดีและแข็งแรง"),
    ("ฉันกินข้าว", "เช้าทุกวันเพื่อสุขภาพที่ดีและแข็งแรง"),  # a vowel that stands before its letter
    ("조명 기구를 모두 LED로", " 바꾸고 사용하지 않을 때에는 항상 끄도록 합니다."),  # Korean has blanks
  ],
)
def test_the_head_of_a_part(kept: str, rest: str):
  assert head_end(kept + rest) == len(kept)
  program = (Text("Intro.\n"), Promise("t", 40, (Text(kept + rest + " \n"),)), Text("End"))
  found = with_heads(program)
  assert found == (Text("Intro.\n" + kept), Promise(None, 40, (Text(rest),)), Text(" \nEnd"))
  assert head("Intro.\n" + kept)


@pytest.mark.parametrize(
  "text", ["", " \n", "- ", "**:**", "word", "1. ---", "a " * 3 + "b" * (LEAST_REST - 1), "照明：换成灯"]
)
def test_what_is_too_short_for_a_head_and_a_chunk_is_the_promising_threads(text: str):
  assert with_heads((Text("a"), Promise("t", None, (Text(text),)), Text("z"))) == (Text(f"a{text}z"),)


LONG = "goes on and on, and for a long time"


@pytest.mark.parametrize(
  ("source", "expected"),
  [
    # A head ends where a chunk inside or a sync begins.
    (f"{{A b{{c d e f {LONG}}} tail}}", f"A b<promise/><async>c d e f<promise/><async> {LONG}</async> tail</async>"),
    (f"{{A b<sync/> c d e {LONG}}}", f"A b<promise/><async><sync/> c d e {LONG}</async>"),
    # A part that begins with a part has no head of its own.
    (f"{{{{c d e f {LONG}}} tail and more of the tail}}",
     f"c d e f<promise/><async> {LONG}</async> tail and more of the tail"),
    # Neighbours: what stands between them is the promising thread's.
    (f"{{- a: {LONG}}}{{\n- b: {LONG}}}",
     f"- a:<promise/><async> {LONG}</async>\n- b:<promise/><async> {LONG}</async>"),
    (f"{{# A\n\n{{- a: {LONG}\n}}{{- b: {LONG}\n\n}}}}# B",
     f"# A<promise/><async>\n\n- a:<promise/><async> {LONG}</async>\n- b:<promise/><async> {LONG}</async></async>"
     "\n\n# B"),
  ],
)  # fmt: skip
def test_programs_with_parts_in_parts(source: str, expected: str):
  program = parse(source.replace("{", '<promise topic="t"/><async>').replace("}", "</async>"))
  found = print_program(with_heads(program))
  assert found == expected
  assert reading_order(parse(found)) == reading_order(program)


def check(program: Program):
  found = with_heads(program)
  assert reading_order(found) == reading_order(program)
  assert sum(isinstance(n, Sync) for n in found) >= sum(isinstance(n, Sync) for n in program)
  for before, chunk in heads(found):
    assert before.strip() and chunk.strip()
    assert not before[-1].isspace(), "the blank after a head is the chunk's"
    assert not chunk[-1].isspace(), "the blank after a chunk is the promising thread's"
  assert all(p.topic is None for p in promises(found))


@settings(deadline=None)
@given(programs())
def test_random_programs_keep_their_text(program: Program):
  check(program)


def test_rows_of_the_data_set():
  rows = read_annotated("data/seed.jsonl")
  before = after = 0
  for row in rows:
    program = program_of(row)
    check(program)
    found = with_heads(program)
    before, after = before + len(list(promises(program))), after + len(list(promises(found)))
    assert all(head(text) for text, _ in heads(found))
  assert (before, after) == (947, 947)


def test_examples_are_of_the_form_of_their_vocabulary():
  rows = [row for row in read_annotated("data/seed.jsonl")[:20] if row["chunks"]]
  chosen = {
    form: examples(
      rows, BYTES.speaking(Forms(promise=form)), PositionRule(), annotation="plan", max_length=10_000
    ).examples
    for form in ("topic", "head")
  }
  for topic, with_head in zip(*chosen.values(), strict=True):
    assert (with_head.tokens != BYTES.tags.middle).all()
    assert (with_head.tokens == BYTES.tags.open).sum() == (topic.tokens == BYTES.tags.open).sum() > 0
    is_text = lambda laid: laid.tokens < BYTES.base_size
    assert is_text(with_head).sum() < is_text(topic).sum(), "topics are left out"
