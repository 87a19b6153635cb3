"""What the interpreter says of itself: schedule invariance, totality, bounds, sampling. Models are random."""

import collections
import dataclasses
import functools

import jax
import numpy as np
import pytest
from helpers import tiny
from hypothesis import given
from hypothesis import strategies as st

from pasta_jax.decode.interpreter import Interpreter
from pasta_jax.decode.scheduler import decode
from pasta_jax.decode.settings import DecodeError, Limits, SamplingConfig, StepFeatures
from pasta_jax.decode.trace import Trace
from pasta_jax.lang.positions import ORACLES, PositionRule
from pasta_jax.lang.thread import Thread, read

VOCABULARY = tiny.VOCABULARY

ROOMY = Limits(
  max_new_tokens=64, max_threads=24, max_depth=3, max_topic=4, branch_widths=(8,), kv_buckets=(128,)
)


@functools.cache
def interpreter(
  limits: Limits = ROOMY,
  guard: bool = True,
  return_logits: bool = False,
  no_repeat: int = 0,
  promise: str = "topic",
  number: str = "digits",
) -> Interpreter:
  """One for each static shape, so that examples share what was compiled."""
  return Interpreter(
    tiny.model(tiny.CONFIGS[number]),
    tiny.VOCABULARIES[promise, number],
    limits,
    StepFeatures(
      guard=guard, return_logits=return_logits, no_repeat=no_repeat, promise=promise, number=number
    ),
  )


def with_params(run: Interpreter, params) -> Interpreter:
  """The same interpreter around other weights."""
  run.params = params
  return run


def result(trace: Trace) -> list[str]:
  """All that may not depend on the schedule, in lines that compare well."""
  lines = [f"{trace.finish_reason}, {trace.ill_formed} ill-formed, {trace.refused} refused", trace.text]
  for t in trace.threads:
    lines += [
      f"{t.number} {t.path} of {t.parent} at {t.fork_index}, {t.topic!r} {t.declared} {t.finished}",
      tiny.words(t.tokens),
      f"positions {t.positions.tolist()}",
      f"rounds {t.rounds.tolist()}",
    ]
  return lines


# Schedule invariance. Per case: guard, limits, sampling, shapes to compare, finish reasons that must occur.

_SAMPLED = SamplingConfig(temperature=1.0)
_CASES = {
  "roomy": (
    True,
    ROOMY,
    SamplingConfig(temperature=1.0, min_p=0.02, repetition_penalty=1.3),
    [dict(branch_widths=w) for w in [(8,), (1,), (3,), (1, 2, 4, 8)]],
    {"stop", "length"},
  ),
  "no repeats": (
    True,
    ROOMY,
    SamplingConfig(temperature=0.5),
    [dict(branch_widths=w) for w in [(8,), (1,), (3,)]],
    {"stop", "length"},
  ),
  "heads, no repeats": (
    True,
    ROOMY,
    _SAMPLED,
    [dict(branch_widths=w) for w in [(8,), (1,), (3,)]],
    {"stop", "length"},
  ),
  "few threads": (
    False,
    Limits(max_new_tokens=48, max_threads=4, max_depth=2, kv_buckets=(96,)),
    _SAMPLED,
    [dict(branch_widths=w) for w in [(3,), (1, 2)]],
    {"stop", "length"},
  ),
  "few, guarded": (
    True,
    Limits(max_new_tokens=60, max_threads=4, max_depth=2, kv_buckets=(96,)),
    _SAMPLED,
    [dict(branch_widths=w) for w in [(1,), (3,)]],
    {"stop", "length"},
  ),
  "few, guarded, heads, lengths as tokens": (
    True,
    Limits(max_new_tokens=60, max_threads=4, max_depth=2, kv_buckets=(96,)),
    SamplingConfig(temperature=1.0, top_p=0.9),
    [dict(branch_widths=w) for w in [(1,), (3,)]],
    {"stop", "length"},
  ),
  "small pool": (
    False,
    Limits(max_new_tokens=500, max_threads=24, max_depth=3),
    _SAMPLED,
    [dict(branch_widths=(2,), kv_buckets=(48, 96)), dict(branch_widths=(5,), kv_buckets=(96,))],
    {"stop", "pool"},
  ),
}


