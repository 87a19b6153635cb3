"""Compiles training steps for a TPU slice you do not have: does a config fit, and what does it need of a chip?
`decode.ahead` has the programs that decode.

The compiler is part of the package `libtpu` (`pip install -e ".[tpu]"`) and needs no TPU. Weights are not
read.
"""

import dataclasses
import time
from collections.abc import Sequence

import jax
import rich
from jax.sharding import Mesh
from rich.table import Column, Table

from pasta_jax.config import with_changes
from pasta_jax.decode.ahead import CompiledDecoding, architecture, compile_decoding, mesh_of
from pasta_jax.decode.precision import on_accelerators
from pasta_jax.lang import forms
from pasta_jax.model.config import ModelConfig
from pasta_jax.model.sharding import check_rows
from pasta_jax.model.transformer import set_matmul_precision
from pasta_jax.train import preference, sft
from pasta_jax.train.state import abstract_model
from pasta_jax.train.trainer import Trainer
from pasta_jax.utils.chips import chip
from pasta_jax.utils.terminal import as_text
from pasta_jax.utils.topology import GPUS, compile_for

TASKS: dict[str, type[sft.SFT] | type[preference.Preference]] = {
  task.section: task for task in (sft.SFT, preference.Preference)
}
STEPS = 100  # of the learning rate's schedule, which does not change the compiled step


@dataclasses.dataclass
class Compiled:
  """The compiler's figures for a step; bytes are per chip."""

  stage: str
  parameters: int  # trained
  tokens: int  # of a step
  state: int  # parameters, moments, frozen weights, the batch
  temporary: int  # upper bound: includes gaps and buffers in faster memory
  memory: float  # of the chip, as its vendor states it
  flops: float  # of the whole step (`flops.step_flops`)
  seconds: float  # of the step at the chips' peak
  compiling: float  # seconds


def compile_ahead(config) -> list[Compiled | CompiledDecoding]:
  """Compiles the stages of `config.compile.stages` for `config.compile.topology`, and prints a table of the training
  steps and one of the programs that decode.

  Raises ValueError, one line, if the compiler is not installed, does not know the topology, or reports that a
  program does not fit the chips' memory.
  """
  stages = [stage for stage in config.compile.stages if stage in TASKS]
  found: list[Compiled | CompiledDecoding] = []
  if stages:
    found += compile_steps(config, stages)
  return found + compile_decoding(config, [s for s in config.compile.stages if s not in TASKS])


def compile_steps(config, stages: Sequence[str]) -> list[Compiled]:
  """The same for the training steps of these stages."""
  if config.compile.topology in GPUS:
    raise ValueError(
      f"compile.topology={config.compile.topology} is for stages that decode; train for a TPU slice"
    )
  config = on_accelerators(config)
  for stage in TASKS:
    kind = getattr(config, stage).attention
    config = with_changes(config, {f"{stage}.attention": "tpu" if kind == "auto" else kind})
    if kind == "gpu" and stage in stages:
      raise ValueError(f"{stage}.attention=gpu is not for TPUs: leave it at auto")
  model, _ = architecture(config.model.source, forms.from_config(config))
  mesh = mesh_of(config, vars(config.mesh))
  kind = mesh.devices.flat[0].device_kind
  found = [_compile(config, stage, model, mesh) for stage in stages]
  table = Table(Column(as_text(f"{config.compile.topology}, {mesh.size} x {kind}")), *stages)
  for name, show in (
    ("parameters trained", lambda f: f"{f.parameters / 1e6:,.1f} M"),
    ("tokens a step", lambda f: f"{f.tokens:,}"),
    ("memory of a chip", lambda f: f"{f.memory / 2**30:.1f} GiB"),
    ("  parameters, moments, batch", lambda f: f"{f.state / 2**30:.2f} GiB"),
    ("  temporary, at most", lambda f: f"{f.temporary / 2**30:.2f} GiB"),
    ("FLOPs of the model, a step", lambda f: f"{f.flops / 1e12:,.1f} T"),
    ("  at the chips' peak", lambda f: f"{f.seconds * 1e3:,.1f} ms"),
    ("compiled in", lambda f: f"{f.compiling:.0f} s"),
  ):
    table.add_row(name, *map(show, found))
  rich.print(table)
  return found


def abstract_trainer(config, stage: str, model: ModelConfig, mesh) -> Trainer:
  """The trainer of a stage, with shapes in place of parameters."""
  task = TASKS[stage](getattr(config, stage), form=forms.from_config(config))
  return Trainer(task, abstract_model(model, task.settings, tags=task.tags), mesh, steps=STEPS)


def _compile(config, stage: str, model: ModelConfig, mesh: Mesh) -> Compiled:
  c = getattr(config, stage)
  check_rows(mesh, c.batch_size, f"{stage}.batch_size")
  set_matmul_precision(c.dtype, "tpu")
  trainer = abstract_trainer(config, stage, model, mesh)
  started = time.perf_counter()
  with jax.set_mesh(mesh):
    lowered = trainer.update.trace(*trainer.abstract_arguments()).lower(lowering_platforms=("tpu",))
  compiled = compile_for(
    config.compile.topology,
    lowered,
    stage,
    "fewer rows or tokens, more chips, or another mesh or remat may fit",
  )
  memory, kind = compiled.memory_analysis(), mesh.devices.flat[0].device_kind
  limits = chip(kind)
  return Compiled(
    stage=stage,
    parameters=sum(x.size for x in jax.tree.leaves(trainer.trainable)),
    tokens=trainer.tokens,
    state=memory.argument_size_in_bytes,
    temporary=memory.temp_size_in_bytes,
    memory=limits.memory if limits else float("nan"),
    flops=trainer.flops,
    seconds=trainer.flops / mesh.size / limits.peak if limits else float("nan"),
    compiling=time.perf_counter() - started,
  )
