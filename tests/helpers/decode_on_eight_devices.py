"""A script for `test_mesh`: what is decoded on meshes of eight virtual devices, compared with one device.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/helpers/decode_on_eight_devices.py tiny 5
    … python tests/helpers/decode_on_eight_devices.py smollm2 10

tiny N       N random models with eight random programs each, in both forms of visibility, with two key-value heads and
             with one, on six meshes
quick N      the same on three of them
smollm2 N    greedy answers to N prompts on four meshes
samples N    four samples of each on (1, 8)
widths N     in bfloat16 under `decode.invariant`: alone at three widths, in batches, over `data`, bit for bit
invariant N  random programs in bfloat16 under `decode.invariant`, over `data` alone, bit for bit
"""

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

TESTS = Path(__file__).parents[1]  # as a script
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from helpers import tiny  # noqa: E402
from pasta_jax.config import Config, with_changes  # noqa: E402
from pasta_jax.decode.generator import Model  # noqa: E402
from pasta_jax.decode.interpreter import Interpreter  # noqa: E402
from pasta_jax.decode.scheduler import Scheduler, decode  # noqa: E402
from pasta_jax.decode.settings import Limits, SamplingConfig, StepFeatures  # noqa: E402
from pasta_jax.evaluate.judges.likelihood import Likelihood  # noqa: E402
from pasta_jax.lang.forms import Forms  # noqa: E402
from pasta_jax.model.sharding import AXES, make_mesh  # noqa: E402
from pasta_jax.weights import build  # noqa: E402

# data, fsdp, tensor
SHAPES = [(8, 1, 1), (4, 1, 2), (2, 1, 4), (1, 1, 8), (2, 2, 2), (1, 8, 1)]
LIMITS = Limits(
  max_new_tokens=60, max_threads=24, max_depth=2, max_topic=4, branch_widths=(2,), kv_buckets=(64, 128)
)
ONE_HEAD = dataclasses.replace(tiny.CONFIG, n_kv_heads=1)


def lines(trace) -> list[tuple]:
  """What a response is: its threads' paths, tokens and positions."""
  return [(t.path, t.tokens.tolist(), t.positions.tolist()) for t in trace.threads]


def tiny_programs(
  n: int, shape: tuple[int, ...] | None, visibility: str, config, steps_per_look: int
) -> list:
  """Eight requests in a batch with each of n models; and of the first one by itself, with a pool that grows."""
  mesh = None if shape is None else make_mesh(dict(zip(AXES, shape)))
  limits = dataclasses.replace(LIMITS, steps_per_look=steps_per_look)
  kernel = shape == (4, 1, 2)  # on this mesh attention is the kernel's, interpreted
  features = StepFeatures(visibility=visibility, attention="interpret" if kernel else "xla")
  in_8_bits = "int8" if config is ONE_HEAD and visibility == "live" else ""
  blank = build.abstract(config, jnp.float32, fused=True, weights=in_8_bits)
  it = Interpreter(blank, tiny.VOCABULARY, limits, features, mesh)
  found = []
  for seed in range(n):
    params = build.to_params(nnx.merge(tiny.GRAPH, tiny.weights(seed)))
    kept = config.n_kv_heads * config.head_dim
    params = {k: x[:, :kept] if k.split(".")[-2] in ("k", "v") else x for k, x in params.items()}
    model = build.for_decoding(config, params, None, jnp.float32, weights=in_8_bits, mesh=mesh)
    it.params = nnx.split(model)[1]
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(1, 26, rng.integers(1, 9)).tolist() for _ in range(8)]
    found.append(lines(decode(it, prompts[0])))
    scheduler = Scheduler(it, batch_size=8, branch_width=2)
    sampling = SamplingConfig(temperature=0.5 * (seed % 2))
    found += map(lines, scheduler.run(prompts, sampling, seeds=range(8)))
    compiled = []
    for _ in range(2):
      found += map(lines, scheduler.run(prompts[:5], sampling, seeds=range(5)))  # places are left over
      found.append(lines(decode(it, prompts[0])))
      compiled.append(it.compiled())
    assert compiled[0] == compiled[1], "the same requests were compiled anew"
  if mesh is not None and config is tiny.CONFIG:
    split = [x for x in jax.tree.leaves(it.params) if x.addressable_shards[0].data.size < x.size]
    assert split or mesh.shape["data"] == 8, "nothing is sharded"
  return found


def compare_tiny(n: int, shapes: Sequence[tuple[int, ...]] = SHAPES, of_one_head=SHAPES[2:4]) -> None:
  compare_likelihoods()
  for config in (tiny.CONFIG, ONE_HEAD):
    for visibility in ("promise", "live"):
      expected = tiny_programs(n, None, visibility, config, 1)
      promised = sum(len(threads) > 1 for threads in expected)
      assert promised > len(expected) // 3, f"only {promised} of {len(expected)} programs have promises"
      for i, shape in enumerate(shapes if config is tiny.CONFIG else of_one_head):
        found = tiny_programs(n, shape, visibility, config, (1, 4)[i % 2])
        same = sum(a == b for a, b in zip(found, expected))
        print(
          f"{visibility}, {config.n_kv_heads} heads, {shape}: {same} of {len(expected)} the same", flush=True
        )
        assert found == expected