@pytest.mark.parametrize("case", _CASES)
def test_the_schedule_changes_nothing(case):
  guard, limits, sampling, shapes, reasons = _CASES[case]
  no_repeat, promise = 2 if "no repeats" in case else 0, "head" if "heads" in case else "topic"
  number = "token" if "tokens" in case else "digits"
  kinds = ["habits", "habits", "storm", "endless"]

  def check(tally, seed, prompt, kind):
    params = tiny.weights(seed, kind, promise, number)
    sampled = dataclasses.replace(sampling, seed=seed)
    runs = (
      with_params(
        interpreter(
          dataclasses.replace(limits, **s), guard, no_repeat=no_repeat, promise=promise, number=number
        ),
        params,
      )
      for s in shapes
    )
    first, *others = (decode(run, prompt, sampled) for run in runs)
    for other, shape in zip(others, shapes[1:]):
      assert result(other) == result(first), shape
      for a, b in zip(other.threads, first.threads):
        np.testing.assert_allclose(a.log_p, b.log_p, atol=2e-3)
    if case == "roomy" and first.finish_reason == "stop" and len(first.threads) <= 8:
      assert first.steps == first.cost.longest_path  # a slot for every branch
      tally["as many steps as the longest path"] += len(first.threads) > 1
    tally.update(
      {
        "programs": 1,
        first.finish_reason: 1,
        "promises": len(first.threads) > 1,
        "nested": first.main.depth > 1,
        "refused": first.refused > 0,
        "full": len(first.threads) == limits.max_threads,
      }
    )

  tally = tiny.over_programs(check, 24, st.sampled_from(kinds), always=[(kind,) for kind in kinds])
  assert reasons == {r for r in ("stop", "length", "pool", "unfinished") if tally[r]}, tally
  assert tally["promises"] >= 6 and tally["nested"], tally
  if case.startswith("few"):
    assert tally["full"] >= 3, tally
    assert not tally["refused"] if guard else tally["refused"] >= 3, tally


# Totality.

_SMALL = Limits(
  max_new_tokens=96, max_threads=8, max_depth=2, max_topic=4, branch_widths=(2,), kv_buckets=(128,)
)


def recount(trace: Trace) -> tuple[int, int, list[int]]:
  """Ill-formed tags, refused promises and lengths of kept topics, told without the automaton's table."""
  ill, refused, topics = 0, 0, []
  for t in trace.threads:
    automaton = tiny.Automaton(t.number == 0, numbered=True)
    kept = {c.fork_index for c in trace.threads if c.parent == t.number}
    for k, token in enumerate(t.tokens):
      if k or not t.path:
        event = automaton.feed(int(token))
        refused += event == "fork" and t.entries[k] >= 0 and k not in kept
        if k in kept:
          assert event == "fork"
          topics.append(len(automaton.topic))
    ill += automaton.ill + (automaton.state != "text")
  return ill, refused, topics


def check_bounds(trace: Trace, limits: Limits, guard: bool):
  """What holds for every response whatever the model writes."""
  written = sum(int((t.entries >= 0).sum()) for t in trace.threads)
  assert trace.finish_reason in ("stop", "length", "pool")
  assert 0 <= written <= limits.max_new_tokens
  assert len(trace.prompt) + written <= limits.kv_buckets[-1]
  assert trace.cost.total_tokens <= limits.max_new_tokens + len(trace.threads)
  assert len(trace.threads) <= limits.max_threads and trace.main.depth <= limits.max_depth
  assert trace.steps <= limits.max_new_tokens
  ill, refused, topics = recount(trace)
  assert (trace.ill_formed, trace.refused) == (ill, refused)
  assert type(trace.refused) is int and type(trace.ill_formed) is int  # they are written as JSON
  if trace.finish_reason == "stop":
    assert all(t.finished for t in trace.threads)
  else:
    assert not all(t.finished for t in trace.threads)
  if guard:
    assert trace.refused == 0
    # A limit may cut each thread inside a promise; nothing else can be ill-formed.
    assert trace.ill_formed <= (0 if trace.finish_reason == "stop" else len(trace.threads))
    assert all(1 <= n <= limits.max_topic for n in topics)
    assert all(0 <= t.declared <= 999 for t in trace.threads[1:])


