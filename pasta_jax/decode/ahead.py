"""Compiles the programs that decode for a TPU slice or a GPU you do not have: do they fit, and what does a step move?

A decode step reads all weights and pools once: no step can be faster than the memory reads these bytes. What a compiled
step moves beyond them, how many kernels it runs and what its devices send each other, is read from the compiler's
result (`utils.hlo`). Weights are not read.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.box import SIMPLE
from rich.table import Table

from pasta_jax.config.sections import formats
from pasta_jax.decode.interpreter import Interpreter
from pasta_jax.decode.placement import specs
from pasta_jax.decode.precision import on_accelerators
from pasta_jax.decode.sampling import as_arrays
from pasta_jax.decode.settings import (
  SamplingConfig,
  features_of,
  limits_of,
  padded_length,
  sampling_of,
  specialise,
)
from pasta_jax.lang import forms
from pasta_jax.lang.automaton import LENGTHS
from pasta_jax.lang.forms import Forms
from pasta_jax.lang.syntax import TAG_TEXTS
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.model.config import ModelConfig
from pasta_jax.model.sharding import AXES, decoding_sizes, mesh_shape, shardings
from pasta_jax.model.transformer import set_matmul_precision
from pasta_jax.utils.chips import chip
from pasta_jax.utils.hlo import Module
from pasta_jax.utils.terminal import as_text
from pasta_jax.utils.topology import GPUS, compile_for, topology
from pasta_jax.weights import build
from pasta_jax.weights.adapter import merged_config
from pasta_jax.weights.checkpoint import load_checkpoint
from pasta_jax.weights.hf_config import read_config


@dataclasses.dataclass(frozen=True)
class CompiledDecoding:
  """The compiler's figures for a program; bytes are per chip."""

  name: str
  weights: int
  pools: int
  temporary: int  # upper bound: includes gaps and buffers in faster memory
  memory: float  # of the chip, as its vendor states it
  needed: int  # weights that a step multiplies by, and pools
  moved: int  # by a step, or by a prefill
  seconds: float  # to read what is needed at the chip's bandwidth
  kernels: int  # of a step, or of a prefill
  collectives: dict[str, tuple[int, int]]  # kind -> (number, bytes), of a step or of a prefill

  @property
  def share(self) -> float:
    """Of the bytes that are moved, those that have to be: the share of the roofline that is within reach."""
    return self.needed / self.moved


def compile_decoding(config, stages: Sequence[str]) -> list[CompiledDecoding]:
  """Compiles prefill, and a loop of decode steps for each of `config.compile.branches` x `requests`, and prints a
  table. Raises ValueError as `topology` and `compile_for`, or if requests cannot be divided over the mesh."""
  if not stages:
    return []
  config = on_accelerators(config)
  dtype, weights = formats(config.decode.dtype)
  mesh, kind = mesh_of(config, decoding_sizes(vars(config.mesh))), config.decode.attention
  if kind in ("tpu", "gpu", "numba") and kind != ("gpu" if config.compile.topology in GPUS else "tpu"):
    raise ValueError(f"decode.attention={kind} is not for {config.compile.topology}: leave it at auto")
  set_matmul_precision(dtype, "tpu")
  form = forms.from_config(config)
  model, vocabulary = architecture(config.model.source, form)
  make = lambda: build.abstract(in_decoding(model), jnp.dtype(dtype), fused=True, weights=weights)
  found, c = [], config.compile
  if "prefill" in stages:
    found.append(_prefill(config, make(), vocabulary, form, mesh))
  if "decode" in stages:
    for requests in c.requests:
      for branches in c.branches:
        found.append(_decode(config, make(), vocabulary, form, mesh, branches, requests))
  spoken = f"promises {form.promise}/{form.number}, visibility {form.visibility}, {config.decode.dtype}"
  _print(f"{c.topology}, {mesh.size} x {mesh.devices.flat[0].device_kind}; {spoken}", found)
  return found


