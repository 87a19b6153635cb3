"""Traces, records and views of responses whose promises have heads."""

import dataclasses
import json

import numpy as np
import pytest
from helpers import tiny
from rich.console import Console
from test_language import ByteTokenizer
from test_seen import by_layout, seen_pairs

from pasta_jax.decode.interpreter import Interpreter
from pasta_jax.decode.record import to_record
from pasta_jax.decode.scheduler import decode
from pasta_jax.decode.settings import DecodeError, Limits, SamplingConfig, StepFeatures
from pasta_jax.decode.trace import Trace, from_json, to_json
from pasta_jax.decode.views.live import LiveView
from pasta_jax.decode.views.pieces import pieces
from pasta_jax.decode.views.timeline import timeline_html, timeline_svg
from pasta_jax.lang.forms import Forms
from pasta_jax.lang.head import head
from pasta_jax.lang.positions import PositionRule
from pasta_jax.lang.program import Program, Promise, reading_order
from pasta_jax.lang.syntax import parse
from pasta_jax.lang.thread import read_all, walk
from pasta_jax.lang.vocabulary import Vocabulary

RULE = PositionRule()
WORDS = Vocabulary(ByteTokenizer(), base_size=265, promise="head")


def saved(program: Program) -> dict:
  """The trace of a whole response, as files have it."""
  main = WORDS.encode(program, RULE)
  rows, found = [], list(walk(main))
  parents = {id(f.child): (i, f, k) for i, t in enumerate(found) for k, f in enumerate(t.forks)}
  readings = read_all(main, WORDS.table)
  for thread in found:
    parent, fork, ordinal = parents.get(id(thread), (-1, None, 0))
    n = len(thread.tokens)
    rows.append(dict(
      path=[*rows[parent]["path"], ordinal] if fork else [], parent=parent,
      topic=WORDS.about(readings[parent], fork.at) if fork else "", declared=fork.declared if fork else None,
      fork_index=fork.at if fork else -1, tokens=list(thread.tokens), positions=list(range(n)),
      rounds=list(range(1, n + 1)), finished=True,
    ))  # fmt: skip
  facts = {"steps": 9, "finish_reason": "stop", "refused": 0, "prompt": [1], "promise": "head"}
  return facts | {"threads": rows}


SOURCE = "Tips:\n1. **Light**:<promise/><async> use lamps</async>\n2. Heat -<promise/><async> turn it <b>\ndown</async>"


def test_views_name_chunks_by_their_heads():
  trace = from_json(saved(parse(SOURCE)), WORDS, RULE)
  assert [t.topic for t in trace.threads] == ["", "1. **Light**:", "2. Heat -"]
  assert from_json(to_json(trace), WORDS.speaking(Forms()), RULE).text == trace.text  # the file says its form
  assert trace.text == reading_order(parse(SOURCE)) and trace.ill_formed == 0
  kinds = [(p.kind, p.text, p.declared) for p in pieces(trace, 0, WORDS)]
  assert kinds == [
    ("text", "Tips:\n1. **Light**:", None),
    ("promise", "", 20),
    ("text", "\n2. Heat -", None),
    ("promise", "", 20),
  ]
  for visibility in ("promise", "live"):
    other = dataclasses.replace(trace, visibility=visibility)
    np.testing.assert_array_equal(seen_pairs(timeline_svg(other, WORDS)), by_layout(other, WORDS))
  page = timeline_html(trace, WORDS)
  assert "1. **Light**:" in page and "2. Heat -" in page and "untitled" not in page
  console = Console(width=100, height=30, record=True, force_terminal=True, file=open("/dev/null", "w"))
  console.print(LiveView(WORDS, console).frame(trace, 1.0))
  shown = console.export_text()
  assert "1. **Light**:⟨20⟩" in shown and "✓ 2. Heat -" in shown


@pytest.mark.parametrize(
  ("one", "other", "twice"),
  [("- Light:", "2. light -", True), ("- Light:", "- Heat:", False), ("-", "-", False)],
)
def test_a_record_says_whether_a_head_comes_twice(one: str, other: str, twice: bool):
  source = f"{one}<promise/><async> a</async>\n{other}<promise/><async> b</async>"
  assert to_record(from_json(saved(parse(source)), WORDS, RULE), WORDS).topic_twice == twice


LIMITS = Limits(max_new_tokens=80, max_depth=3, branch_widths=(4,), kv_buckets=(128,))


@pytest.fixture(scope="module")
def run() -> Interpreter:
  features = StepFeatures(promise="head", visibility="live")
  return Interpreter(tiny.model(), tiny.VOCABULARIES["head", "digits"], LIMITS, features)


def before_promises(trace: Trace, number: int) -> list[str]:
  """The words of thread `number` before each of its promises, told without the automaton's table."""
  automaton, out = tiny.Automaton(number == 0, True, "head"), []
  for i, token in enumerate(trace.threads[number].tokens):
    if (i or number == 0) and automaton.feed(int(token)) == "fork":
      out.append(tiny.words(t for t in automaton.topic if t < tiny.TinyTokenizer.vocab_size))
  return out


def test_decoded_threads_are_named_by_what_stands_before_them(run: Interpreter):
  promises = 0
  for seed in range(12):
    run.params = tiny.weights(seed, promise="head")
    trace = decode(run, [3, 4], SamplingConfig(temperature=1.0, seed=seed))
    for thread in trace.threads[1:]:
      siblings = [t for t in trace.threads if t.parent == thread.parent]
      text = before_promises(trace, thread.parent)[siblings.index(thread)]
      assert thread.topic == head(text)
      promises += 1
    assert all(p.topic is None for p in trace.program if isinstance(p, Promise))
    assert trace.finish_reason != "stop" or trace.ill_formed == 0, "a guarded promise has a head"
    again = from_json(json.loads(json.dumps(to_json(trace))), run.vocabulary, RULE)
    assert again.program == trace.program and again.ill_formed == trace.ill_formed
    assert [t.topic for t in again.threads] == [t.topic for t in trace.threads]
    assert np.array_equal(again.threads[0].tokens, trace.threads[0].tokens)
  assert promises >= 10


def test_vocabulary_and_step_are_of_one_form():
  with pytest.raises(DecodeError, match="^the promises of this vocabulary are of the form topic/digits$"):
    Interpreter(tiny.model(), tiny.VOCABULARY, LIMITS, StepFeatures(promise="head"))
