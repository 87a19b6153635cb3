"""Who writes what stands between the parts of a response: the promising thread, in every form of text."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pasta_jax.data import structure
from pasta_jax.data.examples import program_of
from pasta_jax.data.separators import bounds, skip_separator
from pasta_jax.lang.program import Program, promises, reading_order, unseparated
from pasta_jax.lang.syntax import print_program

SEED = Path(__file__).parents[2] / "data" / "seed.jsonl"


def printed(program: Program) -> str:
  """`[` and `]` are a chunk's tags with the promise before them, `|` is a sync."""
  found = re.sub(r'<promise topic="[^"]*"/><async>', "[", print_program(program))
  return found.replace("</async>", "]").replace("<sync/>", "|")


def program(marked: str) -> Program:
  """Of a response with `⟦` and `⟧` where the annotation has its chunks."""
  response, chunks, around = "", [], []
  for character in marked:
    if character == "⟦":
      around.append({"start": len(response), "topic": "t"})
      chunks.append(around[-1])
    elif character == "⟧":
      around.pop()["end"] = len(response)
    else:
      response += character
  found = program_of({"id": "r", "prompt": "p", "response": response, "chunks": chunks, "syncs": []})
  assert reading_order(found) == response
  return found


@pytest.mark.parametrize(
  ("marked", "expected"),
  [
    # Lists.
    ("⟦- Ab.\n⟧⟦- Cd.⟧", "- [Ab.]\n- [Cd.]"),
    ("⟦* Ab.⟧⟦\n  * Cd.\n\n⟧Ef.", "* [Ab.]\n  * [Cd.]\n\nEf."),
    ("⟦• Ab\n⟧⟦+ Cd\n⟧⟦– Ef⟧", "• [Ab]\n+ [Cd]\n– [Ef]"),
    ("⟦- [ ] Ab\n⟧⟦- [x] Cd⟧", "- [ ] [Ab]\n- [x] [Cd]"),
    ("⟦1. Ab.\n\n⟧⟦12) Cd.\n⟧⟦(3) Ef.⟧", "1. [Ab.]\n\n12) [Cd.]\n(3) [Ef.]"),
    ("⟦a) Ab\n⟧⟦(b) Cd\n⟧⟦iv) Ef⟧", "a) [Ab]\n(b) [Cd]\niv) [Ef]"),
    ("⟦II. Ab\n⟧⟦A. Cd\n⟧⟦b. Ef⟧", "II. [Ab]\nA. [Cd]\nb. [Ef]"),
    ("⟦1.1. Ab\n⟧⟦**2.** Cd\n⟧⟦**3. Ef**⟧", "1.1. [Ab]\n**2.** [Cd]\n**3. [Ef**]"),
    # What only looks like a marker.
    ("At ⟦9.00 Ab\n⟧⟦1.5 million⟧", "At [9.00 Ab]\n[1.5 million]"),
    ("By ⟦J. Doe,⟧ ⟦A. Roe⟧", "By [J. Doe,] [A. Roe]"),
    ("⟦-1 is less\n⟧⟦---\n⟧⟦* * *\n\nAb⟧", "[-1 is less]\n[---]\n[* * *\n\nAb]"),
    ("⟦2024. Ab\n⟧⟦1.\n⟧⟦- ⟧", "[2024. Ab]\n[1.]\n[-] "),
    ("⟦**Ab**: cd\n\n⟧⟦*Ef* gh⟧", "[**Ab**: cd]\n\n[*Ef* gh]"),
    # Paragraphs and headings stay whole.
    ("Ab.\n\n⟦Cd. Ef.\n\n⟧⟦  Gh.⟧", "Ab.\n\n[Cd. Ef.]\n\n  [Gh.]"),
    ("⟦## Ab\nCd.\n\n⟧⟦## 2. Ef\nGh.⟧", "[## Ab\nCd.]\n\n## 2. [Ef\nGh.]"),
    ("Ab ⟦ – cd;⟧⟦ – ef.⟧", "Ab  – [cd;] – [ef.]"),
    # Nested chunks: each marker is its own promising thread's.
    ("⟦1. Ab:\n⟦   - Cd.\n⟧⟦   - Ef.\n⟧⟧⟦2. Gh⟧", "1. [Ab:\n   - [Cd.]\n   - [Ef.]]\n2. [Gh]"),
    ("⟦⟦- Ab.\n⟧⟦- Cd.\n⟧⟧Ef.", "[- [Ab.]\n- [Cd.]]\nEf."),
    ("⟦ ⟦Ab. ⟧ ⟦ Cd. ⟧ ⟧", " [[Ab.]   [Cd.]]  "),
    # A chunk of blanks alone is none.
    ("Ab.⟦\n\n⟧Cd.⟦⟦ ⟧ ⟧", "Ab.\n\nCd.  "),
    # Tables and code: a row or a block whole, indentation and line breaks between them outside.
    ("| a | b |\n⟦| 1 | 2 |\n⟧⟦| 3 | 4 |\n⟧", "| a | b |\n[| 1 | 2 |]\n[| 3 | 4 |]\n"),
    ("⟦```py\nx = 1\n```\n\n⟧⟦```py\n- y\n```\n⟧", "[```py\nx = 1\n```]\n\n[```py\n- y\n```]\n"),
    ("```\n⟦    a()\n⟧⟦    b()\n⟧```", "```\n    [a()]\n    [b()]\n```"),
    # Dialogue.
    ("⟦A: Hi.\n⟧⟦B: Hello.\n⟧⟦— Bye.⟧", "[A: Hi.]\n[B: Hello.]\n— [Bye.]"),
    ("⟦“Hi,” she said.\n\n⟧⟦—¿Qué?⟧", "[“Hi,” she said.]\n\n[—¿Qué?]"),
    # Scripts without blanks have none behind a marker either; an ideographic space is a blank.
    ("⟦1.节能：换灯。\n⟧⟦2.**供暖**：调低。⟧", "1.[节能：换灯。]\n2.[**供暖**：调低。]"),
    ("⟦一、节能。\n⟧⟦（二）供暖。\n⟧⟦③保温。⟧", "一、[节能。]\n（二）[供暖。]\n③[保温。]"),
    ("⟦・照明。\n⟧⟦１．暖房。\n\u3000⟧⟦窓。⟧", "・[照明。]\n１．[暖房。]\n\u3000[窓。]"),
    ("⟦节能。⟧⟦供暖。⟧", "[节能。][供暖。]"),
    ("⟦1) ประหยัด\n⟧⟦๒. ความร้อน⟧", "1) [ประหยัด]\n๒. [ความร้อน]"),
  ],
)  # fmt: skip
def test_parts_by_hand(marked: str, expected: str):
  assert printed(program(marked)) == expected


