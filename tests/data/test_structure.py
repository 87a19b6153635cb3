"""Annotation by form: what becomes a chunk, and that no text changes."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pasta_jax.data.examples import program_of
from pasta_jax.data.structure import annotate
from pasta_jax.lang.program import Promise, Sync, promises, reading_order

LONG = "and this is why it matters to all of us."


def chunks(text: str) -> list[tuple[str, str]]:
  return [(c["topic"], text[c["start"] : c["end"]].strip()) for c in annotate(text)]


def test_items_with_heads_keep_them_in_the_promising_thread():
  text = (
    f"Three ways:\n\n1. **Heating**: lower it {LONG}\n2. Lamps: change them {LONG}\n"
    f"3. Two Doors - close them {LONG}\n\nThat is all."
  )
  assert chunks(text) == [
    ("Heating", f"lower it {LONG}"),
    ("Lamps", f"change them {LONG}"),
    ("Two Doors", f"close them {LONG}"),
  ]


def test_a_bold_head_ends_at_a_blank():
  text = "\n".join(f"- **{w}**{end} {LONG}" for w, end in (("Ab", "."), ("Cd", ""), ("Ef", "-like")))
  assert chunks(text)[:2] == [("Ab", LONG), ("Cd", LONG)] and chunks(text)[2][1] == f"**Ef**-like {LONG}"


def test_items_without_heads_are_chunks_whole_and_lines_below_belong_to_them():
  text = (
    f"- Ask the first person {LONG}\n  - and a friend\n- Call a second one {LONG}\n\n  More on that.\n"
    f"- Write {LONG}\n\nNo item here {LONG}"
  )
  assert chunks(text) == [
    ("Ask first person", f"Ask the first person {LONG}\n  - and a friend"),
    ("Call second one", f"Call a second one {LONG}\n\n  More on that."),
    ("Write why matters", f"Write {LONG}"),
  ]


def test_sections_may_hold_lists():
  items = "\n".join(f"- thing number {n} {LONG}" for n in ("one", "two", "three"))
  text = f"Intro.\n\n## The Past\n{items}\n\n## The Future\nNobody knows {LONG}\n"
  found = annotate(text)
  assert [c["topic"] for c in found] == [
    "Past",
    "thing number one",
    "thing number two",
    "thing number three",
    "Future",
  ]
  program = program_of({"id": 0, "response": text, "chunks": found, "syncs": []})
  assert [len([n for n in p.body if isinstance(n, Promise)]) for p in program if isinstance(p, Promise)] == [
    3,
    0,
  ]


def test_paragraphs_keep_their_first_sentences():
  text = "\n\n".join(
    f"{w} comes first, says Dr. Who. The rest of it follows, {LONG}" for w in ("Spring", "Summer", "Autumn")
  )
  assert [t for t, _ in chunks(text)] == ["Spring comes first", "Summer comes first", "Autumn comes first"]
  assert all(body == f"The rest of it follows, {LONG}" for _, body in chunks(text))


@pytest.mark.parametrize(
  "text",
  [
    "",
    "One line.",
    f"1. a {LONG}\n2. b {LONG}",
    "1. a\n2. b\n3. c",
    f"First. {LONG}\n\nSecond. {LONG}",
    "\n".join(f"{n}. item {LONG}" for n in (1, 2, 3)) + "\n```\ncode\n```",
    "\n".join(f"{n}. see https://example.com {LONG}" for n in (1, 2, 3)),
  ],
)
def test_a_response_without_form_has_no_chunks(text):
  assert annotate(text) == []


PARTS = [
  "1. ",
  "2) ",
  "- ",
  "* ",
  "  - ",
  "## ",
  "**Bold**",
  ":",
  "\n",
  "\n\n",
  " ",
  "word",
  "Dr. ",
  "A sentence. ",
  LONG,
  "é\u2028",
  "\t",
  "#",
]


@given(st.lists(st.sampled_from(PARTS), max_size=40).map("".join))
def test_any_text_survives(text):
  """Chunks are in order, nest or do not touch, and the program reads as the text; no sync, as in APAR."""
  found = annotate(text, fewest=1, shortest=1)
  program = program_of({"id": 0, "response": text, "chunks": found, "syncs": []})
  assert reading_order(program) == text
  assert len(list(promises(program))) == len(found)
  assert not any(isinstance(node, Sync) for p in promises(program) for node in p.body)
  ends = []
  for c in found:
    ends = [e for e in ends if e > c["start"]]
    assert all(c["end"] <= e for e in ends)
    ends.append(c["end"])


def test_the_seed_data_has_form():
  rows = [json.loads(line) for line in open(Path(__file__).parents[2] / "data" / "seed.jsonl")]
  found = [annotate(r["response"]) for r in rows]
  assert 0.4 < sum(map(bool, found)) / len(rows) < 0.9
