"""The trainer of every stage: one jitted step, one loop and one export for all tasks (`sft`, `preference`).

A new kind of training is a subclass of `Task`: it names its section of the config, computes the loss of a
batch as sums, and provides numbered batches. `train/sft.py` is the example to copy. The mesh, gradient
accumulation, mixed precision, the optimiser, checkpoints, resuming, several processes and the exported
adapter come from `Trainer`.
"""

import abc
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pasta_jax.config.sections import kept_folder
from pasta_jax.data.pipeline import Batch, DataIterator
from pasta_jax.lang.forms import Forms
from pasta_jax.model.sharding import (
  batch_spec,
  check_rows,
  constrain,
  local_rows,
  make_mesh,
  shard_put_batch,
  shardings,
)
from pasta_jax.model.transformer import Transformer
from pasta_jax.train.attention import DeviceBatch, check_machine
from pasta_jax.train.checkpoints import checkpoint_metadata
from pasta_jax.train.flops import step_flops
from pasta_jax.train.loop import run_steps
from pasta_jax.train.state import (
  Params,
  SplitModel,
  TrainState,
  compute_model,
  init_train_state,
  make_optimizer,
)
from pasta_jax.utils import distributed
from pasta_jax.weights.adapter import save_adapter
from pasta_jax.weights.build import to_params
from pasta_jax.weights.checkpoint import Checkpoint
from pasta_jax.weights.hf_folder import save_hf_folder
from pasta_jax.weights.tokenizer import Tokenizer

Sums = dict[str, jax.Array]  # scalars


class Task(abc.ABC):
  """What differs between one kind of training and another.

  `loss`, `means` and `batch_shapes` need settings only, so that a step can be compiled or measured without
  data; `batch`, `batches_per_epoch` and `fingerprint` describe the data of a run.
  """

  section: ClassVar[str]  # of the config
  count: ClassVar[str]  # which of the loss's sums the loss and its gradient are divided by

  def __init__(self, settings, form: Forms = Forms()):
    """`settings` is the config's section; the trainer reads batch_size, length, grad_accum_steps, steps,
    epochs, dtype, lora_rank, checkpoint_every and the optimiser's settings. `form` is that of the language in which
    the adapter will decode."""
    self.settings, self.form = settings, form

  @property
  def tags(self) -> bool:
    """Whether the model has trainable tag rows."""
    return True

  @abc.abstractmethod
  def loss(self, model: Transformer, batch: DeviceBatch) -> tuple[jax.Array, Sums]:
    """(sum of the losses of a batch, sums for `means`, `count` among them). Traced."""

  @abc.abstractmethod
  def means(self, sums: Sums, count: jax.Array) -> Sums:
    """Metrics of a step, from the sums over its batches; `loss` must be one. Traced."""

  @abc.abstractmethod
  def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of one batch, with one nesting level."""

  @abc.abstractmethod
  def batch(self, number: int, rows: Sequence[int]) -> Batch:
    """The given rows of a batch, a function of the seed and `number` alone, which counts over all epochs.
    Called in several threads."""

  @property
  @abc.abstractmethod
  def batches_per_epoch(self) -> int: ...

  @property
  @abc.abstractmethod
  def fingerprint(self) -> str:
    """Changes with the data (`data.pipeline.fingerprint`)."""

  def prepare(self, batches: DeviceBatch) -> DeviceBatch:
    """A step's batches on the devices, leaves [A, B, …], with what another model says of them."""
    return batches

  def header(self) -> dict[str, str]:
    """Entries of the trained adapter's header."""
    return {}

  def scalars(self, trainer: "Trainer", metrics: dict[str, float], seconds: float) -> dict[str, float]:
    """More scalars for `metrics.jsonl`, after a step that took `seconds`."""
    return {}

  @property
  def kept(self) -> tuple[float, ...]:
    """Shares of all steps after which the trainer also exports the result so far."""
    return ()

  def validate(self, trainer: "Trainer", state: TrainState, step: int) -> dict[str, float]:
    """Scalars of a validation after update number `step`; none if no validation is due."""
    return {}

  @property
  def steps_per_epoch(self) -> float:
    return self.batches_per_epoch / self.settings.grad_accum_steps

  @property
  def total_steps(self) -> int:
    """Updates of the whole run."""
    return self.settings.steps or math.ceil(self.settings.epochs * self.steps_per_epoch)


