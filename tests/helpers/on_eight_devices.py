"""A script for `test_sharding`: SFT, stage two and a run that moves between meshes of eight virtual devices,
compared with one device.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/on_eight_devices.py FOLDER

FOLDER is that of `test_training.tiny`: `model/` and `data.jsonl`.
"""

import dataclasses
import os
import signal
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]  # as a script
sys.path[:0] = map(
  str, (TESTS.parent, TESTS, *(TESTS / d for d in ("data", "lang", "model", "train", "weights")))
)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import test_training as t  # noqa: E402
from test_attention import CONFIG, random_rows  # noqa: E402

from pasta_jax.config import with_changes  # noqa: E402
from pasta_jax.data.pairs import PreferencePair  # noqa: E402
from pasta_jax.lang.forms import Forms  # noqa: E402
from pasta_jax.model.sharding import AXES, make_mesh, shard_put, shard_put_batch  # noqa: E402
from pasta_jax.train import loop, sft  # noqa: E402
from pasta_jax.train.attention import make_attend  # noqa: E402
from pasta_jax.train.preference import Preference  # noqa: E402
from pasta_jax.train.state import SplitModel, make_model  # noqa: E402
from pasta_jax.train.trainer import Trainer  # noqa: E402

SHAPES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (1, 2, 4), (2, 2, 2)]
STEPS = 20


def steps(task, model, shape, n):
  """(parameters, metrics of each step, the state) after n steps on a mesh."""
  mesh = make_mesh(dict(zip(AXES, shape)), jax.devices()[: np.prod(shape)])
  graph, trainable, frozen = model
  copy = jax.tree.map(lambda x: jnp.array(np.asarray(x)), trainable)
  trainer = Trainer(
    task, SplitModel(graph, shard_put(mesh, copy), shard_put(mesh, frozen)), mesh, steps=STEPS
  )
  state, metrics = trainer.init_state(), []
  where = jax.tree.map(lambda x: x.sharding, state)
  with jax.set_mesh(mesh):
    for step in range(n):
      batch = {k: v[None] for k, v in task.batch(step, range(8)).items()}
      state, scalars = trainer.update(state, trainer.frozen, shard_put_batch(mesh, batch))
      metrics.append({k: float(v) for k, v in scalars.items()})
  jax.tree.map(
    lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or sys.exit(f"moved: {x.sharding}, was {s}"),
    state,
    where,
  )
  return jax.tree.map(np.asarray, state.trainable), metrics, state


def pieces(state) -> int:
  """How many of the state's arrays are sharded."""
  return sum(x.addressable_shards[0].data.size < x.size for x in jax.tree.leaves(state))


def compare(name, task, model, *, shapes=SHAPES, n=STEPS, atol=1e-5):
  params, metrics, _ = steps(task, model, (1, 1, 1), n)
  start = jax.tree.map(np.asarray, model[1])
  moved = max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), start, params)))
  assert moved > 1e-3, f"{name} trains nothing"
  for shape in shapes:
    theirs, their_metrics, state = steps(task, model, shape, n)
    for one, other in zip(metrics, their_metrics):
      for key in one:
        np.testing.assert_allclose(
          other[key], one[key], rtol=1e-5, atol=atol, err_msg=f"{name} {shape} {key}"
        )
    for one, other in zip(*map(jax.tree.leaves, (params, theirs))):
      np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5, err_msg=f"{name} {shape}")
    divided = pieces(state)
    assert (divided > 0) == (shape[1] * shape[2] > 1), (name, shape, divided)
    print(name, shape, f"{divided} arrays divided, loss {their_metrics[-1]['loss']:.4f}", flush=True)


def main(folder: Path) -> None:
  assert len(jax.devices()) == 8
  checkpoint = t.load_checkpoint(folder / "model")
  vocabulary, rows = checkpoint.vocabulary, t.read_jsonl(folder / "data.jsonl")
  lay_out = lambda spoken: t.examples(rows, spoken, t.RULE, annotation="plan", max_length=t.LENGTH).examples
  laid = lay_out(vocabulary)
  for rank in (2, 0):
    config = t.settings(folder, lora_rank=rank, learning_rate=1e-3, batch_size=8).train
    model = make_model(checkpoint, vocabulary, config)
    compare(f"sft, rank {rank}", sft.SFT(config, laid), model, shapes=SHAPES[-2:] if rank else SHAPES)
  config = dataclasses.replace(config, attention="interpret")
  # Heads repeated, and sharded; lengths that are tokens are rows behind those of the table.
  for form, shapes in ((Forms(), SHAPES[-2:]), (Forms(t.RULE, "live", "head", "token"), SHAPES[-1:])):
    spoken = checkpoint.speaking(form)
    task = sft.SFT(config, lay_out(spoken.vocabulary), form=form)
    named = f"sft by kernel, {form.visibility}, {form.number}"
    compare(named, task, make_model(spoken, spoken.vocabulary, config), shapes=shapes, n=5)
  pairs = [PreferencePair(a, b, (-300.0, -310.0 - i)) for i, (a, b) in enumerate(zip(laid[::2], laid[1::2]))]
  config = dataclasses.replace(
    t.settings(folder).preference,
    lora_rank=2,
    learning_rate=1e-3,
    dtype="float32",
    loss_chunk=256,
    batch_size=8,
    length=t.LENGTH,
    beta=0.1,
  )
  model = make_model(checkpoint, vocabulary, config)
  # A margin is a difference of sums of some hundred nats, and its square is in the loss.
  compare("preference", Preference(config, pairs), model, shapes=SHAPES[-1:], atol=1e-3)
  heads_divide()
  refused(folder)
  moved_run(folder)
  taught_run(folder)


