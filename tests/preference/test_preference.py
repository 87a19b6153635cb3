"""Preference optimisation: losses against the decode loop's own log p, gradients, pairs, choices, planted
rewards."""

import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import tiny

from pasta_jax.config import Config
from pasta_jax.data.pairs import PairBatches, PreferencePair
from pasta_jax.decode.interpreter import Interpreter
from pasta_jax.decode.scheduler import Scheduler
from pasta_jax.decode.settings import Limits, SamplingConfig, StepFeatures
from pasta_jax.lang.layout import NO_TARGET, Layout, layout
from pasta_jax.model.sharding import AXES, make_mesh
from pasta_jax.preference.score import SPEEDUPS, StepCost, choose, chunk_facts, defects, score
from pasta_jax.preference.selection import choose_best
from pasta_jax.train.losses import LOSSES, default_beta, preference_loss
from pasta_jax.train.preference import Preference, answer_likelihoods
from pasta_jax.train.state import SplitModel, TrainState
from pasta_jax.train.trainer import Trainer, make_update

LIMITS = Limits(max_new_tokens=40, max_threads=6, max_depth=2, branch_widths=(2,), kv_buckets=(128,))
SAMPLED = SamplingConfig(temperature=1.0)
MESH = make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])
ROWS, LENGTH, LEVELS = 3, 112, 3
N = 6  # samples a prompt
PROMPTS = [[int(x) for x in np.random.default_rng(i).integers(1, 24, 5)] for i in range(12)]


@pytest.fixture(scope="module")
def interpreter():
  return Interpreter(tiny.model(), tiny.VOCABULARY, LIMITS, StepFeatures())


@pytest.fixture(scope="module")
def decoder(interpreter):
  return Scheduler(interpreter, batch_size=12, branch_width=2)


def sample(decoder, params, first_seed: int):
  """N traces of each prompt."""
  decoder.interpreter.params = params
  asked = [p for p in PROMPTS for _ in range(N)]
  traces = decoder.run(asked, SAMPLED, seeds=[first_seed + i for i in range(len(asked))])
  return [traces[i * N : (i + 1) * N] for i in range(len(PROMPTS))]


def laid(decoder, trace) -> Layout:
  rule = decoder.interpreter.features.rule
  return layout(trace.main, rule, tiny.VOCABULARY.table, trace.prompt.tolist())


def log_p(trace) -> float:
  """What the decode loop says of an answer: no mask, no packing, one token at a time."""
  return float(sum(np.nansum(t.log_p, dtype=np.float64) for t in trace.threads))


@pytest.fixture(scope="module")
def drawn(decoder):
  params = tiny.weights(3)
  return params, sample(decoder, params, 0)


@pytest.fixture(scope="module")
def some_pairs(decoder, drawn):
  """(pairs with made-up references, the decode loop's log p of their answers)."""
  _, groups = drawn
  rng = np.random.default_rng(0)
  pairs, known = [], []
  for a, b in [(g[0], g[1]) for g in groups]:
    pairs.append(PreferencePair(laid(decoder, a), laid(decoder, b), tuple(rng.normal(-30, 5, 2))))
    known.append((log_p(a), log_p(b)))
  assert sum(len(t.threads) > 1 for g in groups for t in g[:2]) >= 5
  return pairs, np.array(known)


def margins(pairs, known, per_token: bool) -> list[float]:
  """Δ of each pair: of sums, or by the token times the answers' mean length."""
  out = []
  for pair, (chosen, rejected) in zip(pairs, known):
    gains = chosen - pair.reference[0], rejected - pair.reference[1]
    n = [sum(t != NO_TARGET for t in e.targets) for e in (pair.chosen, pair.rejected)]
    out.append((gains[0] / n[0] - gains[1] / n[1]) * sum(n) / 2 if per_token else gains[0] - gains[1])
  return out


