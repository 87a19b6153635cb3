"""Decoding in parallel says what a plain decoder would: random programs, two independent yardsticks.

The programs are what random models write (`tiny.weights`). Yardstick one is the training side: the finished
response, serialised by `lang.layout`, goes through one dense forward pass. Yardstick two is a decoder written
here in plain Python: one thread at a time, tags and guard restated, nothing of `pasta_jax.decode` used.
"""

import collections
import contextlib
import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import tiny
from hypothesis import given
from hypothesis import strategies as st

from pasta_jax.decode.interpreter import Interpreter
from pasta_jax.decode.scheduler import decode
from pasta_jax.decode.settings import Limits, SamplingConfig, StepFeatures
from pasta_jax.decode.trace import Trace
from pasta_jax.lang.cost import clocks
from pasta_jax.lang.layout import NO_TARGET, layout
from pasta_jax.lang.positions import PositionRule
from pasta_jax.lang.visibility import is_visible, is_visible_live
from pasta_jax.weights import build

LIMITS = Limits(
  max_new_tokens=80, max_threads=48, max_depth=3, max_topic=4, branch_widths=(4,), kv_buckets=(128,)
)
FIXED = 17  # no multiple of ten
# Of scores of about one; a storm's tag columns are eight times as large, and so is its rounding.
TOLERANCE = 1e-4
VOCABULARY = tiny.VOCABULARY
LENGTH_IDS = list(range(32, 96))  # of lengths that are tokens


@functools.cache
def interpreter(
  strategy: str, guard: bool, visibility: str = "promise", promise: str = "topic", number: str = "digits",
  length: str = "likeliest",
) -> Interpreter:  # fmt: skip
  """One for each static shape, so that examples share what was compiled."""
  features = StepFeatures(
    rule=PositionRule(strategy, FIXED), visibility=visibility, promise=promise, number=number, guard=guard,
    length=length, return_logits=True,
  )  # fmt: skip
  vocabulary = tiny.VOCABULARIES[promise, number]
  return Interpreter(tiny.model(tiny.CONFIGS[number]), vocabulary, LIMITS, features)


class Tally(collections.Counter):
  """What the programs of a test were like: a property over programs without promises would say little."""

  def add(self, trace: Trace):
    """Counts one response."""
    finished, promised = trace.finish_reason == "stop", len(trace.threads) > 1
    self["programs"] += 1
    self["finished"] += finished
    self["promises"] += promised
    self["nested"] += trace.main.depth > 1
    self["joins"] += joins(trace)
    self["finished with promises"] += finished and promised

  def require(self, **least: int):
    """Asserts that there were at least these numbers of programs."""
    for name, count in least.items():
      assert self[name.replace("_", " ")] >= count, f"fewer than {count} programs with {name}: {dict(self)}"


KINDS = st.sampled_from(["habits", "habits", "habits", "storm"])


def joins(trace: Trace) -> bool:
  """Whether a thread has gone on after a sync that joined a chunk."""
  syncs = {t.number: np.flatnonzero(t.tokens[:-1] == VOCABULARY.tags.sync) for t in trace.threads}
  return any((syncs[chunk.parent] > chunk.fork_index).any() for chunk in trace.threads[1:])


# Yardstick one: teacher forcing.


def chosen_at(thread, clock: np.ndarray) -> np.ndarray:
  """Rounds from clocks: a sync that waited was chosen at once, while its clock says when it went on."""
  at_once = np.append(1, clock[:-1] + 1)
  return np.where(thread.tokens == VOCABULARY.tags.sync, at_once, clock)