def compare_likelihoods() -> None:
  """The judge by likelihood: the same model on one device and on two meshes."""
  texts = [[3, 5, 7, 2], [4, 4, 9], [11, 2, 3, 5, 8, 1], [6], [7, 8]]
  expected: dict[int, float] = {}
  for shape in (None, (2, 2, 2), (1, 1, 8)):
    mesh = None if shape is None else make_mesh(dict(zip(AXES, shape)))
    params = build.to_params(nnx.merge(tiny.GRAPH, tiny.weights(1)))
    network = build.for_decoding(tiny.CONFIG, params, None, jnp.float32, mesh=mesh)
    model: Any = SimpleNamespace(model=network, mesh=mesh, forms=Forms(), vocabulary=tiny.VOCABULARY)
    found: dict[int, float] = {}
    Likelihood(model)([[1, 2]] * len(texts), texts, found.__setitem__)
    expected = expected or found
    np.testing.assert_allclose(*([x[i] for i in range(len(texts))] for x in (found, expected)), rtol=1e-5)
  print("likelihoods agree", flush=True)


def compare_invariant(n: int) -> None:
  """Tokens and log-probabilities on eight devices, in a batch and alone, are those of one, alone, bit for bit."""

  def answer(seed: int, shape: tuple[int, ...] | None, batch: int) -> list:
    mesh = None if shape is None else make_mesh(dict(zip(AXES, shape)))
    limits = dataclasses.replace(LIMITS, branch_widths=(2 if mesh else 1,))
    it = Interpreter(tiny.model(), tiny.VOCABULARY, limits, StepFeatures(invariant=True), mesh)
    params = tiny.cast(tiny.weights(seed), jnp.bfloat16)
    it.params = params if mesh is None else jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    prompts = [np.random.default_rng(i).integers(1, 26, 1 + i).tolist() for i in range(8)]
    if batch == 1:
      traces = [decode(it, p) for p in prompts]
    else:
      traces = Scheduler(it, batch_size=batch, branch_width=2).run(prompts, SamplingConfig())
    return [[(t.path, t.tokens.tolist(), t.log_p.tobytes()) for t in trace.threads] for trace in traces]

  for seed in range(n):
    expected = answer(seed, None, 1)
    for batch in (1, 8):
      same = sum(a == b for a, b in zip(answer(seed, (8, 1, 1), batch), expected))
      print(f"invariant, batches of {batch}: {same} of {len(expected)} the same", flush=True)
      assert same == len(expected)


def smollm2(n: int, shape: tuple[int, ...], *, samples: int = 1, tokens: int = 100, batch_size: int = 8,
            branches: int = 2, settings: Mapping[str, Any] = {}, **how) -> list:  # fmt: skip
  """Answers of SmolLM2 to n prompts in float32, in batches; (1, 1, 1) is one device. Under `decode.invariant`, with the
  bits of log-probabilities."""
  prompts = [
    f"{ask} {what}."
    for ask in ("Compare", "Give three reasons for and against", "Write a short guide to", "List facts about")
    for what in ("trains and planes", "working at home", "keeping bees")
  ][:n]
  changes = {"decode.dtype": "float32", "decode.promise_bias": 1.5, "decode.max_new_tokens": tokens}
  changes |= {"decode.max_branches": max(branches, 4)} | settings
  devices = jax.local_devices()
  with mock.patch.object(jax, "local_devices", lambda: devices[: int(np.prod(shape))]):
    sizes = {f"mesh.{axis}": size for axis, size in zip(AXES, shape)}
    model = Model(with_changes(Config(), changes | sizes))
  asked = [model.encode(p) for p in prompts for _ in range(samples)]
  sampling = dataclasses.replace(model.sampling, **how)
  scheduler = model.scheduler(batch_size=batch_size, branch_width=branches)
  traces = scheduler.run(asked, sampling, seeds=range(len(asked)))
  bits = lambda trace: [t.log_p.tobytes() for t in trace.threads] if "decode.invariant" in settings else None
  return [(lines(trace), bits(trace)) for trace in traces]


def compare_smollm2(n: int, shapes: Sequence[tuple[int, ...]] = SHAPES[:4], **how) -> None:
  expected = smollm2(n, (1, 1, 1), **how)
  for shape in shapes:
    started = time.perf_counter()
    same = sum(a == b for a, b in zip(smollm2(n, shape, **how), expected))
    print(f"{shape}: {same} of {len(expected)} the same, {time.perf_counter() - started:.0f} s", flush=True)
    assert same == len(expected)


def compare_samples(n: int) -> None:
  """As stage two draws them."""
  compare_smollm2(n, [(1, 1, 8)], samples=4, tokens=30, temperature=0.6)


def compare_widths(n: int) -> None:
  """bfloat16 under `decode.invariant`, bit for bit: alone at three widths, in batches, and over the axis data."""
  settings = {"decode.dtype": "bfloat16", "decode.invariant": True}
  ways: list[tuple[tuple[int, ...], int, dict]] = [
    *(((1, 1, 1), 1, {"decode.max_branches": width}) for width in (1, 4, 8)),
    *(((1, 1, 1), n, {"decode.kv_capacity": 2048, "width": width}) for width in (1, 4)),
    ((8, 1, 1), 8, {"width": 2}),
  ]
  expected = None
  for shape, batch_size, own in ways:
    how = dict(tokens=120, batch_size=batch_size, branches=own.pop("width", 2), settings=settings | own)
    found = smollm2(n, shape, **how)
    expected = expected or found
    same = sum(a == b for a, b in zip(found, expected))
    print(f"{shape}, batches of {batch_size}, {own}: {same} of {n} the same", flush=True)
    assert same == n


if __name__ == "__main__":
  {
    "tiny": compare_tiny,
    "quick": lambda n: compare_tiny(n, [(4, 1, 2), (2, 2, 2)], [(2, 1, 4)]),
    "invariant": compare_invariant,
    "smollm2": compare_smollm2,
    "samples": compare_samples,
    "widths": compare_widths,
  }[sys.argv[1]](int(sys.argv[2]))
  print("done")
