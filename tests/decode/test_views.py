"""The views of a response: the timeline's SVG and HTML, the live terminal view, the table of figures."""

import dataclasses
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from pasta_jax.decode.trace import ThreadTrace, Trace
from pasta_jax.decode.views.live import LiveView, figures_table
from pasta_jax.decode.views.pieces import joins, pieces
from pasta_jax.decode.views.timeline import timeline_html, timeline_svg
from pasta_jax.lang.cost import clocks, cost
from pasta_jax.lang.layout import layout
from pasta_jax.lang.positions import PositionRule
from pasta_jax.lang.program import Promise, Sync, Text, promises
from pasta_jax.lang.thread import Fork, Thread, read
from pasta_jax.lang.vocabulary import Vocabulary

RULE = PositionRule("pred_10x")


class WordTokenizer:
  """Words with the blank before them, single digits, single other characters; ids in order of appearance."""

  vocab_size = 4096
  eos_id = 0
  special_ids = frozenset({0})

  def __init__(self):
    self.texts = ["<eos>", *"0123456789"]
    self.ids = {t: i for i, t in enumerate(self.texts)}

  def encode(self, text: str) -> list[int]:
    out = []
    for part in re.findall(r" ?[^\W\d_]+| |\d|[^ \d]", text):
      if part not in self.ids:
        self.ids[part] = len(self.texts)
        self.texts.append(part)
      out.append(self.ids[part])
    return out

  def token_bytes(self, token: int) -> bytes:
    return self.texts[token].encode()

  def digit_values(self) -> dict[int, tuple[int, int]]:
    return {1 + d: (d, 10) for d in range(10)}


VOCABULARY = Vocabulary(WordTokenizer())


def cut(thread: Thread, clock_of: dict[int, np.ndarray], last: int) -> Thread:
  """The thread as it is when round `last` has been written."""
  n = int((clock_of[id(thread)] <= last).sum())
  forks = (Fork(f.at, f.declared, cut(f.child, clock_of, last)) for f in thread.forks)
  return Thread(thread.tokens[:n], tuple(f for f in forks if f.child.tokens))


def as_trace(
  program, last: int | None = None, declared: dict[str, int] | None = None, finish_reason: str | None = None
) -> Trace:
  """What the interpreter would trace for a program, up to round `last`; `declared` overrides numbers."""
  whole = VOCABULARY.encode(program, RULE)
  found: list[tuple[Thread, tuple[int, ...], int | None, int, Thread | None]] = []

  def visit(thread, path, number, at, parent):
    found.append((thread, path, number, at, parent))
    for i, f in enumerate(thread.forks):
      visit(f.child, (*path, i), f.declared, f.at, thread)

  visit(whole, (), None, -1, None)
  times = [c.copy() for c in clocks(whole, VOCABULARY.tags.sync)[0]]
  placed = layout(whole, RULE, VOCABULARY.table)
  positions = [placed.positions[placed.threads == i] for i in range(len(found))]
  for (thread, *_), time in zip(found, times):
    for i, token in enumerate(thread.tokens):
      if token == VOCABULARY.tags.sync and i:
        time[i] = time[i - 1] + 1  # it is chosen at once, and waits to be read back
  end = max(int(t[-1]) for t in times)
  last = end if last is None else last
  order = sorted(range(len(found)), key=lambda k: (k > 0, int(times[k][0])))
  clock_of = {id(f[0]): t for f, t in zip(found, times)}
  topics = ["", *(p.topic for p in promises(program))]
  threads: list[ThreadTrace] = []
  number_of: dict[int, int] = {}
  for k in order:
    thread, path, number, at, parent = found[k]
    n = int((times[k] <= last).sum())
    if not n and parent is not None:
      continue
    topic = topics[k]
    number_of[id(thread)] = len(threads)
    threads.append(
      ThreadTrace(
        number=len(threads),
        path=path,
        parent=-1 if parent is None else number_of[id(parent)],
        topic=topic,
        declared=(declared or {}).get(topic, number),
        fork_index=at,
        tokens=np.asarray(thread.tokens[:n], np.int32),
        positions=positions[k][:n],
        entries=np.arange(n, dtype=np.int32),
        rounds=times[k][:n],
        read_in=times[k][:n] + 1,
        steps=times[k][:n],
        log_p=np.zeros(n, np.float32),
        finished=n == len(thread.tokens),
      )
    )
  main = cut(whole, clock_of, last)
  readings = [
    read(Thread(tuple(t.tokens.tolist())), VOCABULARY.table, is_main=t.number == 0) for t in threads
  ]
  return Trace(
    threads=tuple(threads),
    readings=tuple(readings),
    prompt=np.zeros(3, np.int32),
    main=main,
    program=VOCABULARY.decode(main, RULE),
    steps=min(last, end) + 7,
    finish_reason=finish_reason or ("stop" if last >= end else "unfinished"),
    cost=cost(main, VOCABULARY.table),
    ill_formed=sum(r.malformed for r in readings),
    refused=0,
    logits=None,
  )