def by_hand(kind: str, pairs, known, alpha: float, beta: float, per_token: bool) -> np.ndarray:
  """The losses of pairs, from the definitions in docs/language.md and the papers."""
  out = []
  for delta, (chosen, _) in zip(margins(pairs, known, per_token), known):
    out.append(
      {
        "bonbon": -alpha * chosen + (1 - alpha) * (delta - 1 / beta) ** 2,
        "ipo": (delta - 1 / (2 * beta)) ** 2,
        "dpo": math.log1p(math.exp(-beta * delta)) if beta * delta > -500 else -beta * delta,
      }[kind]
    )
  return np.array(out)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("kind", LOSSES)
def test_losses_are_those_of_the_decode_loops_log_p(drawn, some_pairs, kind, per_token):
  pairs, known = some_pairs
  batches = PairBatches(pairs, rows=ROWS, length=LENGTH, levels=LEVELS, seed=0)
  alpha, beta = 0.1, 0.05
  model = nnx.merge(tiny.GRAPH, drawn[0])
  total = {k: 0.0 for k in ("loss", "pairs", "margin", "accuracy", "chosen", "rejected", "ref_logp_drop")}
  for step in range(batches.steps_in_epoch(0)):
    _, sums = preference_loss(model, batches(step), loss=kind, alpha=alpha, beta=beta, per_token=per_token)
    total = {k: v + float(sums[k]) for k, v in total.items()}
  reference = np.array([p.reference for p in pairs])
  gains, delta = known - reference, np.array(margins(pairs, known, per_token))
  expected = {
    "loss": by_hand(kind, pairs, known, alpha, beta, per_token).sum(),
    "pairs": len(pairs),
    "margin": delta.sum(),
    "accuracy": (delta > 0).sum(),
    "chosen": known[:, 0].sum(),
    "rejected": known[:, 1].sum(),
    "ref_logp_drop": -gains.sum(),
  }
  for name, value in expected.items():
    assert total[name] == pytest.approx(value, rel=1e-4, abs=1e-3), name


@pytest.mark.parametrize("kind, per_token", [*((kind, False) for kind in LOSSES), ("bonbon", True)])
def test_gradients_equal_finite_differences(drawn, some_pairs, kind, per_token):
  """Along random directions through every parameter."""
  pairs, _ = some_pairs
  batch = PairBatches(pairs, rows=ROWS, length=LENGTH, levels=LEVELS, seed=0)(0)
  batch["reference"] = batch["reference"] * 0 - 30.0

  @jax.jit
  def loss(params):
    return preference_loss(
      nnx.merge(tiny.GRAPH, params), batch, loss=kind, alpha=0.3, beta=0.04, per_token=per_token
    )[0]

  scaled = lambda tree, h: jax.tree.map(lambda x: h * x, tree)
  gradient = jax.grad(loss)(drawn[0])
  for seed in range(3):
    keys = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(gradient)))
    noise = jax.tree.unflatten(
      jax.tree.structure(gradient),
      [jax.random.normal(k, g.shape) for k, g in zip(keys, jax.tree.leaves(gradient))],
    )
    scale = 1 / optax.global_norm(gradient), 0.3 / optax.global_norm(noise)
    direction = jax.tree.map(lambda g, n, scale=scale: scale[0] * g + scale[1] * n, gradient, noise)
    slope = sum(float(jnp.vdot(g, d)) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction)))

    move = lambda h, direction=direction: float(loss(optax.apply_updates(drawn[0], scaled(direction, h))))
    h = 2e-3
    assert slope == pytest.approx((move(h) - move(-h)) / (2 * h), rel=2e-2)


