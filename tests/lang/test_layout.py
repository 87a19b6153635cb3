"""Visibility, positions, targets and clocks, each against an independent reading of docs/language.md.

The golden dump shows one nested example token by token. To write it anew after an intended change, run
this file's tests with PASTA_UPDATE_GOLDEN=1 and review the difference.
"""

import dataclasses
import functools
import math
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_language import BYTES, programs

from pasta_jax.lang.cost import clocks, cost
from pasta_jax.lang.layout import NO_TARGET, Layout, layout
from pasta_jax.lang.positions import ORACLES, STRATEGIES, PositionRule, span
from pasta_jax.lang.program import Text, reading_order
from pasta_jax.lang.syntax import parse
from pasta_jax.lang.thread import Fork, Thread, serialise, walk
from pasta_jax.lang.visibility import is_visible, is_visible_live

GOLDEN = Path(__file__).parents[1] / "golden"
RELAXED = settings(deadline=None)
TAGS = BYTES.tags
SYNC = TAGS.sync
PROMPT = (63, 58)

# Random trees of threads. A promise is its last token only: nothing here reads the topic.

_LEAF = st.sampled_from(["text", "text", "sync", "sync"])
_BODY = st.recursive(
  st.lists(_LEAF, max_size=5),
  lambda body: st.lists(_LEAF | st.tuples(st.none() | st.integers(0, 35), st.booleans(), body), max_size=6),
  max_leaves=30,
)


def _thread(body, head: tuple[int, ...], tail: tuple[int, ...], cut: bool) -> Thread:
  tokens, forks = list(head), []
  for item in body:
    if isinstance(item, str):
      tokens.append(SYNC if item == "sync" else ord("x"))
      continue
    declared, ends, below = item
    tokens.append(TAGS.close)
    child_tail = (TAGS.end,) if ends or not cut else ()
    forks.append(Fork(len(tokens) - 1, declared, _thread(below, (TAGS.async_,), child_tail, cut)))
  return Thread((*tokens, *tail), tuple(forks))


def trees(cut: bool = True):
  """Main threads. With `cut`, some chunks have no last token, as in a response that met a limit."""
  return _BODY.map(lambda body: _thread(body, (), (TAGS.eos[0],), cut))


class Tree:
  """What the tests need to know of a tree, gathered without the code under test.

  Threads are numbered in order of promises; `place[n][i]` is the serialised index of own token i of thread n.
  """

  def __init__(self, main: Thread, prompt: int = len(PROMPT)):
    self.threads: list[Thread] = []
    self.parent: list[tuple[int, Fork] | None] = []
    self.place: list[list[int]] = []
    self.extent: list[tuple[int, int]] = []  # [o, c)
    self.at = prompt
    self._lay(main, None)

  def _lay(self, thread: Thread, parent):
    n = len(self.threads)
    self.threads.append(thread)
    self.parent.append(parent)
    self.place.append([])
    self.extent.append((self.at, self.at))
    for i in range(len(thread.tokens)):
      self.place[n].append(self.at)
      self.at += 1
      for f in thread.forks:
        if f.at == i:
          self._lay(f.child, (n, f))
    self.extent[n] = (self.extent[n][0], self.at)

  def joiner(self, n: int) -> int | None:
    """Serialised index of the sync that joins chunk n: its thread's next one, or else its adopter's."""
    if self.parent[n] is None:
      return None
    thread, fork = self.parent[n]
    later = (i for i, t in enumerate(self.threads[thread].tokens) if i > fork.at and t == SYNC)
    own = next(later, None)
    return self.joiner(thread) if own is None else self.place[thread][own]

  def joined_by(self, thread: int, i: int) -> list[int]:
    return [n for n in range(1, len(self.threads)) if self.joiner(n) == self.place[thread][i]]


def visible_matrix(laid: Layout) -> np.ndarray:
  t = np.arange(len(laid))
  return is_visible(t[:, None], t[None, :], laid.masked_intervals[None])