TRIP = (
  Text("Here is a plan for a long weekend in Lisbon on a small budget. "),
  Promise(
    "getting there",
    None,
    (
      Text(
        "**Getting there.** Book the early flight on Friday, which is often half the price of the evening "
        "one. From the airport the red metro line reaches the centre in twenty minutes, and a day ticket "
        "covers trams and funiculars as well."
      ),
    ),
  ),
  Text("\n\n"),
  Promise(
    "where to stay",
    None,
    (
      Text(
        "**Where to stay.** Look for a guesthouse in Graça or Anjos: quiet streets, honest prices, and ten "
        "minutes on foot to the old town."
      ),
    ),
  ),
  Text("\n\n"),
  Promise(
    "food",
    None,
    (
      Text("**Food.** Two rules save both money and disappointment.\n"),
      Promise(
        "lunch",
        None,
        (
          Text(
            "- At noon, ask for the *prato do dia*: soup, a main dish, bread and coffee for about 10 euros.\n"
          ),
        ),
      ),
      Promise(
        "pastry shops",
        None,
        (
          Text(
            "- For breakfast, stand at the counter of a neighbourhood pastry shop; the same custard tart "
            "costs twice as much beside a monument.\n"
          ),
        ),
      ),
      Sync(),
      Text("Between the two you will hardly need dinner."),
    ),
  ),
  Text("\n\n"),
  Promise(
    "sights",
    None,
    (
      Text(
        "**Sights.** Spend the first day in Alfama and at the castle, the second in Belém, and keep the last "
        "morning for the tile museum. Churches and viewpoints are free, and the best light is an hour before "
        "sunset, when the river turns to brass and the whole city seems to be out on its terraces."
      ),
    ),
  ),
  Text("\n\n"),
  Sync(),
  Text("Taken together, three days cost about 260 euros a person. "),
  Promise(
    "risks", None, (Text("**One caution.** Trams are crowded in June, so keep your bag in front of you."),)
  ),
  Text(" If money is short, drop the museum first and keep the lunches."),
)
TRIP_DECLARED = {"where to stay": 20, "sights": 90}


def with_chunks(n: int) -> tuple:
  """A program of n chunks, every third of which promises one of its own."""
  nodes: list = [Text("An answer with some parts. ")]
  left = n
  for i in range(n):
    if not left:
      break
    left -= 1
    length = 1 + i % 4
    body = [Text(f"Part {i} says a number of things, " + "one after another and at some length, " * length)]
    if i % 3 == 2 and left:
      left -= 1
      body += [Promise(f"nested below {i}", None, (Text("A remark. " * 3),)), Sync(), Text("So much for it.")]
    nodes += [Promise(f"part {i}", None, tuple(body)), Text("\n")]
  return (*nodes, Sync(), Text("That is all."))


