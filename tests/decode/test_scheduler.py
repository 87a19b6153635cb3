"""Many requests at once give what each one gives alone: places, halves of them, pools of several sizes,
seeds."""

import dataclasses
import threading

import numpy as np
import pytest
from helpers import tiny

from pasta_jax.decode.interpreter import Interpreter
from pasta_jax.decode.scheduler import DecodeRequest, Scheduler, decode, place_counts, pool_groups
from pasta_jax.decode.settings import DecodeError, Limits, SamplingConfig, StepFeatures

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
    trace.main,
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
      figures(decode(interpreter, p, SamplingConfig(temperature=1.0, seed=i))) for i, p in enumerate(PROMPTS)
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
    traces = decoder.run(PROMPTS, SAMPLED, seeds=range(len(PROMPTS)), on_finish=note)
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


def test_warm_programs_are_not_compiled_again():
  interpreter = Interpreter(tiny.model(), tiny.VOCABULARY, LIMITS, StepFeatures())
  scheduler = Scheduler(interpreter, batch_size=5, branch_width=2)
  scheduler.precompile(3, SAMPLED)
  before = interpreter.compiled()
  scheduler.run([p for p in PROMPTS if len(p) < 10], SAMPLED)
  assert interpreter.compiled() == before
  assert interpreter._batch_segment._cache_size() == len(place_counts(5)) == 3


def test_what_cannot_be_held_is_refused(interpreter):
  with pytest.raises(DecodeError, match="may take .* pool entries, decode.kv_capacity is 1024"):
    Scheduler(interpreter, batch_size=2, branch_width=1).run([[1] * 1000], SAMPLED)
  with pytest.raises(DecodeError, match="must be 1 or more"):
    Scheduler(interpreter, batch_size=0, branch_width=1)
  with pytest.raises(DecodeError, match="the prompt is empty"):
    Scheduler(interpreter, batch_size=2, branch_width=1).submit(DecodeRequest([]))
  scheduler = Scheduler(interpreter, batch_size=2, branch_width=1)
  with pytest.raises(DecodeError):
    scheduler.run([[1], [1] * 1000], SAMPLED)
  assert not scheduler.step() and not list(scheduler.results())  # the one before it was not left behind


# Requests that come and go at any time.


def requests(**options) -> list[DecodeRequest]:
  return [DecodeRequest(p, SamplingConfig(temperature=1.0), seed=i, **options) for i, p in enumerate(PROMPTS)]


@pytest.mark.parametrize("places, width, seed", [(1, 1, 0), (1, 1, 1), (3, 2, 0), (3, 2, 2), (16, 1, 1)])
def test_a_trace_depends_on_its_request_only(interpreter, alone, places, width, seed):
  """Requests are submitted before any step and between steps; some are cancelled."""
  rng = np.random.default_rng((seed, places))
  interpreter.params = tiny.weights(seed, "habits")
  scheduler = Scheduler(interpreter, batch_size=places, branch_width=width)
  left = list(rng.permutation(len(PROMPTS)))
  index: dict[int, int] = {}
  results: dict[int, tuple] = {}
  cancelled: set[int] = set()

  def submit(n):
    for i in [left.pop() for _ in range(min(n, len(left)))]:
      index[scheduler.submit(requests()[i])] = i

  submit(3)
  steps = 0
  while scheduler.step(max_steps=int(rng.integers(1, 30))) or left:
    steps += 1
    assert steps < 2000
    for id, trace in scheduler.results():
      assert id not in results and id not in cancelled
      results[id] = figures(trace)
    if rng.random() < 0.3:
      submit(int(rng.integers(1, 4)))
    if rng.random() < 0.1 and len(cancelled) < 4:
      open_ = [id for id in index if id not in results and id not in cancelled]
      if open_ and scheduler.cancel(victim := int(rng.choice(open_))):
        cancelled.add(victim)
  results.update((id, figures(trace)) for id, trace in scheduler.results())
  assert results.keys() == index.keys() - cancelled
  assert len(results) >= 9
  for id, found in results.items():
    assert found == alone[seed][index[id]], f"request {index[id]}"


def test_requests_of_other_sampling_run_beside_each_other(interpreter):
  """Numbers may differ within a batch; what is compiled in another way runs in a batch of its own."""
  interpreter.params = tiny.weights(1, "habits")
  samplings = [
    SamplingConfig(),
    SamplingConfig(temperature=0.5, seed=4),
    SamplingConfig(temperature=1.5, min_p=0.1),
    SamplingConfig(temperature=1.0, repetition_penalty=1.5),
    SamplingConfig(repetition_penalty=1.2),
  ]
  scheduler = Scheduler(interpreter, batch_size=3, branch_width=2)
  ids = {scheduler.submit(DecodeRequest([1, 2, 3], s)): s for s in samplings}
  found = {}
  while scheduler.step():
    found.update((id, figures(trace)) for id, trace in scheduler.results())
  assert found == {id: figures(decode(interpreter, [1, 2, 3], s)) for id, s in ids.items()}
  assert len({str(f) for f in found.values()}) > 3