def live_matrix(laid: Layout) -> np.ndarray:
  t = np.arange(len(laid))
  return is_visible_live(t[:, None], t[None, :], laid.rounds[:, None], laid.rounds[None])


# Visibility.


@RELAXED
@given(main=trees())
def test_visibility_is_that_of_the_definition(main: Thread):
  """A query at q sees a key at k iff k <= q and for no chunk that contains k: c <= q < j."""
  laid = layout(main, PositionRule(), BYTES.table, PROMPT)
  tree = Tree(main)
  expected = np.tri(len(laid), dtype=bool)
  for n in range(1, len(tree.threads)):
    (o, c), j = tree.extent[n], tree.joiner(n)
    expected[c : len(laid) if j is None else j, o:c] = False
  np.testing.assert_array_equal(visible_matrix(laid), expected)


@RELAXED
@given(main=trees())
def test_visibility_is_that_of_rows_forked_and_joined(main: Thread):
  """A fork copies the parent's row, a join ORs the children's rows into it, a thread adds what it writes."""
  laid = layout(main, PositionRule(), BYTES.table, PROMPT)
  tree = Tree(main)
  numbers = {id(t): n for n, t in enumerate(tree.threads)}
  seen: dict[int, frozenset[int]] = {}

  def run(thread: Thread, row: frozenset[int]) -> list[frozenset[int]]:
    """Rows that whoever joins the thread gets: its own, and those of the chunks that it leaves unjoined."""
    n, waiting = numbers[id(thread)], []
    for i, token in enumerate(thread.tokens):
      if token == SYNC:
        row, waiting = row.union(*waiting), []
      row = row | {tree.place[n][i]}
      seen[tree.place[n][i]] = row
      for f in thread.forks:
        if f.at == i:
          waiting += run(f.child, row)
    return [row, *waiting]

  run(main, frozenset(range(len(PROMPT))))
  for q, row in seen.items():
    assert set(np.flatnonzero(visible_matrix(laid)[q])) == row


def test_is_visible_is_the_same_in_jax():
  laid = layout(golden_example(), PositionRule(), BYTES.table, PROMPT)
  t = np.arange(len(laid))
  in_jax = is_visible(
    jnp.asarray(t)[:, None], jnp.asarray(t)[None, :], jnp.asarray(laid.masked_intervals)[None]
  )
  np.testing.assert_array_equal(in_jax, visible_matrix(laid))


# Rounds, and visibility by them.


def play(tree: Tree) -> tuple[dict[tuple[int, int], int], np.ndarray]:
  """Plays a response round by round, as an interpreter with a branch for every thread.

  Returns ((thread, own index) -> round in which the token is read, `until` [M, M] after the last round): entry e of
  thread u can be seen by thread t if e < until[t, u], where entries are counted as they are read.
  """
  m, far = len(tree.threads), 10**9
  rounds: dict[tuple[int, int], int] = {}
  entries: dict[tuple[int, int], int] = {}
  at, born = [0] * m, [0] + [far] * (m - 1)
  until = np.zeros((m, m), np.int64)
  until[0, 0] = far
  children = {(tree.parent[n][0], tree.parent[n][1].at): n for n in range(1, m)}
  done = lambda n: at[n] == len(tree.threads[n].tokens)
  now = 2  # the last prompt token is read in round 1, and with it the first token is chosen
  while not all(done(n) for n in range(m)):
    reads = []
    for n in range(m):
      if born[n] > now or done(n):
        continue
      joined = tree.joined_by(n, at[n]) if tree.threads[n].tokens[at[n]] == SYNC else []
      if all(done(c) for c in joined):
        reads.append(n)
    forks = []
    for n in reads:
      rounds[n, at[n]], entries[n, at[n]] = now, len(entries)
      if (n, at[n]) in children:
        child = children[n, at[n]]
        born[child] = now + 1
        forks.append((child, n, entries[n, at[n]]))
    for c, p, f in forks:
      until[c] = until[p]
      until[c, p], until[c, c] = f + 1, far
    for c, p, f in forks:
      for t in range(m):
        if t != c:
          until[t, c] = far if until[t, p] > f else 0
    for n in reads:
      at[n] += 1
    now += 1
  seen = np.zeros((len(entries), len(entries)), bool)
  for (t, i), r in rounds.items():
    for (u, k), e in entries.items():
      seen[entries[t, i], e] = (t, i) == (u, k) or (rounds[u, k] < r and e < until[t, u])
  order = [entries[n, i] for n, i in sorted(entries, key=lambda own: tree.place[own[0]][own[1]])]
  return rounds, seen[np.ix_(order, order)]