def check_teacher_forcing(
  params, trace: Trace, features: StepFeatures, tolerance: float = TOLERANCE, graph=tiny.GRAPH
):
  """Logits, log-probabilities, positions, rounds and targets of every token that the model chose."""
  rule = features.rule
  prompt = len(trace.prompt)
  laid = layout(trace.main, rule, VOCABULARY.table, trace.prompt.tolist())
  at = np.arange(len(laid))
  if features.live:
    visible = is_visible_live(at[:, None], at[None, :], laid.rounds[:, None], laid.rounds[None])
  else:
    visible = is_visible(at[:, None], at[None, :], laid.masked_intervals[None])
  dense = tiny.dense_logits(params, laid.tokens, laid.positions, visible, graph=graph)
  log_p = np.asarray(jax.nn.log_softmax(dense))
  names = dict(enumerate(path for path, _ in tiny.paths(trace.main)))
  place = {(names[laid.threads[i]], int(laid.index[i])): i for i in range(prompt, len(laid))}
  assert len(place) == sum(t.length for t in trace.threads) == len(laid) - prompt
  assert sorted(names.values()) == sorted(t.path for t in trace.threads)
  clock = dict(zip(names.values(), clocks(trace.main, VOCABULARY.tags.sync)[0]))
  targets = np.full(len(laid), NO_TARGET)
  for thread in trace.threads:
    np.testing.assert_array_equal(thread.rounds, chosen_at(thread, clock[thread.path]))
    for k, token in enumerate(thread.tokens):
      i = place[thread.path, k]
      assert laid.tokens[i] == token
      if thread.entries[k] >= 0:
        assert laid.rounds[i] == thread.read_in[k], f"round of token {k} of thread {thread.path}"
      # A sync that still waits has no final position yet where the strategy decides it by what is joined.
      if not (thread.entries[k] < 0 and token == VOCABULARY.tags.sync and rule.strategy in ("max", "sum")):
        assert laid.positions[i] == thread.positions[k], f"position of token {k} of thread {thread.path}"
      if k == 0 and thread.path:
        assert token == VOCABULARY.tags.async_ and np.isnan(thread.log_p[0])
        continue
      before, entry = (place[thread.path, k - 1], thread.entries[k - 1]) if k else (prompt - 1, prompt - 1)
      np.testing.assert_allclose(trace.logits[entry], dense[before], atol=tolerance, rtol=tolerance)
      np.testing.assert_allclose(thread.log_p[k], log_p[before, token], atol=tolerance, rtol=tolerance)
      targets[before] = token
  np.testing.assert_array_equal(laid.targets, targets)


@pytest.mark.parametrize(
  "strategy,guard,temperature,n,visibility,promise",
  [
    ("pred_10x", True, 0.0, 30, "promise", "topic"),
    ("pred_10x", True, 1.0, 40, "promise", "topic"),
    ("pred_10x", False, 0.0, 30, "promise", "topic"),
    ("pred_10x", False, 1.0, 40, "promise", "topic"),
    ("pred_1x", True, 0.0, 30, "promise", "topic"),
    ("fixed", True, 0.0, 30, "promise", "topic"),
    ("max", True, 0.0, 30, "promise", "topic"),
    ("max", False, 1.0, 30, "promise", "topic"),
    ("sum", True, 0.0, 30, "promise", "topic"),
    ("sum", False, 1.0, 30, "promise", "topic"),
    ("pred_10x", True, 1.0, 40, "live", "topic"),
    ("pred_10x", False, 1.0, 40, "live", "topic"),
    ("fixed", True, 0.0, 20, "live", "topic"),
    ("max", False, 1.0, 20, "live", "topic"),
    ("sum", True, 0.0, 20, "live", "topic"),
    ("pred_10x", True, 1.0, 30, "promise", "head"),
    ("max", False, 1.0, 20, "promise", "head"),
    ("pred_10x", True, 1.0, 30, "live", "head"),
    ("pred_10x", False, 1.0, 30, "live", "head"),
    ("fixed", True, 0.0, 20, "live", "head"),
    ("pred_10x", True, 0.0, 20, "promise", "topic/token"),
    ("pred_10x", True, 1.0, 30, "live", "head/token"),
    ("max", False, 1.0, 20, "live", "topic/token"),
    ("sum", False, 0.0, 20, "promise", "head/token"),
  ],
)
def test_decoding_agrees_with_one_dense_forward(strategy, guard, temperature, n, visibility, promise):
  promise, _, number = promise.partition("/")
  run = interpreter(strategy, guard, visibility, promise, number := number or "digits")
  salt = zlib.crc32(f"{strategy} {guard} {temperature}".encode())  # other programs for each case

  def check(tally, seed, prompt, kind):
    run.params = tiny.weights((seed, salt), kind, promise, number)
    trace = decode(run, prompt, SamplingConfig(temperature=temperature, seed=seed))
    tally.add(trace)
    tolerance = TOLERANCE * (8 if kind == "storm" else 1)
    check_teacher_forcing(run.params, trace, run.features, tolerance)

  tally = tiny.over_programs(check, n, KINDS, always=[("habits",)], tally=Tally)
  tally.require(promises=3, nested=1, joins=1, finished=5)