def random_trace(seed: int) -> Trace:
  """A trace whose threads hold any tokens, tags in any order."""
  rng = np.random.default_rng(seed)
  base = as_trace(TRIP, 40)
  anything = [*VOCABULARY.tags.ids, *VOCABULARY.tags.eos, 1, 2, 3, *range(11, 30)]
  threads = []
  for t in base.threads:
    threads.append(dataclasses.replace(t, tokens=rng.choice(anything, t.length).astype(np.int32)))
  return dataclasses.replace(base, threads=tuple(threads))


def find(svg: str, name: str) -> list[ElementTree.Element]:
  """Elements of the SVG that carry a class."""
  return [e for e in ElementTree.fromstring(svg).iter() if name in e.get("class", "").split()]


def screen(view, width: int, height: int) -> list[str]:
  console = Console(width=width, height=height, file=io.StringIO(), force_terminal=True, color_system=None)
  console.print(view, end="")
  return console.file.getvalue().splitlines()


@pytest.fixture(scope="module")
def trip() -> Trace:
  return as_trace(TRIP, declared=TRIP_DECLARED)


# What threads say.


def test_pieces_of_a_growing_main_thread():
  whole = as_trace(TRIP)
  first = next(t for t in whole.threads if t.number == 1)
  opened = int(whole.threads[0].rounds[first.fork_index])
  before, after = (pieces(as_trace(TRIP, opened + k), 0, VOCABULARY)[1] for k in (-1, 1))
  assert (before.kind, before.closed, before.text) == ("promise", False, "getting there")
  assert (after.kind, after.closed, after.text, after.child, after.declared) == (
    "promise",
    True,
    "getting there",
    1,
    first.declared,
  )


def test_pieces_say_what_the_program_says(trip):
  def text(number):
    parts = []
    for p in pieces(trip, number, VOCABULARY):
      parts.append(p.text if p.kind == "text" else text(p.child) if p.kind == "promise" else "")
    return "".join(parts)

  assert text(0) == trip.text


def test_joins_name_the_sync_of_the_thread_that_promised(trip):
  by_topic = {t.topic: t.number for t in trip.threads}
  joined = joins(trip, VOCABULARY)
  assert {trip.threads[c].topic for c, (by, _) in joined.items() if by == 0} == {
    "getting there",
    "where to stay",
    "food",
    "sights",
  }
  assert {trip.threads[c].topic for c, (by, _) in joined.items() if by == by_topic["food"]} == {
    "lunch",
    "pastry shops",
  }
  assert by_topic["risks"] not in joined
  for number, (by, at) in joined.items():
    assert trip.threads[by].tokens[at] == VOCABULARY.tags.sync
    assert trip.threads[number].finished


def test_a_parents_sync_joins_what_a_chunk_left_unjoined():
  trace = as_trace((Promise("a", None, (Text("x"), Promise("b", None, (Text("y"),)))), Sync(), Text("z")))
  sync = trace.threads[0].tokens.tolist().index(VOCABULARY.tags.sync)
  assert joins(trace, VOCABULARY) == {1: (0, sync), 2: (0, sync)}


# The timeline.


def test_svg_has_a_lane_a_promise_and_a_join_for_each(trip):
  svg = timeline_svg(trip, VOCABULARY)
  assert sorted(int(e.get("data-thread")) for e in find(svg, "lane")) == [t.number for t in trip.threads]
  assert {int(e.get("data-thread")) for e in find(svg, "fork")} == {t.number for t in trip.threads[1:]}
  assert {int(e.get("data-thread")) for e in find(svg, "join")} == set(joins(trip, VOCABULARY))
  assert len(find(svg, "sync")) == 2
  assert len(find(svg, "cell")) == trip.cost.total_tokens
  texts = "".join(ElementTree.fromstring(svg).itertext())
  c = trip.cost
  for value in (c.total_tokens, trip.steps, c.longest_path, f"{c.theoretical_parallelism:.2f}×"):
    assert str(value) in texts