def heads_divide() -> None:
  """Kernels with heads on four devices: of keys, of queries in one group, and too few of either."""
  mesh = make_mesh(dict(data=2, fsdp=1, tensor=4))
  rng = np.random.default_rng(0)
  batch = {name: jnp.asarray(x) for name, x in random_rows(rng, 2, 40).items()}
  for heads, groups in ((4, 1), (1, 4), (3, 1)):
    q, out = (jnp.asarray(rng.normal(size=(2, 40, heads, groups, 8)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(2, 40, heads, 8)), jnp.float32) for _ in range(2))

    def both(q, k, v, out=out):
      attend = make_attend("interpret", batch, CONFIG, jnp.float32)
      context, pull = jax.vjp(lambda *x: attend(None, *x, False)[0], q, k, v)
      return context, pull(out)

    alone = jax.jit(both)(q, k, v)
    with jax.set_mesh(mesh):
      divided = jax.jit(lambda *x: both(*x))(q, k, v)
    for one, other in zip(*map(jax.tree.leaves, (alone, divided))):
      np.testing.assert_allclose(other, one, atol=1e-5, err_msg=f"{heads} heads, {groups} groups")
  print("heads divide")


def refused(folder: Path) -> None:
  """A batch that cannot be divided over eight devices: an error of one line, and no folder."""
  try:
    sft.train(t.settings(folder, batch_size=3), folder / "refused")
  except ValueError as error:
    assert "train.batch_size=3 rows cannot be divided over 8 devices" in str(error), error
    assert not (folder / "refused").exists()
  else:
    sys.exit("three rows were taken for eight devices")


def moved_run(folder: Path) -> None:
  """A run that SIGTERM stops on one mesh resumes on another."""
  config = t.settings(folder, batch_size=8, learning_rate=1e-3, lora_rank=0)
  config = with_changes(config, {"mesh.data": 1, "mesh.fsdp": 8})
  sft.train(config, folder / "whole")
  write = loop.MetricWriter.write

  def and_terminate(self, at, scalars):
    write(self, at, scalars)
    if at == 3:
      os.kill(os.getpid(), signal.SIGTERM)

  loop.MetricWriter.write = and_terminate
  try:
    sft.train(config, folder / "moved")
  except loop.Stopped:
    loop.MetricWriter.write = write
  config = with_changes(config, {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
  sft.train(config, folder / "moved")
  lines = [[row["loss"] for row in t.metric_lines(folder / run)] for run in ("whole", "moved")]
  assert len(lines[1]) == 6
  np.testing.assert_allclose(*lines, rtol=1e-5)
  print("moved")


def taught_run(folder: Path) -> None:
  """A teacher's states reach the rows that they are of, whatever the mesh."""
  config = t.settings(folder, batch_size=8, learning_rate=1e-3, steps=3)
  sft.train(with_changes(config, {"train.annotation": "none", "train.steps": 1}), folder / "teacher")
  taught = {"train.teacher": str(folder / "teacher" / "adapter.safetensors"), "train.grad_accum_steps": 2}
  for name, mesh in (("rows", (8, 1, 1)), ("all", (2, 2, 2))):
    axes = {f"mesh.{axis}": n for axis, n in zip(AXES, mesh)}
    sft.train(with_changes(config, taught | axes), folder / f"taught_{name}")
  for key in ("loss", "text_loss"):
    lines = [[row[key] for row in t.metric_lines(folder / f"taught_{name}")] for name in ("rows", "all")]
    np.testing.assert_allclose(*lines, rtol=1e-5)
  print("taught")


if __name__ == "__main__":
  jax.config.update("jax_disable_most_optimizations", True)
  main(Path(sys.argv[1]))
