"""Training steps compiled for TPUs that are not here: does a config fit a slice, and what does it ask of a
chip?

The compiler is that of the package `libtpu` (`pip install -e ".[tpu]"`), which needs no TPU. Weights are not
read.
"""

import dataclasses
import os
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.table import Table

from pasta_jax.config import with_changes
from pasta_jax.lang.syntax import TAG_TEXTS
from pasta_jax.model import lora
from pasta_jax.model.config import ModelConfig
from pasta_jax.model.transformer import Transformer, set_matmul_precision, stack
from pasta_jax.train import preference, sft
from pasta_jax.train.flops import chip, step_flops
from pasta_jax.train.preference_loss import default_beta
from pasta_jax.train.sharding import AXES, ROWS, check_rows, mesh_shape, shardings
from pasta_jax.train.state import TrainState, make_optimizer, split
from pasta_jax.weights.checkpoint import load_checkpoint
from pasta_jax.weights.hf_config import read_config

# libtpu asks no metadata server for a machine that it is not on, and processes need not wait for each other.
_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_LOG_DIR": "disabled",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
}


@dataclasses.dataclass
class Compiled:
  """What the compiler says of a step; bytes are a chip's."""

  stage: str
  parameters: int  # that are trained
  tokens: int  # a step
  state: int  # parameters, moments, frozen weights, the batch
  temporary: int  # an upper bound: gaps, and what lies in faster memory, are counted
  memory: float  # that the chip has, as its maker states it
  flops: float  # of the whole step (`flops.step_flops`)
  seconds: float  # that it would take at the chips' peak
  compiling: float  # seconds that it took


def compile_steps(config) -> list[Compiled]:
  """Compiles the steps of `config.compile.stages` for `config.compile.topology`, and prints a table.

  Raises ValueError, one line, if the compiler is not installed, does not know the topology, or finds that a
  step does not fit the chips' memory.
  """
  stages = config.compile.stages
  for stage in ("train", "preference"):
    kind = getattr(config, stage).attention
    config = with_changes(config, {f"{stage}.attention": "tpu" if kind == "auto" else kind})
    if kind == "gpu" and stage in stages:
      raise ValueError(f"{stage}.attention=gpu is not for TPUs: leave it at auto")
  model = model_config(config.model.source)
  devices = topology(config.compile.topology)
  mesh = Mesh(
    np.array(devices).reshape(mesh_shape(vars(config.mesh), len(devices))),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
  )
  found = [_compile(config, stage, model, mesh) for stage in stages]
  table = Table(f"{config.compile.topology}, {mesh.size} x {devices[0].device_kind}", *stages)
  for name, show in (
    ("parameters trained", lambda f: f"{f.parameters / 1e6:,.1f} M"),
    ("tokens a step", lambda f: f"{f.tokens:,}"),
    ("memory of a chip", lambda f: f"{f.memory / 2**30:.1f} GiB"),
    ("  parameters, moments, batch", lambda f: f"{f.state / 2**30:.2f} GiB"),
    ("  beside them, at most", lambda f: f"{f.temporary / 2**30:.2f} GiB"),
    ("FLOPs of the model, a step", lambda f: f"{f.flops / 1e12:,.1f} T"),
    ("  at the chips' peak", lambda f: f"{f.seconds * 1e3:,.1f} ms"),
    ("compiled in", lambda f: f"{f.compiling:.0f} s"),
  ):
    table.add_row(name, *map(show, found))
  rich.print(table)
  return found


def model_config(source: str) -> ModelConfig:
  """The architecture of a model's folder, of a config.json alone, or of what `load_checkpoint` takes."""
  path = Path(source).expanduser()
  if path.suffix != ".json":
    return load_checkpoint(source).config
  config = read_config(path)
  return dataclasses.replace(
    config, tag_ids=tuple(range(len(TAG_TEXTS)))
  )  # which rows they are costs nothing


def topology(name: str) -> list[jax.Device]:
  """The devices of a TPU slice, "v5e:4x8"."""
  for key, value in _ENVIRONMENT.items():
    os.environ.setdefault(key, value)
  from jax.experimental import topologies

  one = re.fullmatch(r"[^:]+:1x1(x1)?", name)
  try:
    return topologies.get_topology_desc(
      platform="tpu", topology_name=name, **({"chips_per_host_bounds": [1, 1, 1]} if one else {})
    ).devices
  except Exception as error:  # its own kinds are many: a missing package, an unknown name
    raise ValueError(
      f"compile.topology={name!r} is not to be had ({' '.join(str(error).split())[:160]}): names are "
      f"like v5e:4x8, v5p:2x2x4, v6e:4x4, and the package libtpu is needed"
    ) from None