def test_late_requests_take_free_places_of_a_fitting_pool(interpreter):
  interpreter.params = tiny.weights(0, "endless")
  scheduler = Scheduler(interpreter, batch_size=3, branch_width=2)
  sampling = SamplingConfig(temperature=1.0)
  started: list[int] = []  # in the order in which they were first seen to run

  def submit(name, length):
    note = lambda trace: started.append(name) if name not in started else None
    return scheduler.submit(DecodeRequest([1] * length, sampling, seed=name, on_step=note))

  submit(0, 100)
  scheduler.step(1)
  assert started == [0]
  submit(1, 60)  # fits
  scheduler.step(1)
  assert started == [0, 1]
  submit(2, 600)  # needs a larger pool, and those after it must not overtake it
  submit(3, 60)
  scheduler.step(1)
  assert started == [0, 1]
  while scheduler.step(1):
    pass
  assert sorted(started[2:]) == [2, 3]
  assert len(list(scheduler.results())) == 4


@pytest.mark.parametrize("places", [1, 3])
def test_cancelled_requests_free_their_places(interpreter, places):
  interpreter.params = tiny.weights(0, "endless")
  scheduler = Scheduler(interpreter, batch_size=places, branch_width=2)
  seen: dict[int, int] = {}
  sampling = SamplingConfig(temperature=1.0)
  watcher = lambda i: lambda trace: seen.update({i: trace.steps})
  ids = [scheduler.submit(DecodeRequest([1, 2], sampling, seed=i, on_step=watcher(i))) for i in range(6)]
  scheduler.step(2)
  running = set(seen)
  assert len(running) == places
  assert all(scheduler.cancel(ids[i]) for i in running)  # running
  assert scheduler.cancel(ids[5]) and not scheduler.cancel(ids[5]) and not scheduler.cancel(99)  # waiting
  before = dict(seen)
  scheduler.step(2)
  assert all(seen[i] == before[i] for i in running) and set(seen) - running  # others have taken the places
  while scheduler.step():
    pass
  rest = [ids[i] for i in range(5) if i not in running]
  assert scheduler.cancel(rest[0])  # finished, not taken yet
  assert {id for id, _ in scheduler.results()} == set(rest[1:])
  assert not scheduler.cancel(rest[-1]) and not scheduler.step()
  ids = [scheduler.submit(DecodeRequest([1, 2], sampling)) for _ in range(2)]
  scheduler.step(1)
  assert all(map(scheduler.cancel, ids))
  assert not scheduler.step() and scheduler._running is None  # the pools are freed


@pytest.mark.parametrize("places, width", [(1, 1), (3, 2)])
def test_streamed_traces_grow_and_come_in_time(interpreter, alone, places, width):
  interpreter.params = tiny.weights(2, "habits")
  scheduler = Scheduler(interpreter, batch_size=places, branch_width=width)
  seen: dict[int, list] = {}
  for i, request in enumerate(requests(every=5)):
    watched = dataclasses.replace(request, on_step=seen.setdefault(i, []).append)
    assert scheduler.submit(watched if i % 2 else request) == i
  while scheduler.step(1000):
    pass
  found = {id: figures(trace) for id, trace in scheduler.results()}
  assert [found[i] for i in range(len(PROMPTS))] == alone[2]
  for i, traces in seen.items():
    assert bool(traces) == (i % 2 == 1)
    for earlier, later in zip([None, *traces], traces):
      assert 0 <= later.steps - (earlier.steps if earlier else 0) <= 5
    if traces:
      assert figures(traces[-1]) == alone[2][i] and (len(traces) > 1 or traces[-1].steps <= 5)


def test_submit_and_cancel_from_other_threads(interpreter, alone):
  interpreter.params = tiny.weights(1, "habits")
  scheduler = Scheduler(interpreter, batch_size=3, branch_width=2)
  index: dict[int, int] = {}
  dropped: list[int] = []

  def client(mine):
    for i in mine:
      id = scheduler.submit(requests()[i])
      if i % 5 == 4 and scheduler.cancel(id):
        dropped.append(id)
      else:
        index[id] = i

  clients = [threading.Thread(target=client, args=(range(k, len(PROMPTS), 3),)) for k in range(3)]
  for c in clients:
    c.start()
  found = {}
  while scheduler.step() or any(c.is_alive() for c in clients) or scheduler.step():
    found.update((id, figures(trace)) for id, trace in scheduler.results())
  assert found == {id: alone[1][i] for id, i in index.items()} and len(dropped) == 2


def test_a_run_leaves_nothing_behind_when_it_is_interrupted(interpreter, alone):
  interpreter.params = tiny.weights(0, "habits")
  scheduler = Scheduler(interpreter, batch_size=3, branch_width=2)

  def interrupt(i, trace):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    scheduler.run(PROMPTS, SAMPLED, on_finish=interrupt)
  traces = scheduler.run(PROMPTS, SAMPLED, seeds=range(len(PROMPTS)))
  assert [figures(t) for t in traces] == alone[0]
  scheduler.submit(requests()[0])
  with pytest.raises(RuntimeError, match="without other requests"):
    scheduler.run(PROMPTS, SAMPLED)
