"""Many requests at once give what each one gives alone: places, halves of them, pools of several sizes,
seeds."""

import numpy as np
import pytest
from helpers import tiny

from pasta_jax.decode.interpreter import DecodeError, Interpreter
from pasta_jax.decode.scheduler import Scheduler, pool_groups
from pasta_jax.decode.settings import Limits, SamplingConfig, StepFeatures

LIMITS = Limits(max_new_tokens=70, max_threads=6, branch_widths=(1, 2, 4), kv_buckets=(256, 512, 1024))
SAMPLED = SamplingConfig(temperature=1.0, seed=3)
RNG = np.random.default_rng(0)
# Some need larger pools than others; the long ones come in between.
PROMPTS = [RNG.integers(1, 9, size=n).tolist() for n in (2, 5, 150, 3, 40, 330, 2, 4, 170, 2, 9, 6, 2)]


@pytest.fixture(scope="module")
def interpreter():
  return Interpreter(tiny.model(), tiny.VOCABULARY, LIMITS, StepFeatures())


def figures(trace):
  return (
    trace.thread,
    trace.finish_reason,
    [t.positions.tolist() for t in trace.threads],
    [t.rounds.tolist() for t in trace.threads],
    trace.ill_formed,
    trace.refused,
  )


@pytest.fixture(scope="module")
def alone(interpreter):
  """By weights: each prompt's figures, decoded by itself with a seed of its own."""
  out = {}
  for seed in range(3):
    interpreter.params = tiny.weights(seed, "habits")
    out[seed] = [
      figures(interpreter.run(p, SamplingConfig(temperature=1.0, seed=i))) for i, p in enumerate(PROMPTS)
    ]
  assert sum(len(f[2]) > 1 for fs in out.values() for f in fs) >= 10  # with promises
  assert len({len(f[0].tokens) for fs in out.values() for f in fs}) >= 10  # of many lengths
  return out


@pytest.mark.parametrize("requests, width", [(3, 2), (16, 1), (5, 4)])
def test_together_as_alone(interpreter, alone, requests, width):
  decoder = Scheduler(interpreter, batch_size=requests, branch_width=width)
  for seed, expected in alone.items():
    interpreter.params = tiny.weights(seed, "habits")
    told: dict[int, tuple] = {}
    note = lambda i, trace, told=told: told.update({i: figures(trace)})
    traces = decoder.run(PROMPTS, SAMPLED, seeds=range(len(PROMPTS)), done=note)
    assert [figures(t) for t in traces] == expected
    assert told == dict(enumerate(expected))


def test_few_requests_join_those_of_the_next_pool():
  assert pool_groups([], 4) == []
  assert pool_groups([512, 384, 512, 384], 4) == [(512, [1, 3, 0, 2])]  # two places would stay empty
  assert pool_groups([512, 384, 512, 384], 2) == [(384, [1, 3]), (512, [0, 2])]
  assert pool_groups([384, 512, 640, 768, 896], 9) == [
    (768, [0, 1, 2, 3]),
    (896, [4]),
  ]  # never more than twice
  assert pool_groups([256, 4096], 9) == [(256, [0]), (4096, [1])]
  assert pool_groups([512, 1024, 1024, 512, 512], 2) == [(512, [0, 3, 4]), (1024, [1, 2])]


def test_warm_programs_are_not_compiled_again(interpreter):
  decoder = Scheduler(interpreter, batch_size=5, branch_width=2)
  decoder.precompile(3, SAMPLED)
  before = decoder._segment._cache_size()
  decoder.run([p for p in PROMPTS if len(p) < 10], SAMPLED)
  assert decoder._segment._cache_size() == before == len(decoder._sizes()) == 3


def test_what_cannot_be_held_is_refused(interpreter):
  with pytest.raises(DecodeError, match="may take .* pool entries, decode.kv_capacity is 1024"):
    Scheduler(interpreter, batch_size=2, branch_width=1).run([[1] * 1000], SAMPLED)
  with pytest.raises(DecodeError, match="must be 1 or more"):
    Scheduler(interpreter, batch_size=0, branch_width=1)