def test_the_default_beta_is_that_of_order_statistics():
  """E Δ of best-of-n between best and worst, by drawing ranks: log of n u^(n-1) at the largest and smallest
  u."""
  rng = np.random.default_rng(0)
  for n in (2, 4, 10):
    u = rng.random((200_000, n))
    gap = (n - 1) * (np.log(u.max(1)) - np.log(u.min(1))).mean()
    assert 1 / default_beta("bonbon", n) == pytest.approx(gap, rel=0.02)
    assert 1 / (2 * default_beta("ipo", n)) == pytest.approx(gap, rel=0.02)
  # The targets of BoNBoN's own release, for 8 and 10 samples: 7 H(7) and 9 H(9).
  assert [round(1 / default_beta("bonbon", n), 2) for n in (8, 10)] == [18.15, 25.46]


def test_batches_hold_whole_pairs_and_every_pair_once_an_epoch(some_pairs):
  pairs, _ = some_pairs
  batches = PairBatches(pairs, rows=ROWS, length=LENGTH, levels=LEVELS, seed=5)
  for epoch in range(2):
    seen = []
    start = sum(batches.steps_in_epoch(e) for e in range(epoch))
    for step in range(start, start + batches.steps_in_epoch(epoch)):
      batch = batches(step)
      n = int(batch["weight"].sum())
      for p in range(n):
        reference = tuple(batch["reference"][p])
        [which] = [i for i, x in enumerate(pairs) if np.allclose(x.reference, reference)]
        for side, example in ((0, pairs[which].chosen), (1, pairs[which].rejected)):
          there = batch["answers"] == 2 * p + side
          assert batch["tokens"][there].tolist() == example.tokens.tolist()
          assert batch["targets"][there].tolist() == example.targets.tolist()
        seen.append(which)
      assert set(np.unique(batch["answers"])) <= {*range(2 * n), 4 * ROWS}
    assert sorted(seen) == list(range(len(pairs)))
  again = PairBatches(pairs, rows=ROWS, length=LENGTH, levels=LEVELS, seed=5)
  jax.tree.map(np.testing.assert_array_equal, again(7), batches(7))
  with pytest.raises(ValueError, match="does not fit 1 rows of 40"):
    PairBatches(pairs, rows=1, length=40, levels=LEVELS, seed=5)


def settings(**changes):
  """`config.preference` for the tiny model."""
  return dataclasses.replace(
    Config().preference, **dict(loss_chunk=256, remat="none", attention="auto", dtype="float32") | changes
  )


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("wanted", [1, -1])
def test_a_policy_learns_what_is_rewarded(decoder, drawn, wanted, per_token):
  """Planted reward: one that is paid for promises makes more of them, one that is fined for them fewer."""
  params, groups = drawn
  task = Preference(settings(alpha=0.005, per_token=per_token, samples=N, batch_size=ROWS, length=LENGTH))
  pairs = []
  for group in groups:
    order = sorted(group, key=lambda t: wanted * (len(t.threads) - 1))
    if len(order[-1].threads) != len(order[0].threads):
      pairs.append(PreferencePair(laid(decoder, order[-1]), laid(decoder, order[0])))
  assert len(pairs) >= 8
  model = SplitModel(*nnx.split(nnx.merge(tiny.GRAPH, params), nnx.Param, ...))
  graph, trainable, frozen = model
  known: dict[int, tuple[float, float]] = {}
  answer_likelihoods(Trainer(task, model, MESH), task.batches_of(pairs), known.__setitem__)
  pairs = [dataclasses.replace(p, reference=known[i]) for i, p in enumerate(pairs)]
  batches = task.batches_of(pairs)
  optimiser = optax.adam(3e-3)
  update = make_update(task, graph, optimiser)
  state = TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, trainable), optimiser.init(trainable))
  first = last = None
  for step in range(40):
    state, metrics = update(state, frozen, jax.tree.map(lambda x: x[None], batches(step)))
    first, last = first or metrics, metrics
  assert abs(float(first["margin"])) < 1e-2 < 5 < float(last["margin"]) and float(last["accuracy"]) == 1
  seeds = range(5000, 10000, 1000)  # 72 answers each: fewer leave the mean too uncertain
  count = lambda params: np.mean(
    [len(t.threads) - 1 for s in seeds for g in sample(decoder, params, s) for t in g]
  )
  before, after = count(params), count(nnx.state(nnx.merge(graph, state.trainable, frozen)))
  print(wanted, before, after)
  assert wanted * (after - before) > 0.3 * before


