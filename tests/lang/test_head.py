"""The form `head`: what a head is, when two are the same, and what the automaton makes of promises without topics."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_language import ByteTokenizer

from pasta_jax.lang import forms
from pasta_jax.lang.forms import Forms
from pasta_jax.lang.head import MOST_WORDS, TokenHashes, hash_of, head, normalised
from pasta_jax.lang.positions import PositionRule
from pasta_jax.lang.program import Promise, Text
from pasta_jax.lang.syntax import parse
from pasta_jax.lang.thread import Fork, Thread, read, read_all
from pasta_jax.lang.vocabulary import Vocabulary

WORDS = Vocabulary(ByteTokenizer(), base_size=265, promise="head")
TAGS = WORDS.tags


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("\n1. **Lighting**:", "1. **Lighting**:"),
    ("One line.\n\nAnother:  two ", "Another: two"),
    ("a\rb", "b"),
    ("line\n", ""),
    ("", ""),
    (" ".join(map(str, range(20))), " ".join(map(str, range(20 - MOST_WORDS, 20)))),
    ("照明：", "照明："),
  ],
)
def test_a_head_is_the_end_of_the_line(text: str, expected: str):
  assert head(text) == expected


@pytest.mark.parametrize(
  ("one", "other", "alike"),
  [
    ("1. **Lighting**:", "3) lighting -", True),
    ("## Heating", "Heating", True),
    ("Day 1:", "Day 2:", False),
    ("照明：", "1. 照明：", True),
    ("照明：", "暖房：", False),
    ("É", "é", False),  # only ASCII letters have a case
  ],
)
def test_heads_that_are_the_same(one: str, other: str, alike: bool):
  assert (normalised(one) == normalised(other)) == alike
  assert (hash_of(normalised(one)) == hash_of(normalised(other))) == alike


@pytest.mark.parametrize("text", ["", "2020:", "---", "| |"])
def test_a_head_without_letters_is_like_no_other(text: str):
  assert normalised(text) == b"" and hash_of(b"") == 0


PIECES = st.lists(
  st.sampled_from(["a", "B", "1", "12", ".", " ", "\n", "\r", "é", "**", "照", "head", " Two", "3\nx", "x\n"])
)


@given(pieces=PIECES, cuts=st.lists(st.integers(0, 40)))
def test_the_hash_of_a_head_does_not_depend_on_its_tokens(pieces: list[str], cuts: list[int]):
  """Cut anywhere, inside of characters too."""
  text = "".join(pieces)
  raw = text.encode()
  bounds = [0, *sorted(min(c, len(raw)) for c in cuts), len(raw)]
  hashes = TokenHashes.of([raw[a:b] for a, b in zip(bounds, bounds[1:])])
  h = 0
  for scale, value, fresh in zip(*(np.asarray(x).tolist() for x in hashes)):
    h = fresh if h == 0 or scale == 0 else (h * scale + value) % 2**32
  line = text.replace("\r", "\n").split("\n")[-1]
  assert h == hash_of(normalised(line))


@pytest.mark.parametrize(
  ("text", "is_main", "ill", "heads"),
  [
    ("a O 7 C", True, 0, ["a"]),
    ("a 2 O 7 C b O 3 C", True, 0, ["a2", "b"]),
    ("O 7 C", True, 1, [""]),  # without a head: counted, and carried out
    ("A O 7 C E", False, 1, [""]),
    ("A x O 7 C E", False, 0, ["x"]),
    ("a O 7 C O 7 C", True, 1, ["a", ""]),
    ("a S O 7 C", True, 1, [""]),
    ("a S b O 7 C", True, 0, ["b"]),
    ("a M O 7 C", True, 1, ["a"]),  # the second tag means nothing
    ("a O M 7 x C b", True, 2, ["a"]),
    ("a E b O 7 C", True, 1, ["ab"]),  # neither does </async> in the main thread
    ("a O 7 E b O 7 C", True, 1, ["b"]),  # a promise that is given up ends the head, too
    ("a O 7 S", True, 1, []),
    ("a O 7", True, 1, []),
  ],
)
def test_promises_and_their_heads(text: str, is_main: bool, ill: int, heads: list[str]):
  names = dict(zip("OMCAES", TAGS.ids))
  tokens = tuple(names.get(t, ord(t)) for t in text.split())
  reading = read(Thread(tokens), WORDS.table, is_main=is_main)
  assert reading.malformed == ill
  assert not reading.is_topic.any()
  assert [WORDS.text(t) for t in reading.topics.values()] == heads
  child = Thread((TAGS.async_, TAGS.end))
  main = Thread(tokens, tuple(Fork(at, n, child) for at, n in reading.declared.items()))
  decoded = WORDS.decode(main, PositionRule(), read_all(main, WORDS.table, is_main=is_main))
  assert sum(isinstance(n, Promise) for n in decoded) == len(heads)
  assert all(n.topic is None for n in decoded if isinstance(n, Promise))


def test_the_tokens_of_a_promise():
  program = parse('- Cost:<promise tokens="40"/><async> low</async>\n- Risk:<promise/><async> none</async>')
  assert isinstance(program[0], Text)
  main = WORDS.encode(program, PositionRule("pred_1x"))
  labels = "".join(map(WORDS.label, main.tokens[:-1]))
  assert labels == '- Cost:<promise tokens="6"/>\n- Risk:<promise tokens="7"/>'
  assert WORDS.encode(program, PositionRule("fixed")).forks[0].declared is None
  assert WORDS.speaking(Forms(promise="head")) is WORDS and WORDS.speaking(Forms()).tags == TAGS


def test_the_form_is_carried_by_metadata():
  form = forms.Forms(promise="head")
  assert forms.from_metadata(forms.to_metadata(form)) == form
  assert forms.to_metadata(forms.Forms()).keys() == {"positions"}
  with pytest.raises(ValueError, match="^promise 'tail' is none of topic, head$"):
    forms.Forms(promise="tail")