def test_svg_shows_lengths_against_the_reserve(trip):
  svg = timeline_svg(trip, VOCABULARY)
  stay, sights = (next(t for t in trip.threads if t.topic == n) for n in ("where to stay", "sights"))
  assert len(find(svg, "over")) == stay.length - stay.declared
  texts = "".join(ElementTree.fromstring(svg).itertext())
  assert f"{sights.declared - sights.length} more reserved" in texts
  assert f"{sights.length} tokens, {sights.declared} reserved" in texts


def test_curves_begin_and_end_where_the_tokens_are(trip):
  svg = timeline_svg(trip, VOCABULARY)
  lanes = {
    int(e.get("data-thread")): [c for c in e.iter() if "cell" in c.get("class", "").split()]
    for e in find(svg, "lane")
  }
  for edge in find(svg, "fork"):
    child = trip.threads[int(edge.get("data-thread"))]
    end_x = float(re.findall(r"-?[\d.]+", edge.get("d"))[-2])
    assert end_x == pytest.approx(float(lanes[child.number][0].get("x")), abs=0.02)
  for number, (by, at) in joins(trip, VOCABULARY).items():
    edge = next(e for e in find(svg, "join") if e.get("data-thread") == str(number))
    x = float(re.search(r"Q([\d.]+)", edge.get("d"))[1])
    assert x == pytest.approx(float(lanes[by][at + 1].get("x")), abs=0.02)


HOSTILE = '<script>alert("&")</script> ]]> \x1b[31m \x00\uffff'


@pytest.mark.parametrize("build", [timeline_svg, timeline_html])
def test_text_is_escaped(build):
  topic = '<script>&" topic'
  trace = as_trace((Text(HOSTILE), Promise(topic, None, (Text(HOSTILE),)), Sync(), Text("&amp;")))
  out = build(trace, VOCABULARY)
  assert out.count("<script") == 1 and "<script>alert" not in out and "\x1b" not in out and "\x00" not in out
  assert topic in "".join(ElementTree.fromstring(out.removeprefix("<!DOCTYPE html>\n")).itertext())


def test_html_holds_the_answer_in_reading_order(trip):
  out = timeline_html(trip, VOCABULARY)
  page = ElementTree.fromstring(out.removeprefix("<!DOCTYPE html>\n"))
  assert "".join(page.find(".//article").itertext()) == trip.text
  assert len([e for e in page.iter("span") if "chunk" in e.get("class")]) == len(trip.threads) - 1
  assert not re.search(r"(src|href)=|@import|url\(", out)


@pytest.mark.parametrize("last", [0, 1, 23, 24, 60, 110, 140])
def test_timeline_of_a_response_so_far(last):
  trace = as_trace(TRIP, last)
  svg = timeline_svg(trace, VOCABULARY)
  assert len(find(svg, "lane")) == len(trace.threads)
  assert len(find(svg, "cell")) == sum(t.length for t in trace.threads)
  waits = trace.threads[0].tokens.size and trace.threads[0].tokens[-1] == VOCABULARY.tags.sync
  main = next(e for e in find(svg, "lane") if e.get("data-thread") == "0")
  assert any("wait" in e.get("class", "").split() for e in main.iter()) or not waits
  ElementTree.fromstring(timeline_html(trace, VOCABULARY).removeprefix("<!DOCTYPE html>\n"))


@pytest.mark.parametrize("seed", range(8))
def test_views_take_any_tokens(seed):
  trace = random_trace(seed)
  ElementTree.fromstring(timeline_svg(trace, VOCABULARY))
  ElementTree.fromstring(timeline_html(trace, VOCABULARY).removeprefix("<!DOCTYPE html>\n"))
  assert screen(LiveView(VOCABULARY).frame(trace, 1.0), 80, 24)


# The terminal.


