"""Steps compiled for machines you do not have, and their cost."""

import dataclasses
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from test_data import example_of
from test_model import TIED, UNTIED

from configs import tiny
from configs.paper import gemma_7b
from pasta_jax.config import Config, from_flags, with_changes
from pasta_jax.data.packing import PackedBatches
from pasta_jax.data.pairs import PairBatches, PreferencePair
from pasta_jax.model.sharding import AXES
from pasta_jax.train import ahead
from pasta_jax.train.flops import matmul_parameters, step_flops
from pasta_jax.train.state import abstract_model
from pasta_jax.utils.chips import chip
from pasta_jax.weights.arrays import param_shapes

ROOT = Path(__file__).parents[2]
GEMMA = str(Path(gemma_7b.__file__).with_suffix(".json"))


@pytest.mark.parametrize("config", [TIED, UNTIED])
def test_matrices_are_counted(config):
  """A tied head is a matrix product, an embedding a lookup."""
  sizes = {name: int(np.prod(shape)) for name, shape in param_shapes(config).items()}
  expected = sum(n for name, n in sizes.items() if name.startswith("layers") and name.endswith("kernel"))
  assert matmul_parameters(config) == expected + config.vocab_size * config.d_model


def test_flops_are_those_of_the_products():
  """Against XLA's count for the forward pass's matrix products, one at a time."""
  c = dataclasses.replace(TIED, n_heads=4, n_kv_heads=4)
  shape = lambda *n: jax.ShapeDtypeStruct(n, "float32")
  count = lambda a, b: jax.jit(lambda x, y: x @ y).lower(a, b).compile().cost_analysis()["flops"]
  rows, length = 2, 64
  heads = c.n_heads * c.head_dim
  weights = [(c.d_model, heads)] * 3 + [(heads, c.d_model), *[(c.d_model, c.d_ff)] * 2, (c.d_ff, c.d_model)]
  layer = sum(count(shape(rows * length, n), shape(n, m)) for n, m in weights)
  scores = rows * c.n_heads * count(shape(length, c.head_dim), shape(c.head_dim, length))
  head = count(shape(rows * length, c.d_model), shape(c.d_model, c.vocab_size))
  forward = c.n_layers * (layer + 2 * scores / 2) + head
  assert step_flops(c, rows, length, full=True) == pytest.approx(3 * forward, rel=0.02)
  assert step_flops(c, rows, length, full=False) < 0.75 * step_flops(c, rows, length, full=True)


def test_chips():
  assert chip("TPU v5 lite").memory == 16e9 and chip("TPU v5").peak == 459e12  # type: ignore[union-attr]
  assert chip("NVIDIA H100 80GB HBM3").peak == 989e12 and chip("cpu") is None  # type: ignore[union-attr]


def test_abstract_steps_are_those_that_train():
  """Names, shapes and types of all arrays of a real run."""
  from pasta_jax.train.state import make_model
  from pasta_jax.weights.checkpoint import load_checkpoint

  start, checkpoint = from_flags(tiny.get_config()), load_checkpoint("tiny")
  for rank in (0, 4):
    config = with_changes(start, {"train.lora_rank": rank})
    real = make_model(checkpoint, checkpoint.vocabulary, config.train)
    shapes = abstract_model(checkpoint.config, config.train)
    for ours, theirs in zip(shapes[1:], real[1:]):
      described = lambda tree: [
        (jax.tree_util.keystr(path), x.shape, x.dtype)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
      ]
      assert described(ours) == described(theirs)


def test_abstract_batches_are_those_that_are_packed():
  """Names, types and shapes, except the number of nesting levels, which depends on the data."""
  example = example_of(0, 40)
  rows = PackedBatches([example], batch_size=2, length=64, levels=1, seed=0)(0).as_dict()
  pairs = PairBatches([PreferencePair(example, example)], rows=2, length=128, levels=1, seed=0)(0)
  start, model = from_flags(tiny.get_config()), ahead.architecture("tiny")[0]
  mesh = AbstractMesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)
  for stage, real in (("train", rows), ("preference", pairs)):
    changes = {"batch_size": 2, "length": real["tokens"].shape[1], "grad_accum_steps": 3}
    changes = {f"{stage}.{name}": value for name, value in changes.items()}
    config = with_changes(start, changes | {"language.visibility": "live"})
    trainer = ahead.abstract_trainer(config, stage, model, mesh)
    assert trainer.task.form.visibility == "live"  # that which the config trains in
    _, _, batches = trainer.abstract_arguments()
    assert {n: (x.shape, x.dtype) for n, x in batches.items()} == {
      n: ((3, *x.shape), x.dtype) for n, x in real.items()
    }


def test_what_cannot_be_compiled():
  for field, value, message in (
    ("remat", "ful", "train.remat must be one of"),
    ("grad_accum_steps", 0, "must be 1 or more"),
    ("attention", "gpu", "train.attention=gpu is not for TPUs"),
    ("dtype", "float16", "train.dtype must be one of auto, float32, bfloat16"),
  ):
    with pytest.raises(ValueError, match=message):
      ahead.compile_ahead(with_changes(Config(), {f"train.{field}": value}))
  with pytest.raises(ValueError, match="compile.topology=h100 is for stages that decode"):
    ahead.compile_ahead(with_changes(Config(), {"compile.topology": "h100"}))


@pytest.mark.skipif(find_spec("libtpu") is None, reason="the TPU compiler is not installed")
@pytest.mark.parametrize(
  "more, expected",
  [
    ([], ["4 x TPU v5 lite", "train", "14.9 GiB", "ms"]),
    (["--config.train.length=2000000"], ["error: train does not fit v5e:2x2: a chip would need"]),
    (["--config.train.batch_size=3"], ["error: train.batch_size=3 rows cannot be divided over 4 devices"]),
  ],
)
def test_the_tpu_compiler_takes_steps_and_kernels(more: list[str], expected: list[str]):
  done = subprocess.run(
    [
      sys.executable,
      "main.py",
      "--mode=compile",
      "--config=configs/tiny.py",
      "--config.train.dtype=bfloat16",
      "--config.train.batch_size=4",
      "--config.compile.topology=v5e:2x2",
      *more,
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  for text in expected:
    assert text in done.stdout + done.stderr