FAMILIES = {
  "gemma 3 and more": dict(
    window=7,
    local_layers=(True, False),
    local_rope_theta=100.0,
    qk_norm=True,
    post_norms=True,
    norm_offset=1.0,
    activation="gelu",
    scale_embeddings=True,
    attention_softcap=4.0,
    logit_softcap=15.0,
    query_scale=0.2,
    qkv_bias=True,
  ),
  "mistral": dict(window=5),
}


@pytest.mark.parametrize("family, visibility", [*((f, "promise") for f in FAMILIES), ("mistral", "live")])
def test_other_families_agree_with_one_dense_forward(family, visibility):
  """Windows end in the middle of chunks and of the gaps that promises jump: positions count, not pool
  entries."""
  config = dataclasses.replace(tiny.CONFIG, **FAMILIES[family])
  wide = dataclasses.replace(config, window=0, local_layers=())
  features = StepFeatures(rule=PositionRule("pred_10x"), visibility=visibility, return_logits=True)
  run = Interpreter(tiny.model(config), VOCABULARY, LIMITS, features)

  def check(tally, seed, prompt):
    graph, run.params = tiny.other_family(config, tiny.weights((seed, 5)))
    trace = decode(run, prompt, SamplingConfig(temperature=1.0, seed=seed))
    tally.add(trace)
    check_teacher_forcing(run.params, trace, run.features, graph=graph)
    with contextlib.suppress(AssertionError):
      check_teacher_forcing(run.params, trace, run.features, graph=tiny.other_family(wide, run.params)[0])
      tally["as without a window"] += 1

  tally = tiny.over_programs(check, 20, tally=Tally)
  tally.require(promises=3, joins=1, finished=5)
  assert tally["as without a window"] < tally["programs"] / 2


# Yardstick two: one thread at a time.


@dataclasses.dataclass
class Pending:
  """A promise whose chunk is not decoded yet: what it will see, and its position."""

  path: tuple[int, ...]
  seen: list[int]
  position: int


@dataclasses.dataclass
class Done:
  """A decoded chunk."""

  seen: list[int]
  after: int  # one after the position of its last token
  own: int  # its tokens
  orphans: list["Done"]


