"""Decoding on meshes: eight virtual devices against one, what a process decodes on, and looks at a running loop."""

import dataclasses
from pathlib import Path

import jax
import pytest
from helpers import tiny
from helpers.devices import on_eight

from pasta_jax.decode.interpreter import Interpreter
from pasta_jax.decode.sampling import as_arrays
from pasta_jax.decode.scheduler import DecodeRequest, Scheduler, decode, place_counts
from pasta_jax.decode.settings import Limits, SamplingConfig, StepFeatures
from pasta_jax.model import sharding
from pasta_jax.utils.hlo import HOST, Module

ROOT = Path(__file__).parents[2]
LIMITS = Limits(
  max_new_tokens=60, max_threads=24, max_depth=2, branch_widths=(1, 4), kv_buckets=(32, 64, 128)
)


def test_eight_devices_decode_what_one_decodes():
  """Both forms of visibility, two key-value heads and one, requests by themselves and in batches, on three meshes."""
  lines = on_eight("decode_on_eight_devices.py", "quick", "1")
  assert "likelihoods agree" in lines and lines[-1] == "done"
  assert sum("the same" in line for line in lines) == 6


def interpreter(steps_per_look: int, visibility: str = "promise") -> Interpreter:
  limits = dataclasses.replace(LIMITS, steps_per_look=steps_per_look)
  return Interpreter(tiny.model(), tiny.VOCABULARY, limits, StepFeatures(visibility=visibility))


@pytest.mark.parametrize("visibility", ["promise", "live"])
def test_looks_change_nothing(visibility):
  """Programs that end, fork and outgrow their pools in the middle of a look."""
  every = [interpreter(n, visibility) for n in (1, 5, 16)]
  promised = 0
  for seed in range(6):
    traces = []
    for it in every:
      it.params = tiny.weights(seed)
      traces.append(decode(it, [3, 5, seed + 1]))
    promised += len(traces[0].threads) > 1
    threads = [[(t.tokens.tolist(), t.rounds.tolist()) for t in trace.threads] for trace in traces]
    assert threads[0] == threads[1] == threads[2]
  assert promised >= 3


def test_a_stream_is_looked_at_as_often_as_it_asks():
  it = interpreter(16)
  it.params = tiny.weights(2)
  for every in (1, 3, 20):
    steps: list[int] = []
    scheduler = Scheduler(it)
    scheduler.submit(
      DecodeRequest([3, 5, 2], on_step=lambda t, steps=steps: steps.append(t.steps), every=every)
    )
    while scheduler.step():
      pass
    gaps = [b - a for a, b in zip([0, *steps], steps)]
    assert steps and max(gaps) <= every


def test_the_loop_of_a_look_has_a_known_length_and_no_host():
  it = interpreter(8)
  state = it.prefill([3, 5, 2])
  features, numbers = it.features, as_arrays(SamplingConfig())
  lowered = it._segment.lower(it.params, state, numbers, 8, width=4, features=features, look=8)  # type: ignore[attr-defined]
  module = Module.parse(lowered.compile().as_text())
  outer = module.loops()[0]
  inner = [loop for loop in module.loops(module.body(outer)) if loop.trips == 8]
  assert outer.trips is None and inner
  opcodes = {i.opcode for i in module.instructions(module.body(inner[0]))}
  assert not opcodes & set(HOST)
  assert not any("callback" in i.rest for i in module.instructions(module.entry))


def test_places_are_multiples_of_the_replicas():
  assert place_counts(8) == [8, 4, 2] and place_counts(5) == [5, 3, 2]
  assert place_counts(8, 4) == [8, 4] and place_counts(5, 4) == [8, 4] and place_counts(1, 2) == [2]


@pytest.mark.parametrize(
  "sizes, processes, local, expected",
  [
    ((1, -1, 1), 1, 8, (8, 1, 1)),  # the default: requests are split
    ((1, 8, 1), 1, 8, (1, 8, 1)),
    ((1, -1, 2), 1, 8, (4, 1, 2)),
    ((2, 1, 4), 1, 8, (2, 1, 4)),
    ((-1, 1, 4), 2, 8, (2, 1, 4)),
    ((4, 1, 4), 2, 8, (2, 1, 4)),  # of sixteen devices
    ((1, -1, 1), 4, 1, None),
    ((1, 1, 16), 2, 8, "needs 16 devices, not the 8 here .each of 2 processes"),
    ((3, 1, 1), 1, 8, "needs 3 devices, not the 8 here"),
  ],
)
def test_a_process_decodes_on_its_own_devices(sizes, processes, local, expected, monkeypatch):
  monkeypatch.setattr(jax, "local_devices", lambda: [None] * local)
  monkeypatch.setattr(jax, "process_count", lambda: processes)
  monkeypatch.setattr(sharding, "make_mesh", lambda sizes, devices: tuple(sizes.values()))
  named = dict(zip(sharding.AXES, sizes))
  if isinstance(expected, str):
    with pytest.raises(ValueError, match=expected):
      sharding.local_mesh(named)
  else:
    assert sharding.local_mesh(named) == expected