@RELAXED
@given(main=trees(cut=False))
def test_rounds_and_live_visibility_are_those_of_a_response_played_round_by_round(main: Thread):
  """Who sees whom follows from `until`, a number for each pair of threads that forks alone change."""
  laid, tree = layout(main, PositionRule(), BYTES.table, PROMPT), Tree(main)
  rounds, seen = play(tree)
  for (n, i), r in rounds.items():
    assert laid.rounds[tree.place[n][i]] == r
  ours = live_matrix(laid)
  first = len(PROMPT)
  np.testing.assert_array_equal(ours[first:, first:], seen)
  assert ours[first:, :first].all() and laid.rounds[:first].tolist() == [0, 1]
  np.testing.assert_array_equal(ours[:first, :first], np.tri(first, dtype=bool))
  assert not (visible_matrix(laid) & ~ours).any()  # whoever is seen under `promise` is seen under `live`


@RELAXED
@given(main=trees())
def test_a_token_that_is_never_read_is_seen_by_nobody(main: Thread):
  laid, tree = layout(main, PositionRule(), BYTES.table, PROMPT), Tree(main)
  ours = live_matrix(laid)
  for n, thread in enumerate(tree.threads):
    if n and thread.tokens[-1] != TAGS.end:
      k = tree.place[n][-1]
      assert not np.delete(ours[:, k], k).any()


# Order and targets.


@RELAXED
@given(main=trees())
def test_serialised_order_and_threads(main: Thread):
  laid = layout(main, PositionRule(), BYTES.table, PROMPT)
  tree = Tree(main)
  assert list(walk(main)) == tree.threads
  assert len(laid) == len(PROMPT) + main.total_tokens == tree.at
  assert laid.masked_intervals.shape[1] == max(main.depth, 1)
  np.testing.assert_array_equal(laid.tokens[:2], PROMPT)
  np.testing.assert_array_equal(laid.positions[:2], [0, 1])
  np.testing.assert_array_equal(laid.index[:2], [-2, -1])
  for n, thread in enumerate(tree.threads):
    where = tree.place[n]
    assert tuple(laid.tokens[where]) == thread.tokens
    np.testing.assert_array_equal(laid.threads[where], n)
    np.testing.assert_array_equal(laid.index[where], np.arange(len(thread.tokens)))
  assert [laid.tokens[2 + k] for k in range(main.total_tokens)] == [t.tokens[i] for t, i in serialise(main)]


@RELAXED
@given(main=trees(), prompt=st.sampled_from([(), PROMPT]))
def test_targets_follow_threads(main: Thread, prompt: tuple[int, ...]):
  laid = layout(main, PositionRule(), BYTES.table, prompt)
  tree = Tree(main, len(prompt))
  expected = np.full(len(laid), NO_TARGET)
  for n, thread in enumerate(tree.threads):
    for i in range(1, len(thread.tokens)):
      expected[tree.place[n][i - 1]] = thread.tokens[i]
  if prompt:
    expected[len(prompt) - 1] = main.tokens[0]
  np.testing.assert_array_equal(laid.targets, expected)
  # Each token is learned once, but the interpreter's `<async>` and, without a prompt, the first.
  learned = (laid.targets != NO_TARGET).sum()
  assert learned == main.total_tokens - (len(tree.threads) - 1) - (not prompt)
  assert TAGS.async_ not in laid.targets
  assert (laid.targets[laid.tokens == TAGS.end] == NO_TARGET).all()