class Reference:
  """Greedy decoding, a thread at a time, each token by a dense forward pass over all rows so far.

  `trace` says where a response that met a limit was cut, and settles ties between tokens whose scores differ
  by less than rounding; everything else is decided here.
  """

  def __init__(self, params, trace: Trace, strategy: str, guard: bool, penalty: float = 1.0,
               promise: str = "topic", number: str = "digits", length: str = "likeliest"):  # fmt: skip
    self.params, self.strategy, self.guard, self.penalty = params, strategy, guard, penalty
    self.promise, self.number, self.length = promise, number, length
    self.numbered = strategy != "fixed"
    self.finished = trace.finish_reason == "stop"
    self.hints = {t.path: t for t in trace.threads}
    self.tokens: list[int] = []
    self.positions: list[int] = []
    self.mask = np.zeros((128, 128), bool)
    self.topics: dict[int, list[int]] = {}  # row of a kept promise's last token -> its topic
    self.heads: dict[int, str] = {}  # the same -> what it is about, in the form `head`
    self.threads: dict[tuple[int, ...], list[int]] = {}
    self.ill = self.refused = self.ties = 0
    self.prompt = trace.prompt.tolist()
    for i, token in enumerate(self.prompt[:-1]):
      self.write(token, i, list(range(i)))
    self.thread((), list(range(len(self.prompt) - 1)), len(self.prompt) - 1, self.prompt[-1])

  def write(self, token: int, position: int, seen: list[int]):
    """A row for one token; it sees `seen` and itself, and is seen from now on."""
    row = len(self.tokens)
    self.tokens.append(token)
    self.positions.append(position)
    seen.append(row)
    self.mask[row, seen] = True

  def thread(self, path: tuple[int, ...], seen: list[int], position: int, token: int) -> Done:
    """Decodes one thread and all below it."""
    automaton = tiny.Automaton(not path, self.numbered, self.promise, self.number)
    tokens = self.threads[path] = [token] if path else []
    hint = self.hints.get(path)
    cut = 0 if hint is None else int((hint.entries >= 0).sum())
    pending: list[Pending] = []
    n_children, event = 0, None
    while True:
      if len(tokens) > (len(hint.tokens) if self.finished and hint else cut):
        break  # further than the response that is to be compared
      self.write(token, position, seen)
      position += 1
      if event == "fork":
        if len(path) < LIMITS.max_depth:
          self.kept(seen[-1], automaton)
          pending.append(Pending((*path, n_children), list(seen), position))
          position += self.gap(automaton.number)
          n_children += 1
        else:
          self.refused += 1
      if event == "end":
        break
      token = self.choose(path, tokens, seen, automaton, pending)
      tokens.append(token)
      event = automaton.feed(token)
      if event == "end" and not path:
        break
      if event == "join" and (self.finished or len(tokens) <= cut):
        joined = self.run(pending)
        position = self.at_sync(position, joined)
        seen = sorted(set(seen).union(*(d.seen for d in joined)))
        pending = []
    self.ill += automaton.ill + (automaton.state != "text")
    return Done(seen, position, len(tokens), self.run(pending))

  def kept(self, row: int, automaton: tiny.Automaton):
    """Remembers the promise whose last token is in `row`."""
    self.topics[row], self.heads[row] = automaton.topic, automaton.about

  def run(self, pending: list[Pending]) -> list[Done]:
    """Chunks in the order of their promises, and those that they leave to whoever joins them."""
    done = [self.thread(p.path, p.seen, p.position, VOCABULARY.tags.async_) for p in pending]
    return [x for d in done for x in (d, *d.orphans)]

  def gap(self, number: int | None) -> int:
    """Positions that a promise reserves."""
    if self.strategy in ("max", "sum"):
      return 0
    if number is None or self.strategy == "fixed":
      return FIXED
    number = min(number, 999)
    return -(-number // 10) * 10 if self.strategy == "pred_10x" else number

  def at_sync(self, position: int, joined: list[Done]) -> int:
    """The position of a sync."""
    if self.strategy == "max":
      return max([position, *(d.after for d in joined)])
    return position + (sum(d.own for d in joined) if self.strategy == "sum" else 0)

  def choose(self, path, tokens, seen, automaton, pending) -> int:
    """The likeliest token that may come."""
    n = len(self.tokens)
    scores = tiny.dense_logits(self.params, self.tokens, self.positions, self.mask[:n, :n])[-1]
    scores = scores.astype(np.float64)
    if self.penalty != 1 and automaton.state == "text":
      for token in {self.tokens[row] for row in seen if row >= len(self.prompt)}:
        if token < len(tiny.WORDS) and len(tiny.WORDS[token]) >= 4:
          scores[token] *= self.penalty if scores[token] < 0 else 1 / self.penalty
    if self.guard:
      taken = {
        topic[-1]
        for row, topic in self.topics.items()
        if row in seen and topic and topic[:-1] == automaton.topic
      }
      if self.promise == "head":
        # What a promise must not open with; a topic's last token is not to be compared with.
        repeats = automaton.about in {self.heads[row] for row in self.heads if row in seen} - {""}
        taken = {VOCABULARY.tags.open, *LENGTH_IDS} if repeats else set()
      for token in range(len(scores)):
        if not self.may_write(token, path, tokens, automaton, bool(pending), taken):
          scores[token] = -np.inf
    best, as_class = self.best(scores)
    hint = self.hints.get(path)
    if hint is not None and len(tokens) < len(hint.tokens):
      theirs = int(hint.tokens[len(tokens)])
      both_lengths = {theirs, best} <= set(LENGTH_IDS)
      compared = scores if both_lengths and self.length == "likeliest" else as_class
      if theirs != best and compared[theirs] > compared[best] - 2 * TOLERANCE:
        self.ties += 1
        return theirs
    return best

  def best(self, scores) -> tuple[int, np.ndarray]:
    """The greedy choice; each token's score, which lengths that are tokens share: that of any of them."""
    as_class = scores.copy()
    if self.number == "token" and np.isfinite(scores[LENGTH_IDS]).any():
      as_class[LENGTH_IDS] = np.logaddexp.reduce(scores[LENGTH_IDS])
    best = int(np.argmax(as_class))
    if best not in LENGTH_IDS or self.number == "digits":
      return best, as_class
    p = np.exp(scores[LENGTH_IDS] - as_class[best])
    return LENGTH_IDS[int(np.argmax(p if self.length == "likeliest" else np.cumsum(p) >= 0.5))], as_class

  def may_write(self, token, path, tokens, automaton, can_join, taken) -> bool:
    """The guard, restated."""
    kind, n = automaton.kind(token), len(automaton.topic)
    done = n > 0
    if automaton.state == "text":
      headed = automaton.has_head and token not in taken
      may_open = len(path) < LIMITS.max_depth and (headed or self.promise == "topic")
      return (kind not in ("open", "length") or may_open) and {
        "ordinary": True,
        "digits": True,
        "open": self.number == "digits" or self.promise == "topic",
        "length": self.promise == "head",
        "end": bool(path) and len(tokens) > 1,
        "sync": can_join,
        "eos": not path,
      }.get(kind, False)
    if automaton.state == "topic" and token in taken:
      return False
    if automaton.state == "topic":
      return {
        "ordinary": n < LIMITS.max_topic,
        "digits": n < LIMITS.max_topic,
        "middle": done and self.numbered and self.number == "digits",
        "length": done,
        "close": done and not self.numbered,
      }.get(kind, False)
    if not self.numbered:  # a head and a promise without a number
      return kind == "close"
    if kind == "digits":
      number = automaton.number or 0
      return number < 100 and int(f"{number}{tiny.DIGITS[token - len(tiny.WORDS)]}") <= 999
    return kind == "close" and automaton.number is not None


@dataclasses.dataclass
class Playing:
  """A thread of `LiveReference`."""

  path: tuple[int, ...]
  place: tuple[int, ...]  # of its first token in reading order, as nested indices
  token: int  # chosen, not read yet
  position: int
  automaton: tiny.Automaton
  owner: tuple[int, ...] | None  # whose next sync joins it
  event: str | None = None  # what its token asks for
  status: str = "runs"
  read: int = 0
  children: int = 0
  can_join: bool = False


class LiveReference(Reference):
  """Greedy decoding under `live`, round by round: a token sees what stands before it in reading order and was read
  in an earlier round."""

  def thread(self, path: tuple[int, ...], seen: list[int], position: int, token: int) -> Done:
    """Plays the response; called once, for the main thread."""
    self.rows = [((-2, i), 0) for i in seen]  # place in reading order, round
    self.playing = [Playing((), (), token, position, self.begins(True), None)]
    self.threads[()] = []
    left = sum(int((t.entries >= 0).sum()) for t in self.hints.values())
    now = 0
    while not now or left and any(t.status == "runs" for t in self.playing):
      now += 1
      for t in [t for t in self.playing if t.status == "runs"]:
        self.turn(t, now)
        left -= not (t.read == 1 and not t.path)  # the last prompt token is none of the response's
      self.end_round()
    for t in self.playing:
      self.ill += t.automaton.ill + (t.automaton.state != "text")
    return Done([], 0, 0, [])

  def begins(self, is_main: bool) -> tiny.Automaton:
    return tiny.Automaton(is_main, self.numbered, self.promise, self.number)

  def turn(self, t: Playing, now: int) -> None:
    tokens = self.threads[t.path]
    index = t.read - 1 if not t.path else t.read  # of its token among its own; -1: the prompt's last
    place = (*t.place, index)
    seen = [row for row, (other, when) in enumerate(self.rows) if other < place and when < now]
    self.write(t.token, t.position, seen)
    self.rows.append((place, now))
    t.read += 1
    t.position += 1
    if t.event == "fork":
      if len(t.path) < LIMITS.max_depth:
        self.kept(len(self.tokens) - 1, t.automaton)
        child = (*t.path, t.children)
        begins = self.begins(False)
        self.playing.append(Playing(child, (*place, 1), VOCABULARY.tags.async_, t.position, begins, t.path))
        self.threads[child] = [VOCABULARY.tags.async_]
        t.position += self.gap(t.automaton.number)
        t.children, t.can_join = t.children + 1, True
      else:
        self.refused += 1
    if t.event == "end":
      t.status = "done"
      return
    t.token = self.choose(t.path, tokens, seen, t.automaton, t.can_join)
    tokens.append(t.token)
    t.event = t.automaton.feed(t.token)
    if t.event == "join":
      t.status = "waits"
    elif t.event == "end" and not t.path:
      t.status = "done"

  def end_round(self) -> None:
    by_path = {t.path: t for t in self.playing}
    for t in self.playing:
      while t.owner and by_path[t.owner].status == "done":
        t.owner = by_path[t.owner].owner
    for t in [t for t in self.playing if t.status == "waits"]:
      joined = [c for c in self.playing if c.owner == t.path]
      if all(c.status == "done" for c in joined):
        ends = [Done([], c.position, len(self.threads[c.path]), []) for c in joined]
        t.position, t.status, t.can_join = self.at_sync(t.position, ends), "runs", False
        for c in joined:
          c.owner = None


def check_against_reference(
  params,
  trace: Trace,
  strategy: str,
  guard: bool,
  penalty: float = 1.0,
  visibility: str = "promise",
  **form: str,
) -> Reference:
  """Tokens of every thread, and how many tags were ill-formed or refused."""
  kind = LiveReference if visibility == "live" else Reference
  reference = kind(params, trace, strategy, guard, penalty, **form)
  got = {t.path: tiny.words(t.tokens) for t in trace.threads}
  want = {path: tiny.words(tokens) for path, tokens in reference.threads.items()}
  assert got == want
  assert trace.ill_formed == reference.ill
  assert trace.refused == reference.refused
  return reference


@pytest.mark.parametrize(
  "strategy,guard,n,visibility,promise",
  [
    ("pred_10x", True, 40, "promise", "topic"),
    ("pred_10x", False, 40, "promise", "topic"),
    ("pred_1x", True, 15, "promise", "topic"),
    ("fixed", True, 20, "promise", "topic"),
    ("max", True, 20, "promise", "topic"),
    ("sum", True, 20, "promise", "topic"),
    ("pred_10x", True, 40, "live", "topic"),
    ("pred_10x", False, 30, "live", "topic"),
    ("max", True, 20, "live", "topic"),
    ("sum", True, 20, "live", "topic"),
    ("pred_10x", True, 30, "promise", "head"),
    ("pred_10x", False, 30, "promise", "head"),
    ("pred_10x", True, 30, "live", "head"),
    ("max", False, 20, "live", "head"),
    ("fixed", True, 20, "live", "head"),
    ("pred_10x", True, 30, "promise", "topic/token"),
    ("sum", False, 20, "live", "topic/token"),
    ("pred_10x", True, 30, "live", "head/token"),
    ("max", False, 20, "promise", "head/token"),
    ("pred_10x", True, 20, "promise", "head/token/median"),
  ],
)
def test_greedy_decoding_agrees_with_a_plain_decoder(strategy, guard, n, visibility, promise):
  form = {"number": "digits", "length": "likeliest"} | dict(
    zip(("promise", "number", "length"), promise.split("/"))
  )
  run = interpreter(strategy, guard, visibility, **form)
  salt = zlib.crc32(f"{strategy} {guard}".encode())

  def check(tally, seed, prompt, kind):
    run.params = tiny.weights((seed, salt), kind, form["promise"], form["number"])
    trace = decode(run, prompt)
    tally.add(trace)
    reference = check_against_reference(run.params, trace, strategy, guard, visibility=visibility, **form)
    tally["ties"] += reference.ties
    if guard and trace.finish_reason == "stop":
      assert trace.ill_formed == 0

  tally = tiny.over_programs(check, n, KINDS, always=[("habits",)], tally=Tally)
  tally.require(promises=3, nested=1, joins=1, finished=5, finished_with_promises=2)
  assert tally["ties"] <= 1, tally


@pytest.mark.parametrize("weights, visibility", [("int8", "promise"), ("int8", "live"), ("fp8", "promise")])
def test_matrices_in_8_bits_decode_as_the_same_weights_in_float32(weights, visibility):
  """Both yardsticks read the dequantised matrices, in the form of layers that training has."""

  def in_8_bits(seed, kind):
    params = build.to_params(nnx.merge(tiny.GRAPH, tiny.weights((seed, 9), kind)))
    return build.for_decoding(tiny.CONFIG, params, None, jnp.float32, weights=weights)

  features = StepFeatures(rule=PositionRule("pred_10x"), visibility=visibility, return_logits=True)
  run = Interpreter(in_8_bits(0, "habits"), VOCABULARY, LIMITS, features)

  def check(tally, seed, prompt, kind):
    model = in_8_bits(seed, kind)
    run.params = nnx.state(model)
    trace = decode(run, prompt)
    tally.add(trace)
    tolerance = TOLERANCE * (8 if kind == "storm" else 1)
    dequantised = nnx.state(build.from_params(tiny.CONFIG, build.to_params(model)))
    check_teacher_forcing(dequantised, trace, run.features, tolerance)
    check_against_reference(dequantised, trace, "pred_10x", True, visibility=visibility)
    with contextlib.suppress(AssertionError):
      check_teacher_forcing(tiny.weights((seed, 9), kind), trace, run.features, tolerance)
      tally["as with the weights before"] += 1

  tally = tiny.over_programs(check, 15, KINDS, always=[("habits",)], tally=Tally)
  tally.require(promises=3, joins=1, finished=5)
  assert not tally["as with the weights before"]


def test_the_repetition_penalty_remembers_what_a_thread_sees():
  run = interpreter("pred_10x", False)

  def check(tally, seed, prompt, kind, penalty):
    run.params = tiny.weights(seed, kind)
    trace = decode(run, prompt, SamplingConfig(repetition_penalty=penalty))
    tally.add(trace)
    check_against_reference(run.params, trace, "pred_10x", False, penalty)
    tally["another answer"] += trace.main != decode(run, prompt).main

  tally = tiny.over_programs(
    check,
    30,
    st.sampled_from(["habits", "silent"]),
    st.sampled_from([1.2, 2.0, 5.0]),
    always=[("habits", 5.0), ("silent", 5.0)],
    tally=Tally,
  )
  tally.require(promises=3, another_answer=6)


# Without promises.


def plain_greedy(params, prompt: list[int], vocabulary_rows: int) -> list[int]:
  """Ordinary autoregression over the first `vocabulary_rows` tokens."""
  tokens = list(prompt)
  while len(tokens) - len(prompt) < LIMITS.max_new_tokens and (len(tokens) == len(prompt) or tokens[-1] != 0):
    n = len(tokens)
    logits = tiny.dense_logits(params, tokens, range(n), np.tril(np.ones((n, n), bool)))
    tokens.append(int(np.argmax(logits[-1, :vocabulary_rows])))
  return tokens[len(prompt) :]


@functools.cache
def without_promises(tags: bool) -> Interpreter:
  """An interpreter that writes no tags, around a model with or without rows for them."""
  config = tiny.CONFIG if tags else dataclasses.replace(tiny.CONFIG, vocab_size=VOCABULARY.base_size)
  return Interpreter(tiny.model(config), VOCABULARY, LIMITS, StepFeatures(promises=False))


def cut_tags(params):
  """The same weights without the tags' rows and columns."""
  rows = VOCABULARY.base_size
  pure = nnx.to_pure_dict(params)
  pure["embed"]["embedding"] = pure["embed"]["embedding"][:rows]
  pure["head"]["kernel"] = pure["head"]["kernel"][:, :rows]
  cut = jax.tree.map(jnp.asarray, without_promises(False).params)
  nnx.replace_by_pure_dict(cut, pure)
  return cut


def test_without_promises_decoding_is_ordinary():
  def check(tally, seed, prompt):
    params = tiny.weights(seed, "habits")
    want = plain_greedy(params, prompt, VOCABULARY.base_size)
    for tags in (True, False):
      run = without_promises(tags)
      run.params = params if tags else cut_tags(params)
      trace = decode(run, prompt)
      assert len(trace.threads) == 1 and trace.steps == len(want)
      assert tiny.words(trace.threads[0].tokens) == tiny.words(want)
    tally["finished" if want[-1] == 0 else "cut"] += 1

  tiny.over_programs(check, 30, tally=Tally).require(finished=5, cut=1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_never_promises_decodes_as_if_promises_were_off(temperature):
  @tiny.examples(30)
  @given(tiny.seeds, tiny.prompts)
  def each(seed, prompt):
    params = tiny.weights(seed, "silent")
    traces = []
    for run in (interpreter("pred_10x", True), interpreter("pred_10x", False), without_promises(True)):
      run.params = params
      traces.append(decode(run, prompt, SamplingConfig(temperature=temperature, seed=seed)))
    first = traces[0].threads[0]
    for trace in traces:
      assert trace.steps == len(first.tokens) and len(trace.threads) == 1
      np.testing.assert_array_equal(trace.threads[0].tokens, first.tokens)
      np.testing.assert_array_equal(trace.threads[0].positions, first.positions)
    if temperature == 0:
      assert plain_greedy(params, prompt, tiny.CONFIG.vocab_size) == first.tokens.tolist()

  each()