def abstract_model(config: ModelConfig, c, *, tags: bool) -> tuple[Any, Any, Any]:
  """`state.make_model` in shapes alone."""
  full = c.lora_rank == 0

  def make() -> Transformer:
    model = stack(Transformer(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(jnp.float32 if full else c.dtype)))
    if tags:
      lora.add_tags(model, jnp.zeros((len(TAG_TEXTS), config.d_model)))  # type: ignore[arg-type]
    if not full:
      lora.add_lora(model, c.lora_rank, c.lora_alpha, nnx.Rngs(0))
    return model

  return split(nnx.eval_shape(make), full=full)


def abstract_step(config, stage: str, model: ModelConfig, mesh) -> tuple[Any, tuple]:
  """(the jitted update of a stage, its arguments in shapes with the shardings that training gives them)."""
  c = config.train if stage == "train" else config.preference
  tags = stage == "preference" or c.annotation != "none"
  graph, trainable, frozen = abstract_model(model, c, tags=tags)
  optimiser, _ = make_optimizer(c, 100)
  state = TrainState(
    jax.ShapeDtypeStruct((), jnp.int32),  # type: ignore[arg-type]
    trainable,
    jax.eval_shape(optimiser.init, trainable),
  )
  placed = lambda tree: jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings(mesh, tree)
  )
  update = (
    sft.make_update(graph, optimiser, c)[0]
    if stage == "train"
    else preference.make_pair_update(graph, optimiser, c, c.beta or default_beta(c.loss, c.samples))
  )
  return update, (placed(state), placed(frozen), _batches(c, mesh, stage == "preference"))


def _batches(c, mesh, of_pairs: bool) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of a step's batches (`data.packing`, `data.pairs`)."""
  rows, length = c.batch_size, c.length
  fields: dict[str, tuple[int, ...]] = {
    name: (rows, length) for name in ("tokens", "positions", "targets", "segment_ids")
  }
  fields |= {"masked_intervals": (rows, length, 1, 2)} | ({"answers": (rows, length)} if of_pairs else {})
  divided, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, ROWS), ()))
  out = {
    name: jax.ShapeDtypeStruct((c.grad_accum_steps, *shape), jnp.int32, sharding=divided)
    for name, shape in fields.items()
  }
  for name, shape in {"reference": (2 * rows, 2), "weight": (2 * rows,)}.items() if of_pairs else ():
    out[name] = jax.ShapeDtypeStruct((c.grad_accum_steps, *shape), jnp.float32, sharding=whole)
  return out


def _compile(config, stage: str, model: ModelConfig, mesh: Mesh) -> Compiled:
  c = config.train if stage == "train" else config.preference
  check_rows(mesh, c.batch_size, f"{stage}.batch_size")
  set_matmul_precision(c.dtype, "tpu")
  update, arguments = abstract_step(config, stage, model, mesh)
  started = time.perf_counter()
  with jax.set_mesh(mesh):
    lowered = update.trace(*arguments).lower(lowering_platforms=("tpu",))
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "Ran out of memory" not in str(error):
      raise
    found = re.search(r"\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", str(error))
    lack = f"a chip would need {found[1]} of its {found[2]}" if found else " ".join(str(error).split())[:200]
    raise ValueError(
      f"{stage} does not fit {config.compile.topology}: {lack}; fewer rows or tokens, more chips, or "
      f"another mesh or remat may do"
    ) from None
  memory, kind = compiled.memory_analysis(), mesh.devices.flat[0].device_kind
  flops = c.grad_accum_steps * step_flops(model, c.batch_size, c.length, full=c.lora_rank == 0)
  limits = chip(kind)
  return Compiled(
    stage=stage,
    parameters=sum(x.size for x in jax.tree.leaves(arguments[0].trainable)),
    tokens=c.grad_accum_steps * c.batch_size * c.length,
    state=memory.argument_size_in_bytes,
    temporary=memory.temp_size_in_bytes,
    memory=limits.memory if limits else float("nan"),
    flops=flops,
    seconds=flops / mesh.size / limits.peak if limits else float("nan"),
    compiling=time.perf_counter() - started,
  )