def test_accumulated_batches_weigh_every_pair_the_same(drawn, some_pairs):
  """Two batches with different numbers of pairs: the mean over pairs, not of batches' means."""
  pairs, _ = some_pairs
  graph, trainable, frozen = nnx.split(nnx.merge(tiny.GRAPH, drawn[0]), nnx.Param, ...)
  batches = PairBatches(pairs, rows=ROWS, length=LENGTH, levels=LEVELS, seed=0)
  two = [batches.batch(pairs[:2]), batches.batch(pairs[2:3])]
  task = Preference(settings(loss="ipo", alpha=0.0, beta=0.05, per_token=False))
  update = make_update(task, graph, optax.sgd(1.0))

  def run(found):
    state = TrainState(
      jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, trainable), optax.sgd(1.0).init(trainable)
    )
    return update(state, frozen, jax.tree.map(lambda *x: np.stack(x), *found))[1]

  both, first, second = run(two), run(two[:1]), run(two[1:])
  assert [float(m["pairs"]) for m in (both, first, second)] == [3, 2, 1]
  for name in ("loss", "margin", "chosen"):
    assert float(both[name]) == pytest.approx((2 * float(first[name]) + float(second[name])) / 3, rel=1e-5)


def row(**changes) -> dict:
  """A sample with nothing wrong."""
  base = dict(
    text="An answer.",
    finish_reason="stop",
    ill_formed=0,
    loops=False,
    empty_chunks=0,
    copied_chunks=0,
    refused=0,
    text_tokens=80,
    total_tokens=100,
    longest_path=50,
    speedup=1.6,
    quality=0.5,
    defects=[],
  )
  return base | changes


def test_saying_less_is_no_speed():
  """60 tokens on a path of 30, where the baseline wrote 120; and 200 on a path of 100."""
  baseline = dict(text_tokens=120)
  short = dict(text_tokens=60, longest_path=30, theoretical_parallelism=2.0, tokens_per_round=2.5)
  long = dict(text_tokens=200, longest_path=100, theoretical_parallelism=2.0, tokens_per_round=2.5)
  values = lambda how: (SPEEDUPS[how](short, baseline), SPEEDUPS[how](long, baseline))
  assert values("theoretical") == (4.0, 1.2)
  assert values("delivered") == (2.0, 1.2)
  assert values("parallelism") == (2.5, 2.5)
  assert values("arithmetic") == (3.25, 1.85)
  assert values("harmonic") == pytest.approx((2 / (1 / 4 + 1 / 2.5), 2 / (1 / 1.2 + 1 / 2.5)))


def test_the_best_and_the_worst():
  fast, good, slow = (
    row(text=t, speedup=s, quality=q)
    for t, s, q in (("fast", 3.0, 0.3), ("good", 1.5, 0.9), ("slow", 1.0, 0.4))
  )
  samples = [slow, fast, good]
  pick = lambda weight, rows=samples, **kw: dataclasses.astuple(choose(rows, weight, **kw))
  assert pick(0.0) == pick(1.0) == (1, 0, "")
  assert pick(4.0) == (2, 0, "")
  assert pick(math.inf) == (2, 1, "")
  tie = [row(text="a", speedup=1.0, quality=0.7), row(text="b", speedup=2.0, quality=0.7)]
  assert pick(math.inf, tie) == (-1, -1, "no difference")  # ties make no pair
  assert score(2.0, 0.5, 4.0) > score(3.0, 0.2, 4.0)
  broken = [slow, fast | {"defects": ["loops"]}, good]
  assert pick(0.0, broken) == (2, 1, "")  # below all that are whole, fast as it is
  assert pick(0.0, broken, guards=False) == (1, 0, "")
  assert pick(1.0, [good, dict(good)])[2] == "all the same"
  assert pick(1.0, [good])[2] == "not judged, or too long"
  assert pick(1.0, [s | {"defects": ["empty"]} for s in samples])[2] == "all have defects"
  assert pick(1.0, [row(text="a"), row(text="b")])[2] == "no difference"