PARTS = ["a", "Bc.", " ", "\n", "\n\n", "\t", "1. ", "2) ", "(3) ", "- ", "* ", "**", "## ", "12. ", "b) ", "节。",
         "一、", "```\n", "| ", ": ", "— ", "\u3000", "\r\n", "<sync/>", "[ ] "]  # fmt: skip


@st.composite
def rows(draw) -> dict:
  """Chunks that begin and end anywhere, nested and touching."""
  response = "".join(draw(st.lists(st.sampled_from(PARTS), min_size=1, max_size=25)))
  chunks: list[dict] = []

  def inside(start: int, end: int, depth: int):
    points = sorted(draw(st.lists(st.integers(start, end), max_size=6)))
    for a, b in zip(points, points[1:]) if draw(st.booleans()) else zip(points[::2], points[1::2]):
      if a < b:
        chunks.append({"start": a, "end": b, "topic": "t"})
        if depth < 2 and draw(st.booleans()):
          inside(a, b, depth + 1)

  inside(0, len(response), 0)
  syncs = draw(st.lists(st.integers(0, len(response)), max_size=3))
  return {"id": "r", "prompt": "p", "response": response, "chunks": chunks, "syncs": syncs}


def meets(response: str, at: int) -> bool:
  return 0 < at < len(response) and not re.search(r"\s", response[at - 1 : at + 1])


@settings(deadline=None, max_examples=300)
@given(row=rows())
@example(row={"response": "A. B", "chunks": [{"start": 0, "end": 4, "topic": "t"}] * 2, "syncs": []})
def test_chunks_begin_and_end_visibly_and_are_separated_where_the_response_is(row: dict):
  response, found = row["response"], program_of(row)
  assert reading_order(found) == response
  for p in promises(found):
    text = reading_order(p.body)
    assert text and text == text.strip()
  edges = [
    (c["start"] + len(text) - len(text.lstrip()), c["start"] + len(text.rstrip()))
    for c in row["chunks"]
    if (text := response[c["start"] : c["end"]]).strip()
  ]
  # A marker without a blank behind it, as in "一、节", is the only text that a chunk newly meets.
  wide = [skip_separator(response, a) for a, _ in edges if meets(response, skip_separator(response, a))]
  without = sum(meets(response, a) or meets(response, b) for a, b in edges)
  assert unseparated(found) <= without + len(wide)


@given(st.text(alphabet="a1.-* \n)(b节、", max_size=12), st.data())
def test_bounds_lie_inside(text: str, data):
  start, end = sorted(data.draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
  inside = data.draw(st.integers(start, end))
  a, b = bounds(text, start, end, inside)
  assert start <= a <= b <= end
  assert (a == b) == (not text[start:end].strip()) and text[a:b] == text[a:b].strip()
  assert not text[b:end].strip() and a <= skip_separator(text, start)


@pytest.mark.parametrize("annotation", ["plan", "structure"])
def test_the_seed_data_are_separated(annotation: str):
  """No chunk begins with a marker of its own, and none meets another text."""
  count = 0
  for row in map(json.loads, SEED.read_text().splitlines()):
    if annotation == "structure":
      row |= {"chunks": structure.annotate(row["response"]), "syncs": []}
    found = program_of(row)
    assert reading_order(found) == row["response"] and unseparated(found) == 0
    for p in promises(found):
      text = reading_order(p.body)
      assert text == text.strip() and not skip_separator(text, 0), text
    count += len(row["chunks"])
  assert count > 700