def mesh_of(config, sizes: Mapping[str, int]) -> Mesh:
  """A mesh over the devices of `config.compile.topology`. Raises ValueError as `topology` and `mesh_shape`."""
  devices = topology(config.compile.topology)
  shape = mesh_shape(sizes, len(devices))
  return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


class _NoTokenizer:
  """Stands in for the tokenizer of an architecture without one: which tokens are digits changes no shape."""

  special_ids: frozenset[int] = frozenset()

  def __init__(self, size: int):
    self.vocab_size, self.eos_id = size, size - 1

  def token_bytes(self, token: int) -> bytes:
    return b"token"

  def digit_values(self) -> dict[int, tuple[int, int]]:
    return {self.eos_id - 1: (1, 10)}


def architecture(source: str, form: Forms = Forms()) -> tuple[ModelConfig, Vocabulary]:
  """Of a config.json alone, or of any source that `load_checkpoint` takes, with the vocabulary rows of `form`'s
  promises."""
  path = Path(source).expanduser()
  if path.suffix != ".json":
    checkpoint = load_checkpoint(source).speaking(form)
    return checkpoint.config, checkpoint.vocabulary
  config, tags = read_config(path), len(TAG_TEXTS)
  ids = tuple(range(tags + (len(LENGTHS) if form.number == "token" else 0)))  # any rows: all cost the same
  tokenizer: Any = _NoTokenizer(config.vocab_size)
  vocabulary = Vocabulary(tokenizer, None, ids[:tags], form.promise, form.number, ids[tags:])
  return dataclasses.replace(config, tag_ids=ids), vocabulary


def in_decoding(config: ModelConfig) -> ModelConfig:
  """The architecture in the form that decodes (`build.for_decoding`), with its tags."""
  return merged_config(config, len(config.tag_ids) or len(TAG_TEXTS), untied=True)


def _interpreter(config, model, vocabulary, form: Forms, mesh: Mesh, branches: int) -> Interpreter:
  d = config.decode.resolved({})
  limits = limits_of(d, (branches,), (config.compile.pool,), "tpu")
  features = specialise(features_of(d, form, "xla"), sampling_of(d))
  return Interpreter(model, vocabulary, limits, features, mesh)


def _on(mesh: Mesh, tree: Any, where: Any = None) -> Any:
  """Shapes of arrays with their shardings: by `where`, or replicated."""
  where = where if where is not None else jax.tree.map(lambda x: PartitionSpec(), tree)
  put = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
  return jax.tree.map(put, tree, where)


def _weights(it: Interpreter, mesh: Mesh) -> Any:
  where = shardings(mesh, it.params)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), it.params, where)


def _prompt(mesh: Mesh, tokens: int) -> tuple:
  """Shapes of a prefill's arguments after the weights: tokens, their number, a seed."""
  i, u = jnp.int32, jnp.uint32
  return _on(mesh, tuple(jax.ShapeDtypeStruct(s, t) for s, t in (((tokens,), i), ((), i), ((), u))))


def _prefill(config, model, vocabulary, form: Forms, mesh: Mesh) -> CompiledDecoding:
  it = _interpreter(config, model, vocabulary, form, mesh, 8)
  params, prompt = _weights(it, mesh), _prompt(mesh, padded_length(config.compile.prompt))
  capacity = max(it.limits.capacities[-1], prompt[0].shape[0])
  lower = lambda: it.trace("prefill", params, *prompt, capacity=capacity)
  return _figures(config, f"prefill {prompt[0].shape[0]}", mesh, lower, params)