@pytest.mark.parametrize(
  "changed,guard",
  [
    ({}, False),
    ({}, True),
    ({"max_new_tokens": 1}, False),
    ({"max_threads": 1}, False),
    ({"max_threads": 1}, True),
    ({"max_depth": 0}, False),
    ({"max_topic": 1, "max_threads": 3}, True),
    ({"kv_buckets": (9,), "branch_widths": (1,)}, False),
  ],
  ids=lambda x: str(x).replace(" ", ""),
)
def test_every_response_ends_within_its_limits(changed, guard):
  limits = dataclasses.replace(_SMALL, **changed)
  run = interpreter(limits, guard)
  tally: collections.Counter = collections.Counter()

  @tiny.examples(24)
  @given(tiny.seeds, tiny.prompts, st.sampled_from(["storm"] * 2 + ["clockwork"] * 2 + ["endless", "habits"]))
  def each(seed, prompt, kind):
    trace = decode(
      with_params(run, tiny.weights(seed, kind)), prompt, SamplingConfig(temperature=1.0, seed=seed)
    )
    check_bounds(trace, limits, guard)
    tally.update(
      {
        trace.finish_reason: 1,
        "refused": trace.refused,
        "promises": len(trace.threads) > 1,
        "ill": trace.ill_formed,
        "full": len(trace.threads) == limits.max_threads,
      }
    )

  each()
  print(changed, guard, dict(tally))
  if not changed:
    assert tally["promises"] >= 4 and tally["stop"] and tally["length"], tally
  if not changed and not guard:
    assert tally["ill"] > 50 and tally["refused"] > 0, tally
  if limits.max_depth == 0 or limits.max_threads == 1:
    assert not tally["promises"] and (guard or tally["refused"]), tally
  if limits.max_threads == 3:
    assert tally["full"], tally
  if limits.kv_buckets == (9,):
    assert tally["pool"], tally


def test_a_prompt_as_long_as_the_pool_allows():
  limits = dataclasses.replace(_SMALL, kv_buckets=(9,), branch_widths=(1,))
  run = with_params(interpreter(limits, False), tiny.weights(0, "storm"))
  trace = decode(run, [1] * 8, SamplingConfig(temperature=1.0))
  assert trace.finish_reason in ("pool", "stop") and trace.prompt.tolist() == [1] * 8
  with pytest.raises(DecodeError, match="9 tokens, the pool has room for 8"):
    decode(run, [1] * 9)
  with pytest.raises(DecodeError, match="empty"):
    decode(run, [])


def test_promises_need_rows_for_their_tags():
  config = dataclasses.replace(tiny.CONFIG, vocab_size=VOCABULARY.base_size)
  with pytest.raises(DecodeError, match="no tags"):
    Interpreter(tiny.model(config), VOCABULARY)


@pytest.mark.parametrize("strategy", ORACLES)
def test_positions_of_true_lengths_are_for_teacher_forcing(strategy: str):
  """Without promises there is nothing that they would be needed for."""
  features = StepFeatures(rule=PositionRule(strategy))
  with pytest.raises(DecodeError, match=f"strategy '{strategy}' need true lengths.*train.validation=FILE"):
    Interpreter(tiny.model(), VOCABULARY, features=features)
  Interpreter(tiny.model(), VOCABULARY, features=dataclasses.replace(features, promises=False))


@pytest.mark.parametrize(
  "wrong",
  [
    {"max_new_tokens": 0},
    {"max_threads": 0},
    {"max_topic": 0},
    {"branch_widths": ()},
    {"branch_widths": (2, 1)},
    {"branch_widths": (0, 1)},
    {"kv_buckets": (64, 64)},
  ],
  ids=str,
)
def test_wrong_limits_are_named(wrong):
  with pytest.raises(ValueError, match=f"decode.{min(wrong)}"):
    Limits(**wrong)


@pytest.mark.parametrize(
  "wrong",
  [
    {"temperature": -1.0},
    {"top_k": -1},
    {"top_p": 0.0},
    {"top_p": 1.5},
    {"min_p": 1.0},
    {"repetition_penalty": 0.5},
  ],
  ids=str,
)
def test_wrong_sampling_numbers_are_named(wrong):
  with pytest.raises(ValueError, match=f"decode.{min(wrong)}"):
    SamplingConfig(**wrong)