def make_update(task: Task, graph: Any, optimiser: optax.GradientTransformation):
  """The jitted step: (state, frozen, batches) -> (state, metrics).

  `batches` has leaves [A, B, …]: the losses of A batches are summed and divided by their total `task.count`,
  which equals the loss of one large batch. The state's buffers are donated; on a mesh (`jax.set_mesh`) its
  arrays keep their shardings.
  """

  def loss(trainable, frozen, batch):
    return task.loss(compute_model(graph, trainable, frozen, task.settings.dtype), batch)

  @partial(jax.jit, donate_argnums=0)
  def step(state: TrainState, frozen, batches):
    def add(sums, batch):
      (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(state.trainable, frozen, batch)
      return jax.tree.map(jnp.add, sums, (constrain(gradient), metrics)), None

    first = jax.tree.map(lambda x: x[0], batches)
    _, shapes = jax.eval_shape(loss, state.trainable, frozen, first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (gradient, sums), _ = jax.lax.scan(add, (jax.tree.map(jnp.zeros_like, state.trainable), zeros), batches)
    count = jnp.maximum(sums[task.count], 1)
    gradient = jax.tree.map(lambda g: g / count, gradient)
    updates, optimiser_state = optimiser.update(gradient, state.optimiser, state.trainable)
    metrics = task.means(sums, count) | {
      task.count: sums[task.count],
      "gradient_norm": optax.global_norm(gradient),
    }
    return constrain(
      TrainState(state.step + 1, optax.apply_updates(state.trainable, updates), optimiser_state)
    ), metrics

  return step


class Trainer:
  """A task with its model, optimiser and mesh.

  To train, call `fit`. To compile or measure a step, use `update` with `init_state` or `abstract_arguments`.
  To run the model's forward pass as training does, use `evaluator`.

  To add a task, subclass `Task` and write a function like `sft.train`: read the data, then

      task = MyTask(config.mine, data)
      model = make_model(checkpoint, checkpoint.vocabulary, config.mine, tags=task.tags, mesh=mesh)
      Trainer(task, model, mesh, steps=task.total_steps).fit(workdir, config, checkpoint)
  """

  def __init__(self, task: Task, model: SplitModel, mesh: Mesh, *, steps: int = 0):
    """`model` is on the mesh, or has shapes only (`state.abstract_model`). `steps`: updates of the whole run,
    which the learning rate's schedule depends on; not needed for `evaluator`."""
    self.task, self.mesh, self.steps = task, mesh, steps
    self.graph, self.trainable, self.frozen = model
    self.architecture = nnx.merge(*model).config
    self.optimiser, self.schedule = make_optimizer(task.settings, steps)
    self.update = make_update(task, self.graph, self.optimiser)
    self.evaluate = self.evaluator(lambda model, batch: task.loss(model, batch)[1])  # sums of a batch

  @property
  def full(self) -> bool:
    """Whether every parameter is trained."""
    return self.task.settings.lora_rank == 0

  @property
  def tokens(self) -> int:
    """Tokens of a step, padding included."""
    c = self.task.settings
    return c.grad_accum_steps * c.batch_size * c.length

  @property
  def flops(self) -> float:
    """FLOPs of a step (`flops.step_flops`)."""
    c = self.task.settings
    return c.grad_accum_steps * step_flops(self.architecture, c.batch_size, c.length, full=self.full)

  def init_state(self) -> TrainState:
    """The state before the first step. It holds the trainer's parameters, so the first update donates
    them."""
    return init_train_state(self.mesh, self.trainable, self.optimiser)

  def abstract_arguments(self) -> tuple[TrainState, Params, DeviceBatch]:
    """Arguments of `update` as shapes, with the shardings that training gives them."""

    def placed(tree):
      return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings(self.mesh, tree)
      )

    def stacked(name: str, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
      where = NamedSharding(self.mesh, batch_spec(name, axis=1))
      return jax.ShapeDtypeStruct((self.task.settings.grad_accum_steps, *x.shape), x.dtype, sharding=where)

    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(step, self.trainable, jax.eval_shape(self.optimiser.init, self.trainable))
    batches = {name: stacked(name, x) for name, x in self.task.batch_shapes().items()}
    return placed(state), placed(self.frozen), batches  # type: ignore[return-value]

  def evaluator(self, f: Callable[[Transformer, DeviceBatch], Any]) -> Callable[[Params, Batch], Any]:
    """`run(trainable, batch)`: `f(model, batch)`, jitted, as NumPy arrays in every process. Every process
    passes the whole batch, leaves [B, …]."""
    whole = NamedSharding(self.mesh, PartitionSpec())

    @partial(jax.jit, out_shardings=whole)
    def compute(trainable, frozen, batch):
      return f(compute_model(self.graph, trainable, frozen, self.task.settings.dtype), batch)

    def run(trainable, batch):
      with jax.set_mesh(self.mesh):
        return jax.tree.map(np.asarray, compute(trainable, self.frozen, shard_put_batch(self.mesh, batch)))

    return run

  def fit(self, workdir: Path, config, checkpoint: Checkpoint) -> None:
    """Runs the task's steps, from the newest checkpoint in `workdir` if there is one, and exports the result.

    `checkpoint` is what the model was made from. Leaves `adapter.safetensors` (`export`), the same in a folder for
    each share of `task.kept` (`sections.kept_folder`), and the files of
    `loop.run_steps`, whose exceptions this raises. All processes take part; the first one writes.
    """
    task, c = self.task, self.task.settings
    header = task.header()
    model = nnx.merge(self.graph, self.trainable, self.frozen)
    rows = local_rows(self.mesh, c.batch_size)
    export_to = partial(self._export, tokenizer=checkpoint.tokenizer, metadata=header)

    def one_step(number: int, state: TrainState, batches: Batch) -> tuple[TrainState, dict[str, float]]:
      state, scalars = self._step(rows, number, state, batches)
      for share in task.kept:
        if number + 1 == math.ceil(share * self.steps):
          export_to(workdir / kept_folder(share), state)
      return state, scalars

    with jax.set_mesh(self.mesh):
      feed = DataIterator(
        lambda number: task.batch(number, rows),
        steps=self.steps,
        grad_accum_steps=c.grad_accum_steps,
        identity=task.fingerprint,
      )
      state = run_steps(
        config,
        workdir,
        self.init_state(),
        self.steps,
        one_step,
        feed,
        checkpoint_every=c.checkpoint_every,
        checkpoint_metadata=checkpoint_metadata(checkpoint, model, header),
      )
      export_to(workdir, state)

  def _export(
    self, folder: Path, state: TrainState, *, tokenizer: Tokenizer, metadata: dict[str, str]
  ) -> None:
    """`export` of a state, by the first process; all take part."""
    trainable, frozen = distributed.to_host((state.trainable, self.frozen), self.mesh)
    if distributed.is_first():
      folder.mkdir(exist_ok=True)
      model = compute_model(self.graph, trainable, frozen, jnp.float32)
      export(folder, model, tokenizer, full=self.full, metadata=metadata)

  def _step(
    self, rows: Sequence[int], number: int, state: TrainState, batches: Batch
  ) -> tuple[TrainState, dict[str, float]]:
    """Step `number` (from 0) on this process's `rows` of its batches."""
    task = self.task
    started = time.perf_counter()
    share = (rows, task.settings.batch_size)
    prepared = task.prepare(shard_put_batch(self.mesh, batches, share))
    state, metrics = self.update(state, self.frozen, prepared)
    scalars = {k: float(v) for k, v in metrics.items()}
    seconds = time.perf_counter() - started
    scalars |= {
      "learning_rate": float(self.schedule(number)),
      "epoch": (number + 1) / task.steps_per_epoch,
    }
    scalars |= task.scalars(self, scalars, seconds)
    return state, scalars | task.validate(self, state, number + 1)


def training_mesh(config, section: str) -> Mesh:
  """The devices that train. Raises ValueError, one line, if they do not fit `config.mesh`, the batch's rows
  or the attention program."""
  check_machine(getattr(config, section), section)
  mesh = make_mesh(vars(config.mesh))
  check_rows(mesh, getattr(config, section).batch_size, f"{section}.batch_size")
  return mesh


def export(
  workdir: Path, model: Transformer, tokenizer: Tokenizer, *, full: bool, metadata: dict[str, str]
) -> None:
  """Writes what decoding loads: `adapter.safetensors` with low-rank updates and tag rows. After full training
  the weights are in `model/`, a Hugging Face folder that the adapter names, and the adapter holds the tag
  rows.
  """
  if full:
    of_weights = hashlib.sha256()
    for weights in save_hf_folder(workdir / "model", model.config, to_params(model), tokenizer):
      with weights.open("rb") as file:
        of_weights.update(hashlib.file_digest(file, "sha256").digest())
    metadata = metadata | {"base": "model", "base's sha256": of_weights.hexdigest()}
  save_adapter(workdir / "adapter.safetensors", model, metadata)