@pytest.mark.parametrize("width", [20, 40, 80, 140])
@pytest.mark.parametrize("height", [3, 8, 24, 50])
def test_live_view_fits_the_terminal(width, height):
  for chunks in (0, 1, 3, 8, 16):
    whole = as_trace(with_chunks(chunks))
    for share in (0, 0.3, 0.6, 0.9, 1):
      last = int(share * whole.cost.longest_path)
      lines = screen(LiveView(VOCABULARY).frame(as_trace(with_chunks(chunks), last), 2.0), width, height)
      assert len(lines) < height or height == 1
      assert max(cell_len(line) for line in lines) <= width


def test_live_view_shows_every_chunk_where_there_is_room():
  trace = as_trace(TRIP, 75, declared=TRIP_DECLARED)
  shown = "\n".join(screen(LiveView(VOCABULARY).frame(trace, 2.0), 140, 40))
  for t in trace.threads[1:]:
    assert t.topic in shown and f"{t.length}/{t.declared}" in shown
  for text in (
    "⟨sights · 70⟩",
    "waits for its chunks",
    "✓ where to stay",
    "▸ sights",
    f"{trace.cost.total_tokens} tokens",
    f"{trace.steps} steps",
  ):
    assert text in shown


def test_finished_chunks_make_room_for_those_that_are_written():
  trace = as_trace(with_chunks(16), 110)
  shown = "\n".join(screen(LiveView(VOCABULARY).frame(trace, 2.0), 80, 24))
  for t in trace.threads[1:]:
    assert t.finished or f"{t.length}/{t.declared}" in shown


def test_live_view_obeys_no_control_characters():
  shown = "\n".join(screen(LiveView(VOCABULARY).frame(as_trace((Text(HOSTILE + "[bold]"),)), 1.0), 80, 24))
  assert "\x1b" not in shown and "[bold]" in shown and "\\x1b[31m" in shown


def test_live_view_leaves_nothing_behind(trip):
  def run(**options):
    out = io.StringIO()
    console = Console(file=out, width=80, height=24, **options)
    with LiveView(VOCABULARY, console, frames_per_second=1e9) as view:
      for last in range(0, 160, 20):
        view.update(as_trace(TRIP, last))
      view.update(trip, 3.0)
    return out.getvalue()

  assert run(force_terminal=False) == ""
  written = run(force_terminal=True, legacy_windows=False, color_system=None, _environ={"TERM": "xterm"})
  assert "main thread" in written
  assert written.rstrip().endswith("\x1b[2K")  # the last frame's lines are erased


def test_live_view_skips_frames_that_come_too_fast(trip):
  drawn, now = [], [0.0]
  console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True, _environ={"TERM": "xterm"})
  with LiveView(VOCABULARY, console, frames_per_second=10, clock=lambda: now[0]) as view:
    view.frame = lambda trace, seconds: drawn.append(seconds) or "…"
    for _ in range(10):
      now[0] += 0.05
      view.update(as_trace(TRIP, 30))
    view.update(trip)
  assert 4 <= len(drawn) <= 7 and drawn[-1] == pytest.approx(0.5)


def test_figures_table_holds_the_figures(trip):
  c = trip.cost
  shown = "\n".join(screen(figures_table(trip, 7.42, 1.61, ("int8", "numba")), 100, 40))
  for name, value in [
    ("Tokens", c.total_tokens),
    ("Shown to the reader", c.text_tokens),
    ("Promises", c.n_promises),
    ("Peak parallelism", c.peak_parallelism),
    ("Decode steps", trip.steps),
    ("Longest path", c.longest_path),
    ("Theoretical parallelism", f"{c.theoretical_parallelism:.2f}×"),
    ("Wall clock", "7.42 s"),
    ("Same-text speedup", "1.61×"),
    ("Precision", "int8"),
    ("Finish reason", "stop"),
    ("Ill-formed tags", 0),
  ]:
    assert re.search(rf"{name} +{re.escape(str(value))}(\s|$)", shown), name
  before, shown = shown, "\n".join(screen(figures_table(trip, 7.42), 100, 40))
  assert "kernels: numba" in before
  assert "Same-text" not in shown and "Precision" not in shown