def test_watching_shows_prefixes_and_changes_nothing():
  @tiny.examples(12)
  @given(tiny.seeds, tiny.prompts, st.integers(1, 7))
  def each(seed, prompt, every):
    run = with_params(interpreter(), tiny.weights(seed))
    seen: list[Trace] = []
    sampled = SamplingConfig(temperature=1.0, seed=seed)
    watched, alone = (
      decode(run, prompt, sampled, on_step=seen.append, every=every),
      decode(run, prompt, sampled),
    )
    assert result(watched) == result(alone) and watched.steps == alone.steps
    assert result(seen[-1]) == result(alone)
    for earlier, later in zip(seen, seen[1:]):
      assert earlier.steps <= later.steps <= earlier.steps + every
      for a, b in zip(earlier.threads, later.threads):
        assert a.path == b.path and a.tokens.tolist() == b.tokens[: a.length].tolist()

  each()


# Sampling.


def test_draws_follow_from_seed_path_and_index():
  """Each token is drawn from its own key: the request's seed, the ordinals of its path, its index."""
  run, differ = interpreter(guard=False, return_logits=True), []

  @jax.jit
  def drawn(key, indices, logits):
    return jax.vmap(lambda i, x: jax.random.categorical(jax.random.fold_in(key, i), x))(indices, logits)

  @tiny.examples(20)
  @given(tiny.seeds, tiny.prompts)
  def each(seed, prompt):
    with_params(run, tiny.weights(seed))
    traces = [decode(run, prompt, SamplingConfig(temperature=0.7, seed=s)) for s in (seed, seed, seed + 1)]
    assert result(traces[0]) == result(traces[1])
    differ.append(result(traces[0]) != result(traces[2]))
    for t in traces[0].threads:
      key = jax.random.key(seed)
      for ordinal in t.path:
        key = jax.random.fold_in(jax.random.fold_in(key, 0x7FFFFFFF), ordinal + 1)
      start = min(len(t.path), 1)  # <async> is not drawn
      entries = np.append(len(prompt) - 1, t.entries[:-1])[start:]
      logits = np.zeros((ROOMY.max_new_tokens + 1, tiny.CONFIG.vocab_size), np.float32)  # one shape for all
      logits[: len(entries)] = traces[0].logits[entries] / np.float32(0.7)
      want = drawn(key, np.arange(len(logits)) + start, logits)[: len(entries)]
      np.testing.assert_array_equal(t.tokens[start:], want)

  each()
  assert np.mean(differ) > 0.7


def test_a_distribution_cut_to_one_token_is_greedy():
  @tiny.examples(15)
  @given(tiny.seeds, tiny.prompts)
  def each(seed, prompt):
    run = with_params(interpreter(), tiny.weights(seed))
    greedy = result(decode(run, prompt))
    for one in (dict(top_k=1), dict(top_p=1e-6), dict(min_p=0.999999), dict(top_k=1, top_p=0.5, min_p=0.5)):
      assert result(decode(run, prompt, SamplingConfig(temperature=1.0, seed=seed, **one))) == greedy, one
    assert result(decode(run, prompt, SamplingConfig(temperature=1e-4, seed=seed))) == greedy

  each()


def test_draws_stay_inside_top_k_top_p_and_min_p():
  run, cut = interpreter(guard=False, return_logits=True), []

  @tiny.examples(20)
  @given(
    tiny.seeds,
    tiny.prompts,
    st.integers(1, 6),
    st.floats(0.05, 0.95),
    st.floats(0.01, 0.9),
    st.floats(0.5, 4),
  )
  def each(seed, prompt, top_k, top_p, min_p, temperature):
    with_params(run, tiny.weights(seed))
    for numbers in (dict(top_k=top_k), dict(top_p=top_p), dict(min_p=min_p)):
      trace = decode(run, prompt, SamplingConfig(temperature=temperature, seed=seed, **numbers))
      for t in trace.threads:
        start = min(len(t.path), 1)
        entries = np.append(len(prompt) - 1, t.entries[:-1])[start:]
        p = np.asarray(jax.nn.softmax(trace.logits[entries].astype(np.float64) / temperature, axis=-1))
        mine = p[np.arange(len(entries)), t.tokens[start:]][:, None]
        better = p > mine * (1 + 1e-4)
        if "top_k" in numbers:
          assert (better.sum(axis=1) < top_k).all()
        elif "top_p" in numbers:
          assert ((p * better).sum(axis=1) < top_p + 1e-4).all()
        else:
          assert (mine[:, 0] >= min_p * p.max(axis=1) * (1 - 1e-3)).all()
        cut.extend(better.any(axis=1))

  each()
  assert np.mean(cut) > 0.1  # not only the likeliest


