"""The trainer with a task of the test's own."""

import json

import jax
import numpy as np
import pytest
from safetensors import safe_open
from test_training import LENGTH, RULE, settings, tiny  # noqa: F401  (a fixture)

from pasta_jax.data.examples import examples
from pasta_jax.data.packing import PackedBatches
from pasta_jax.data.pipeline import fingerprint
from pasta_jax.model.sharding import AXES, make_mesh
from pasta_jax.train.losses import sft_loss
from pasta_jax.train.sft import row_shapes
from pasta_jax.train.state import make_model
from pasta_jax.train.trainer import Task, Trainer
from pasta_jax.utils import distributed
from pasta_jax.utils.jsonl import read_jsonl
from pasta_jax.weights.checkpoint import load_checkpoint


class Halved(Task):
  """Half the negative log-likelihood, a mean over rows."""

  section, count = "train", "rows"

  def __init__(self, settings, data):
    super().__init__(settings)
    self.data, self.asked = data, set()
    self.batches = PackedBatches(data, batch_size=settings.batch_size, length=LENGTH, levels=2, seed=0)

  def loss(self, model, batch):
    total, sums = sft_loss(model, batch)
    return total / 2, {
      "loss": total / 2,
      "rows": batch["tokens"].shape[0] * jax.numpy.ones(()),
      "all": sums["loss"],
    }

  def means(self, sums, count):
    return {"loss": sums["loss"] / count, "all": sums["all"]}

  def batch_shapes(self):
    return row_shapes(self.settings.batch_size, LENGTH)

  def batch(self, number, rows):
    self.asked.add((number, tuple(rows)))
    return self.batches(number, rows).as_dict()

  @property
  def batches_per_epoch(self):
    return 4

  @property
  def fingerprint(self):
    return fingerprint(self.data)

  def header(self):
    return {"task": "halved"}

  def scalars(self, trainer, metrics, seconds):
    return {"tokens_per_row": trainer.tokens / metrics["rows"]}

  def validate(self, trainer, state, step):
    if step != trainer.steps:
      return {}
    sums = trainer.evaluate(state.trainable, self.batch(0, range(2)))
    return {"validation_loss": float(sums["loss"] / sums["rows"])}


@pytest.fixture
def parts(tiny):  # noqa: F811
  """(config, checkpoint, task, trainer) of six steps, each of two batches with two rows."""
  config, checkpoint = settings(tiny, grad_accum_steps=2), load_checkpoint(tiny / "model")
  rows = read_jsonl(tiny / "data.jsonl")
  data = examples(rows, checkpoint.vocabulary, RULE, annotation="plan", max_length=LENGTH).examples
  task = Halved(config.train, data)
  mesh = make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])
  model = make_model(checkpoint, checkpoint.vocabulary, config.train, tags=task.tags, mesh=mesh)
  return config, checkpoint, task, Trainer(task, model, mesh, steps=task.total_steps)


def test_abstract_arguments_are_those_of_a_step(parts):
  """Names, shapes, types and shardings."""
  _, _, task, trainer = parts
  batch = {name: np.stack([x, x]) for name, x in task.batch(0, range(2)).items()}
  described = lambda tree: [
    (jax.tree_util.keystr(path), x.shape, x.dtype) for path, x in jax.tree_util.tree_leaves_with_path(tree)
  ]
  state, frozen, batches = trainer.abstract_arguments()
  real = trainer.init_state()
  assert described(state) == described(real) and described(frozen) == described(trainer.frozen)
  assert {n: x.shape[:3] for n, x in batches.items()} == {n: x.shape[:3] for n, x in batch.items()}
  for ours, theirs in zip(*map(jax.tree.leaves, (state, real))):
    assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)


def test_a_task_decides_loss_batches_header_and_scalars(parts, tmp_path):
  config, checkpoint, task, trainer = parts
  before = trainer.evaluate(trainer.trainable, task.batch(0, range(2)))
  assert float(before["all"]) == pytest.approx(2 * float(before["loss"]))
  task.asked.clear()
  trainer.fit(tmp_path, config, checkpoint)
  assert task.asked == {(number, (0, 1)) for number in range(12)}  # every batch once, with all rows
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert len(lines) == 6 and [line["epoch"] for line in lines] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
  for line in lines:
    assert line["rows"] == 4 and line["tokens_per_row"] == LENGTH
    assert line["all"] == pytest.approx(2 * 4 * line["loss"])
  assert ["validation_loss" in line for line in lines] == [False] * 5 + [True]
  assert lines[-1]["validation_loss"] < 0.98 * before["loss"] / 2
  with safe_open(tmp_path / "adapter.safetensors", "flax") as file:
    assert file.metadata()["task"] == "halved"
    trained = {name: file.get_tensor(name) for name in file.keys()}
  task.asked.clear()
  model = make_model(checkpoint, checkpoint.vocabulary, config.train, tags=task.tags, mesh=trainer.mesh)
  Trainer(task, model, trainer.mesh, steps=6).fit(tmp_path, config, checkpoint)  # nothing is left to do
  assert not task.asked
  with safe_open(tmp_path / "adapter.safetensors", "flax") as file:
    for name, value in trained.items():
      np.testing.assert_array_equal(file.get_tensor(name), value)


def test_what_the_first_process_makes():
  """In a single process, the value itself; `test_sharding` has two."""
  value = {"a": [1, None, 2.5]}
  assert distributed.from_first(lambda: value) is value
  with pytest.raises(ValueError, match="wrong"):
    distributed.from_first(lambda: (_ for _ in ()).throw(ValueError("wrong")))