def test_the_best_samples_to_train_on():
  """Of each prompt, without defects, each text once at its fastest; where only quality counts, by quality."""
  named = lambda *rows: [row(text=t, speedup=s, quality=q, defects=d) for t, s, q, d in rows]
  samples = {
    "p": named(("fast", 3.0, 0.3, []), ("good", 1.5, 0.9, []), ("good", 1.2, 0.9, []), ("broken", 9.0, 1.0, ["loops"])),
    "q": named(("only", 1.0, 0.1, [])),
    "r": named(("empty", 1.0, 0.1, ["empty"])),
  }  # fmt: skip
  texts = lambda *how: [(s["text"], s["speedup"]) for s in choose_best(samples, *how)]
  assert texts(0.0, 1) == [("fast", 3.0), ("only", 1.0)]
  assert texts(math.inf, 1) == [("good", 1.5), ("only", 1.0)]
  assert texts(4.0, 3) == [("good", 1.5), ("fast", 3.0), ("only", 1.0)]
  assert [s["text"] for s in choose_best(samples, 0.0, 1, guards=False)] == ["broken", "only", "empty"]


@pytest.mark.parametrize("changes, name", [
  ({"text": " \n"}, "empty"), ({"finish_reason": "length"}, "cut off"), ({"ill_formed": 1}, "malformed"),
  ({"loops": True}, "loops"), ({"empty_chunks": 1}, "empty chunks"), ({"copied_chunks": 1}, "copied chunks"),
  ({"refused": 2}, "too many promises"), ({"total_tokens": 170}, "too many promises"),
  ({"text_tokens": 400}, "too long"), ({"text_tokens": 8}, "too short")])  # fmt: skip
def test_ways_to_cheat_have_names(changes, name):
  baseline = {"text_tokens": 100}
  assert defects(row(), baseline) == []
  assert defects(
    row(**({"total_tokens": changes["text_tokens"]} if "text_tokens" in changes else {}) | changes), baseline
  ) == [name]


def test_empty_and_copied_chunks_are_seen():
  words = tiny.VOCABULARY.tokenizer.encode(
    "tree stone river cloud amber lemon tiger of a the in tree tree stone"
  )
  tags = tiny.VOCABULARY.tags
  thread = lambda number, tokens: types.SimpleNamespace(number=number, tokens=np.array(tokens))
  trace = types.SimpleNamespace(
    threads=[
      thread(0, [1, 2, 3]),
      thread(1, [tags.async_, *words, tags.end]),
      thread(2, [tags.async_, *words[1:], tags.end]),
      thread(3, [tags.async_, tags.end]),
      thread(4, [tags.async_, *words[::-1], tags.end]),
    ]
  )
  assert chunk_facts(trace, tiny.VOCABULARY) == {"empty_chunks": 1, "copied_chunks": 1}


def test_the_clock_is_predicted_from_steps():
  cost = StepCost(base=10.0, row=1.0, entry=0.5)
  assert cost.seconds([1, 2, 2], prompt=4) == (10 + 1 + 2) + (10 + 2 + 2.5)
  sample = {"prompt_tokens": 4, "rounds": [1, 2, 2, 2], "text_tokens": 3}
  assert cost.speedup(sample, {"text_tokens": 2}) == pytest.approx(
    ((13) + (10 + 1 + 2.5)) / (13 + (10 + 3 + 2.5))
  )
  three = 13 + (10 + 1 + 2.5) + (10 + 1 + 3)
  assert cost.speedup(sample, {"text_tokens": 50}) == pytest.approx(three / (13 + (10 + 3 + 2.5)))