def _grams(trace, n: int) -> list[tuple[tuple[int, ...], int]]:
  """(runs of n own tokens whose last one is ordinary text, round in which that was chosen) of every
  thread."""
  found = []
  for t in trace.threads:
    text = read(Thread(tuple(t.tokens.tolist())), VOCABULARY.table, is_main=t.number == 0).is_text
    found += [
      (tuple(t.tokens[i - n + 1 : i + 1].tolist()), int(t.rounds[i]))
      for i in range(n - 1, t.length)
      if text[i]
    ]
  return found


@pytest.mark.parametrize("promises,n", [(False, 3), (True, 2)])
def test_no_run_of_tokens_comes_twice(promises, n):
  """In no thread, nor in two of them, but for what both choose in the same round."""
  limits = dataclasses.replace(ROOMY, max_new_tokens=60)
  plain = Interpreter(tiny.model(), VOCABULARY, limits, StepFeatures(promises=promises))
  guarded = Interpreter(tiny.model(), VOCABULARY, limits, StepFeatures(promises=promises, no_repeat=n))
  repeated = threads = 0
  for seed in range(20):
    plain.params = guarded.params = tiny.weights(seed, "habits" if promises else "silent")
    before, trace = _grams(decode(plain, [1, 2]), n), decode(guarded, [1, 2])
    repeated += len({gram for gram, _ in before}) < len(before)
    threads += len(trace.threads) - 1
    rounds = collections.defaultdict(list)
    for gram, at in _grams(trace, n):
      rounds[gram].append(at)
    assert all(len(set(r)) == 1 for r in rounds.values()), rounds
  assert repeated >= (4 if promises else 8), repeated  # without the ban they come again
  assert (threads > 0) == promises


def test_no_topic_is_promised_twice():
  """By no two threads, once the first promise is kept; without `no_repeat`, by none that sees it."""
  topics = {}
  for no_repeat in (0, 16):
    run = interpreter(no_repeat=no_repeat)
    topics[no_repeat] = 0
    for seed in range(24):
      run.params = tiny.weights(seed, ["habits", "endless"][seed % 2])
      trace = decode(run, [1, 2], SamplingConfig(temperature=1.0, seed=seed))
      kept = {}
      for chunk in trace.threads[1:]:
        parent = trace.threads[chunk.parent]
        begun = parent.rounds[
          chunk.fork_index
        ]  # when the promise's last token was chosen; its topic came before
        first = kept.setdefault(chunk.topic, begun)
        # The topic's last token was chosen a few rounds earlier: two tags and up to three digits follow it.
        topics[no_repeat] += first < begun - 6
  assert topics[16] == 0 < topics[0]


def test_the_bias_changes_how_often_promises_come():
  run = Interpreter(tiny.model(), VOCABULARY, ROOMY, StepFeatures())
  counts = {}
  for bias in (-4.0, 0.0, 4.0):
    counts[bias] = 0
    for seed in range(8):
      run.params = tiny.weights(seed)
      counts[bias] += decode(run, [1, 2], SamplingConfig(temperature=1.0, promise_bias=bias)).cost.n_promises
  assert counts[-4.0] < counts[0.0] < counts[4.0]


def test_no_promise_is_opened_where_it_would_be_cut_off():
  """With a tail as long as a promise, a response that hits its limit ends inside no promise."""
  limits = dataclasses.replace(ROOMY, max_new_tokens=50, max_depth=1)
  cut = {}
  for tail in (0, 12):
    run = Interpreter(tiny.model(), VOCABULARY, dataclasses.replace(limits, tail=tail), StepFeatures())
    traces = []
    for seed in range(30):
      run.params = tiny.weights(seed)
      traces.append(decode(run, [1, 2], SamplingConfig(temperature=1.0, seed=seed, promise_bias=2.0)))
    cut[tail] = sum(t.ill_formed > 0 for t in traces)
    assert any(t.finish_reason == "length" and t.cost.n_promises for t in traces)
  assert cut[12] < cut[0]
