"""Compiles training steps for a TPU slice you do not have: does a config fit, and what does it need of a
chip?

The compiler is part of the package `libtpu` (`pip install -e ".[tpu]"`) and needs no TPU. Weights are not
read.
"""

import dataclasses
import os
import re
import time
from pathlib import Path

import jax
import numpy as np
import rich
from jax.sharding import AxisType, Mesh
from rich.table import Column, Table

from pasta_jax.config import with_changes
from pasta_jax.lang import forms
from pasta_jax.lang.automaton import LENGTHS
from pasta_jax.lang.forms import Forms
from pasta_jax.lang.syntax import TAG_TEXTS
from pasta_jax.model.config import ModelConfig
from pasta_jax.model.sharding import AXES, check_rows, mesh_shape
from pasta_jax.model.transformer import set_matmul_precision
from pasta_jax.train import preference, sft
from pasta_jax.train.flops import chip
from pasta_jax.train.state import abstract_model
from pasta_jax.train.trainer import Trainer
from pasta_jax.utils.terminal import as_text
from pasta_jax.weights.checkpoint import load_checkpoint
from pasta_jax.weights.hf_config import read_config

TASKS: dict[str, type[sft.SFT] | type[preference.Preference]] = {
  task.section: task for task in (sft.SFT, preference.Preference)
}
STEPS = 100  # of the learning rate's schedule, which does not change the compiled step
# libtpu queries no metadata server for a machine it is not on, and processes do not wait for each other.
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


def compile_steps(config) -> list[Compiled]:
  """Compiles the steps of `config.compile.stages` for `config.compile.topology`, and prints a table.

  Raises ValueError, one line, if the compiler is not installed, does not know the topology, or reports that a
  step does not fit the chips' memory.
  """
  stages = config.compile.stages
  for stage in TASKS:
    kind = getattr(config, stage).attention
    config = with_changes(config, {f"{stage}.attention": "tpu" if kind == "auto" else kind})
    if kind == "gpu" and stage in stages:
      raise ValueError(f"{stage}.attention=gpu is not for TPUs: leave it at auto")
  model = model_config(config.model.source, forms.from_config(config))
  devices = topology(config.compile.topology)
  mesh = Mesh(
    np.array(devices).reshape(mesh_shape(vars(config.mesh), len(devices))),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
  )
  found = [_compile(config, stage, model, mesh) for stage in stages]
  table = Table(
    Column(as_text(f"{config.compile.topology}, {mesh.size} x {devices[0].device_kind}")), *stages
  )
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


def model_config(source: str, form: Forms = Forms()) -> ModelConfig:
  """The architecture of a config.json alone, or of any source that `load_checkpoint` takes, with the vocabulary rows
  of `form`'s promises."""
  path = Path(source).expanduser()
  if path.suffix != ".json":
    return load_checkpoint(source).speaking(form).config
  rows = len(TAG_TEXTS) + (len(LENGTHS) if form.number == "token" else 0)
  return dataclasses.replace(read_config(path), tag_ids=tuple(range(rows)))  # any rows: all cost the same


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
  except Exception as error:  # of many types: a missing package, an unknown name
    raise ValueError(
      f"compile.topology={name!r} is not available ({' '.join(str(error).split())[:160]}): names are "
      f"like v5e:4x8, v5p:2x2x4, v6e:4x4, and the package libtpu is needed"
    ) from None


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
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "Ran out of memory" not in str(error):
      raise
    sizes = re.search(r"\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", str(error))
    lack = f"a chip would need {sizes[1]} of its {sizes[2]}" if sizes else " ".join(str(error).split())[:200]
    raise ValueError(
      f"{stage} does not fit {config.compile.topology}: {lack}; fewer rows or tokens, more chips, or "
      f"another mesh or remat may fit"
    ) from None
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
