"""Figures of responses: by hand-made records, and by traces of the tiny interpreter."""

import math

import numpy as np
import pytest
from helpers import tiny

from pasta_jax.decode.interpreter import Interpreter
from pasta_jax.decode.record import loops, to_record
from pasta_jax.decode.scheduler import decode
from pasta_jax.decode.settings import Limits, SamplingConfig, StepFeatures
from pasta_jax.evaluate.metrics.measures import bootstrap_interval, cut_by_text, geometric_mean, summarise


def test_loops():
  run = list(range(20))
  assert loops(run * 3) and loops([99] * 22) and loops(run + [7] + run + [8] + run)
  assert not loops(run * 2) and not loops(list(range(200))) and not loops(run[:19] * 3 + [1, 5, 3])
  assert not loops([])


def record(**changes) -> dict:
  return {
    "id": "a",
    "promises": 0,
    "lengths": [],
    "theoretical_parallelism": 1.0,
    "ill_formed": 0,
    "refused": 0,
    "topic_twice": False,
    "loops": False,
    "finish_reason": "stop",
    "text_tokens": 100,
    "total_tokens": 100,
    "seconds": 2.0,
    "longest_path": 50,
    "tokens_per_round": 1.5,
  } | changes


def test_summary_of_hand_made_records():
  rows = [
    record(),
    record(
      id="b",
      promises=3,
      theoretical_parallelism=4.0,
      total_tokens=150,
      seconds=1.0,
      text_tokens=100,
      lengths=[[40, 20], [30, 60]],
      unseparated=1,
      loops=True,
    ),
    record(
      id="c", promises=1, theoretical_parallelism=1.0, ill_formed=2, finish_reason="length", seconds=4.0
    ),
  ]
  base = [record(), record(id="b", seconds=3.0, text_tokens=60), record(id="c", seconds=2.0)]
  s, base_figures = summarise(rows, base), summarise(base)
  assert s["promise_share"] == pytest.approx(2 / 3) and s["promises_a_response"] == 2
  assert s["theoretical_parallelism"] == pytest.approx(4 ** (1 / 3))
  assert s["theoretical_parallelism_with_promises"] == pytest.approx(2)
  for key in ("malformed_share", "loop_share", "cut_share", "slower_share"):
    assert s[key] == pytest.approx(1 / 3), key
  assert s["unseparated_share"] == pytest.approx(1 / 3)  # of the promises of b: nobody counted those of c
  assert "unseparated_share" not in base_figures
  assert s["topic_twice_share"] == s["refused_share"] == 0
  assert s["tag_overhead"] == pytest.approx(1 - 300 / 350)
  assert s["length_error"] == pytest.approx((1.0 + 0.5) / 2) and s["outgrown_share"] == 0.5
  assert s["realised_speedup"] == pytest.approx((1 * 3 * 0.5) ** (1 / 3))
  # b: the baseline would have taken 3.0 / 60 * 100 = 5 s for the same text.
  assert s["same_text_speedup"] == pytest.approx((1 * 5 * 0.5) ** (1 / 3))
  assert s["efficiency"] == pytest.approx((1 * 5 / 4 * 0.5) ** (1 / 3))
  assert s["realised_speedup_low"] <= s["realised_speedup"] <= s["realised_speedup_high"]
  # b and c hold promises.
  assert s["with_promises_realised_speedup"] == pytest.approx((3 * 0.5) ** (1 / 2))
  assert s["with_promises_efficiency"] == pytest.approx((5 / 4 * 0.5) ** (1 / 2))
  assert s["with_promises_slower_share"] == 0.5


def test_means_of_nothing_are_not_a_number():
  assert math.isnan(geometric_mean([])) and all(map(math.isnan, bootstrap_interval([])))
  assert summarise([])["prompts"] == 0


def test_a_record_says_what_the_trace_says():
  run = Interpreter(
    tiny.model(),
    tiny.VOCABULARY,
    Limits(max_new_tokens=60, branch_widths=(4,), kv_buckets=(256,)),
    StepFeatures(),
  )
  promised = 0
  for seed in range(100):  # some are cut off while a sync waits
    run.params = tiny.weights(seed % 6, "habits")
    trace = decode(run, [1, 2], SamplingConfig(temperature=1.0, seed=seed))
    row = to_record(trace, tiny.VOCABULARY).to_json()
    assert row["promises"] == len(trace.threads) - 1 == trace.cost.n_promises
    assert row["longest_path"] == max(int(np.max(t.rounds, initial=0)) for t in trace.threads)
    assert row["theoretical_parallelism"] == pytest.approx(row["text_tokens"] / row["longest_path"])
    topics = [t.topic for t in trace.threads[1:]]
    assert row["topic_twice"] == (len(set(topics)) < len(topics))
    promised += row["promises"]
  assert promised > 0


def test_a_limit_in_tokens_of_text_by_hand():
  """The largest one for which every answer tells: that of the shortest answer that was cut off."""
  row = lambda text, reason="stop": {"text_tokens": text, "finish_reason": reason}
  rows = {
    "pasta": [row(300), row(410, "length"), row(450, "length"), row(405)],
    "baseline": [row(512, "length"), row(411), row(410), row(20)],
  }
  assert cut_by_text(rows) == (410, {"pasta": 0.5, "baseline": 0.5})
  assert cut_by_text({"baseline": [row(900)]}) == (0, {})