def test_prompt_may_be_an_array():
  with_list = layout(golden_example(), PositionRule(), BYTES.table, PROMPT)
  with_array = layout(golden_example(), PositionRule(), BYTES.table, np.array(PROMPT))
  for field in dataclasses.fields(Layout):
    np.testing.assert_array_equal(getattr(with_list, field.name), getattr(with_array, field.name))
    assert getattr(with_list, field.name).dtype == np.int32


# Positions.


def positions_of(tree: Tree, strategy: str, fixed: int) -> np.ndarray:
  """Positions by docs/language.md section 4, token by token, in the order in which they depend on each
  other."""

  @functools.cache
  def length(n: int) -> int:  # positions from a chunk's first token to after its last, under `oracle`
    return len(tree.threads[n].tokens) + sum(length(m) for m in children(n))

  def children(n: int) -> list[int]:
    return [m for m in range(len(tree.threads)) if tree.parent[m] is not None and tree.parent[m][0] == n]

  def gap(n: int) -> int:
    declared = tree.parent[n][1].declared
    if strategy in ("max", "sum"):
      return 0
    if strategy.startswith("oracle"):
      return length(n)
    if strategy == "fixed" or declared is None:
      return fixed
    return math.ceil(declared / 10) * 10 if strategy == "pred_10x" else declared

  positions = np.zeros(tree.at, int)
  positions[: tree.place[0][0] if tree.place[0] else tree.at] = np.arange(len(PROMPT))

  def run(n: int, position: int):
    for i, token in enumerate(tree.threads[n].tokens):
      joined = tree.joined_by(n, i) if token == SYNC else []
      if joined and strategy == "max":
        furthest = max(positions[tree.extent[m][0] : tree.extent[m][1]].max() for m in joined)
        position = max(position, furthest + 1)
      if joined and strategy == "sum":
        position += sum(len(tree.threads[m].tokens) for m in joined)
      positions[tree.place[n][i]] = position
      position += 1
      for m in children(n):
        if tree.parent[m][1].at == i:
          run(m, position)
          position += gap(m)

  run(0, len(PROMPT))
  return positions


@settings(deadline=None, max_examples=200)
@given(main=trees(), strategy=st.sampled_from(STRATEGIES), fixed=st.integers(0, 70))
def test_positions(main: Thread, strategy: str, fixed: int):
  laid = layout(main, PositionRule(strategy, fixed), BYTES.table, PROMPT)
  np.testing.assert_array_equal(laid.positions, positions_of(Tree(main), strategy, fixed))


@RELAXED
@given(program=programs(heads=False), strategy=st.sampled_from(["pred_10x", "pred_1x", *ORACLES]))
def test_positions_of_different_threads_do_not_meet_where_lengths_are_declared(program, strategy: str):
  """Encoded programs declare true lengths, so no two tokens share a position; the oracles leave no gap."""
  rule = PositionRule(strategy)
  main = BYTES.encode(program, rule)
  laid = layout(main, rule, BYTES.table, PROMPT)
  assert len(set(laid.positions)) == len(laid)
  if strategy in ORACLES:
    np.testing.assert_array_equal(laid.positions, np.arange(len(laid)))
    assert span(main, rule) == len(laid) - len(PROMPT)


@given(
  declared=st.lists(st.integers(-1, 999), min_size=1, max_size=8),
  fixed=st.integers(0, 100),
  strategy=st.sampled_from([s for s in STRATEGIES if s not in ORACLES]),
)
def test_gaps_of_arrays_are_those_of_integers(declared: list[int], fixed: int, strategy: str):
  rule = PositionRule(strategy, fixed)
  one_by_one = [rule.gap(d) for d in declared]
  np.testing.assert_array_equal(rule.gap(np.array(declared)), one_by_one)
  assert all(g >= 0 for g in one_by_one)