def _decode(
  config, model, vocabulary, form: Forms, mesh: Mesh, branches: int, requests: int
) -> CompiledDecoding:
  it = _interpreter(config, model, vocabulary, form, mesh, branches)
  if requests > 1 and requests % mesh.shape["data"]:
    raise ValueError(
      f"compile.requests={requests} cannot be divided over mesh.data={mesh.shape['data']}: choose a multiple"
    )
  params, counts = _weights(it, mesh), _on(mesh, jax.ShapeDtypeStruct((), jnp.int32))
  state = it.trace("prefill", params, *_prompt(mesh, 128), capacity=config.compile.pool).out_info
  sampling = jax.eval_shape(lambda: as_arrays(SamplingConfig()))
  batch = requests > 1
  if batch:
    several = lambda x: jax.ShapeDtypeStruct((requests, *x.shape), x.dtype)
    state, sampling = jax.tree.map(several, (state, sampling))
  state = _on(mesh, state, specs(state, mesh.shape, batch=batch))
  sampling = _on(mesh, sampling, specs(sampling, mesh.shape, batch=batch))
  shape = dict(width=branches, features=it.features, look=it.limits.steps_per_look)
  program, numbers = ("batch_segment", (counts, counts)) if batch else ("segment", (counts,))
  lower = lambda: it.trace(program, params, state, sampling, *numbers, **shape)
  name = f"{requests} x {branches}" if batch else f"{branches} branch{'es' * (branches > 1)}"
  return _figures(config, name, mesh, lower, params, state.pool, it.limits.steps_per_look)


def _figures(
  config, name: str, mesh: Mesh, trace: Callable[[], Any], params: Any, pool: Any = None, look: int = 1
) -> CompiledDecoding:
  """Compiles what `trace` returns: a loop over looks of `look` steps, or, without a `pool`, a prefill."""
  platform = "cuda" if config.compile.topology in GPUS else "tpu"
  lowered = trace().lower(lowering_platforms=(platform,))
  compiled = compile_for(
    config.compile.topology,
    lowered,
    name,
    "fewer requests, a smaller pool, 8-bit weights or more chips may fit",
  )
  module, memory = Module.parse(compiled.as_text()), compiled.memory_analysis()
  part = module.entry
  if pool is not None:
    part = module.body(module.loops()[0])
    if look > 1:  # of the loops in it, the one over steps is the largest: a sort may be a loop, too
      bodies = [module.body(i) for i in module.loops(part)]
      part = max(bodies, key=lambda body: sum(module.kernels(body).values()))
  held = lambda tree: sum(_shard_bytes(x) for x in jax.tree.leaves(tree))
  weights, pools = held(params), held(pool)
  needed = weights - held(nnx.to_pure_dict(params)["embed"]) + pools
  kind, kernels = chip(mesh.devices.flat[0].device_kind), module.kernels(part)
  return CompiledDecoding(
    name=name,
    weights=weights,
    pools=pools,
    temporary=memory.temp_size_in_bytes,
    memory=kind.memory if kind else float("nan"),
    needed=needed,
    moved=module.bytes(part),
    seconds=needed / kind.bandwidth if kind else float("nan"),
    kernels=sum(kernels.values()),
    collectives=module.collectives(part),
  )


def _shard_bytes(x: jax.ShapeDtypeStruct) -> int:
  assert x.sharding is not None
  return int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize


def _print(title: str, found: Sequence[CompiledDecoding]) -> None:
  """One row a program: they may be many. It fits 80 columns."""
  columns = ("weights", "pools", "temp.", "moved", "share", "ms", "kernels", "sends", "MiB")
  table = Table("GiB a chip", title=as_text(title), box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
  for name in columns:
    table.add_column(name, justify="right")
  gib = lambda n: f"{n / 2**30:.2f}"
  for f in found:
    number, size = (sum(n) for n in zip((0, 0), *f.collectives.values()))
    table.add_row(
      f.name, gib(f.weights), gib(f.pools), gib(f.temporary), gib(f.moved), f"{f.share:.0%}", f"{f.seconds * 1e3:.2f}",
      f"{f.kernels:,}", f"{number}", f"{size / 2**20:.1f}",
    )  # fmt: skip
  rich.print(table)
  rich.print(
    f"a chip has {gib(found[0].memory)} GiB; A x B: A requests of B branches; moved: what a compiled step reads and "
    "writes, share: weights and pools, which it needs, over that; ms: to read what it needs at the memory's bandwidth; "
    "sends: collectives, and their MiB. All but temporary memory is of one step, or of the prefill."
  )