@pytest.mark.parametrize(
    ("strategy", "written", "gap_of_23", "gap_without_number"),
    [("pred_10x", 30, 30, 45), ("pred_1x", 21, 23, 45), ("fixed", None, 45, 45), ("oracle", None, 21, 21),
     ("oracle_10x", 30, 21, 21), ("oracle_1x", 21, 21, 21), ("max", 30, 0, 0), ("sum", 30, 0, 0)],
)  # fmt: skip
def test_rules(strategy: str, written: int | None, gap_of_23: int, gap_without_number: int):
  rule = PositionRule(strategy, fixed=45)
  assert rule.written(21) == written
  assert rule.written(20) in (20, None)
  assert (rule.gap(23, 21), rule.gap(-1, 21)) == (gap_of_23, gap_without_number)
  assert rule.at_sync(50, 0, 0) == 50
  assert rule.at_sync(50, 70, 9) == {"max": 70, "sum": 59}.get(strategy, 50)
  assert rule.at_sync(80, 70, 9) == {"sum": 89}.get(strategy, 80)


def test_unusable_rules():
  with pytest.raises(ValueError, match="position strategy 'pred' is none of pred_10x"):
    PositionRule("pred")
  for strategy in ORACLES:
    with pytest.raises(ValueError, match=f"'{strategy}' needs true lengths"):
      PositionRule(strategy).gap(10)
  assert {s for s in STRATEGIES if PositionRule(s).needs_lengths} == set(ORACLES)


# Cost.


def simulate(main: Thread) -> list[list[int]]:
  """Clocks from running all threads at once, one token each a step, as the interpreter does.

  A token's clock is the step before the one that reads it. A thread reads its last token and is done.
  """
  tree = Tree(main, 0)
  n = len(tree.threads)
  read_at = [[0] * len(t.tokens) for t in tree.threads]
  next_read, alive, done, joined = [0] * n, [i == 0 for i in range(n)], [False] * n, [False] * n
  owner = [-1 if p is None else p[0] for p in tree.parent]
  step, ended = 1, list(done)
  while not all(done[i] or not alive[i] for i in range(n)):
    step += 1
    born = []
    for i in [i for i in range(n) if alive[i] and not done[i]]:
      at, tokens = next_read[i], tree.threads[i].tokens
      mine = [m for m in range(n) if alive[m] and owner[m] == i and not joined[m]]
      if tokens[at] == SYNC:
        if not all(ended[m] for m in mine):
          continue
        for m in mine:
          joined[m] = True
      read_at[i][at] = step
      next_read[i] += 1
      born += [
        m
        for m in range(n)
        if tree.parent[m] is not None and tree.parent[m][0] == i and tree.parent[m][1].at == at
      ]
      done[i] = next_read[i] == len(tokens)
    for m in born:
      alive[m] = True
    for m in range(n):  # what a thread leaves unjoined passes to its parent
      while owner[m] > 0 and done[owner[m]]:
        owner[m] = owner[owner[m]]
    ended = list(done)  # a sync sees who was done when the step before it was over
  return [[r - 1 for r in reads] for reads in read_at]


@RELAXED
@given(main=trees(cut=False))
def test_clocks_are_those_of_a_machine_with_a_slot_for_every_branch(main: Thread):
  own, _ = clocks(main, SYNC)
  simulated = simulate(main)
  assert [list(c) for c in own] == simulated
  figures = cost(main, BYTES.table)
  flat = [c for cs in simulated for c in cs]
  assert figures.longest_path == max(flat)
  assert figures.peak_parallelism == max(map(flat.count, flat))
  assert figures.n_promises == len(simulated) - 1
  assert figures.total_tokens == len(flat)
  assert figures.total_tokens / figures.longest_path == len(flat) / max(flat)


@RELAXED
@given(program=programs(heads=False))
def test_text_tokens_are_those_of_the_reading_order(program):
  """A byte a token, so the text's bytes and the token that ends the response."""
  figures = cost(BYTES.encode(program, PositionRule()), BYTES.table)
  assert figures.text_tokens == len(reading_order(program).encode()) + 1


@given(text=st.text())
def test_plain_text_has_no_speedup(text: str):
  for finished in (True, False):
    main = BYTES.encode((Text(text),), PositionRule(), finished=finished)
    figures = cost(main, BYTES.table)
    assert figures.longest_path == len(main.tokens)
    assert figures.theoretical_parallelism == (1 if main.tokens else 0)
    assert figures.peak_parallelism == min(len(main.tokens), 1)


@pytest.mark.parametrize(
  ("source", "path"),
  [
    # Clocks: A 1, promise (tag, blank, topic, tag) 2-5, B 6, end 7; <async> 6, xyz 7-9, </async> 10.
    ('A<promise topic="t"/><async>xyz</async>B', 10),
    # The chunk's end is read back in step 11 and the sync after it; C 12, end 13.
    ('A<promise topic="t"/><async>xyz</async>B<sync/>C', 13),
    # A sync that comes late waits for nothing: B 6 to 15, sync 16, C 17, end 18.
    ('A<promise topic="t"/><async>xyz</async>BBBBBBBBBB<sync/>C', 18),
    # A sync that joins nothing costs its own step.
    ("A<sync/>B", 4),
    # Two chunks at once: the second is promised four steps later. <async> 9, y 10, </async> 11.
    ('<promise topic="t"/><async>x</async><promise topic="u"/><async>y</async>', 11),
    # The inner chunk outlives the outer one, and the main thread's sync waits for both: <async> 5,
    # promise 6 to 9, inner <async> and outer </async> 10, xyz 11 to 13, </async> 14, sync 15, end 16.
    ('<promise topic="t"/><async><promise topic="u"/><async>xyz</async></async><sync/>', 16),
  ],
)
def test_longest_path_by_hand(source: str, path: int):
  assert cost(BYTES.encode(parse(source), PositionRule("fixed")), BYTES.table).longest_path == path


def test_cost_of_nothing():
  figures = cost(Thread(()), BYTES.table)
  assert dataclasses.astuple(figures) == (0, 0, 0, 0, 0)
  assert figures.theoretical_parallelism == 0


# The golden dump.

SOURCE = (
  'I<promise topic="a"/><async>b<promise topic="c"/><async>d</async>e<sync/>E'
  '<promise topic="f"/><async>g</async></async>'
  '<promise topic="h"/><async>i</async>J<sync/>K<promise topic="l"/><async>m</async>N'
)


def golden_example() -> Thread:
  """A chunk with a chunk of its own that it joins (d), one that it leaves to the main thread (g), a chunk
  beside it (i), and one that no sync joins (m)."""
  return BYTES.encode(parse(SOURCE), PositionRule())


def dump(laid: Layout) -> str:
  """One line a token; hidden intervals as [from, to)."""
  rows = [("at", "token", "position", "thread", "index", "hidden from", "target")]
  label = lambda token: BYTES.label(int(token)).replace("\n", "\\n").replace(" ", "␣")
  for i in range(len(laid)):
    hidden = [f"[{a},{b})" for a, b in laid.masked_intervals[i] if a < b]
    target = "-" if laid.targets[i] == NO_TARGET else label(laid.targets[i])
    numbers = [str(field[i]) for field in (laid.positions, laid.threads, laid.index)]
    rows.append((str(i), label(laid.tokens[i]), *numbers, " ".join(hidden) or "-", target))
  widths = [max(map(len, column)) for column in zip(*rows)]
  return "".join("  ".join(map(str.ljust, row, widths)).rstrip() + "\n" for row in rows)


def test_golden_dump():
  found = dump(layout(golden_example(), PositionRule(), BYTES.table, PROMPT))
  path = GOLDEN / "nested.txt"
  if os.environ.get("PASTA_UPDATE_GOLDEN"):
    path.write_text(found, encoding="utf-8")
  assert found == path.read_text(encoding="utf-8")
