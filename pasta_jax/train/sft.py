"""Supervised finetuning on annotated responses: PASTA, and Baseline-SFT on the same data without tags."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pasta_jax.config import identity
from pasta_jax.data.examples import annotators, mix, of_training
from pasta_jax.data.packing import PackedBatches, single_batches
from pasta_jax.data.pipeline import Batch, fingerprint
from pasta_jax.data.reading import pack_readings, reading
from pasta_jax.decode.generator import adapter_digest, adapter_path
from pasta_jax.decode.precision import resolve
from pasta_jax.decode.trace import from_json, lay_out
from pasta_jax.lang import forms
from pasta_jax.lang.automaton import TokenTable
from pasta_jax.lang.forms import Forms
from pasta_jax.lang.layout import Layout
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.model.transformer import Transformer, set_matmul_precision
from pasta_jax.train.attention import DeviceBatch
from pasta_jax.train.checkpoints import START, TEACHER
from pasta_jax.train.loop import checked_workdir
from pasta_jax.train.losses import length_targets, sft_loss
from pasta_jax.train.metrics import last_scalars
from pasta_jax.train.state import TrainState, make_model
from pasta_jax.train.teacher import Teacher
from pasta_jax.train.trainer import Sums, Task, Trainer, training_mesh
from pasta_jax.utils import distributed
from pasta_jax.utils.chips import chip
from pasta_jax.weights.adapter import (
  form_of,
  has_tags,
  read_file,
  read_metadata,
  settings_entry,
  weights_of,
)
from pasta_jax.weights.checkpoint import load_checkpoint


class SFT(Task):
  """Negative log-likelihood of the targets of packed rows, a mean over tokens."""

  section, count = "train", "tokens"

  def __init__(
    self,
    settings,
    data: Sequence[Layout] = (),
    held_out: Sequence[Layout] = (),
    form: Forms = Forms(),
    notes: Mapping[str, str] | None = None,
    lengths: Sequence[int] = (),
  ):
    """`data` to train on and `held_out` to validate on, laid out in `form`; `notes` are further entries of the
    adapter's header; `lengths` the ids of lengths that are one token."""
    super().__init__(settings, form)
    self._teacher: Teacher | None = None
    self._lengths = length_targets(np.asarray(lengths), settings.length_spread)
    self._notes = notes or {}
    self._data = data
    levels = max((e.masked_intervals.shape[1] for e in (*data, *held_out)), default=1)
    shape = dict(batch_size=settings.batch_size, length=settings.length, levels=levels)
    if data:
      self._batches = PackedBatches(data, seed=settings.seed, **shape)
    self._validation = single_batches(held_out, **shape)

  def follow(self, teacher: Teacher, table: TokenTable) -> None:
    """Learns text from `teacher` from now on."""
    self._teacher = teacher
    self._readings = [reading(e, table) for e in self._data]

  @property
  def tags(self) -> bool:
    return self.settings.annotation != "none"

  def loss(self, model: Transformer, batch: DeviceBatch) -> tuple[jax.Array, Sums]:
    c = self.settings
    how = dict(chunk=c.loss_chunk, remat=c.remat, attention=c.attention)
    return sft_loss(model, batch, **how, visibility=self.form.visibility, lengths=self._lengths)

  def means(self, sums: Sums, count: jax.Array) -> Sums:
    means = {"loss": sums["loss"] / count, "accuracy": sums["correct"] / count}
    if "text_loss" in sums:
      means["text_loss"] = sums["text_loss"] / jnp.maximum(sums["text_tokens"], 1)
    return means

  def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    return row_shapes(self.settings.batch_size, self.settings.length)

  def batch(self, number: int, rows: Sequence[int]) -> Batch:
    packed = self._batches(number, rows).as_dict()
    if self._teacher is not None:
      of_rows = [[self._readings[i] for i in row] for row in self._batches.rows(number, rows)]
      packed |= pack_readings(of_rows, self.settings.length)
    return packed

  def prepare(self, batches: DeviceBatch) -> DeviceBatch:
    return batches if self._teacher is None else self._teacher(batches)

  @property
  def batches_per_epoch(self) -> int:
    return self._batches.steps_in_epoch(0)

  @property
  def fingerprint(self) -> str:
    return fingerprint(self._data)

  def header(self) -> dict[str, str]:
    return {
      "train": json.dumps(identity(self.settings)),
      **(forms.to_metadata(self.form) if self.tags else {}),
      **self._notes,
    }

  def scalars(self, trainer: Trainer, metrics: dict[str, float], seconds: float) -> dict[str, float]:
    """Throughput, and model FLOPs utilisation on known chips."""
    out = {"tokens_per_second": trainer.tokens / seconds}
    if self._teacher is not None:  # whose FLOPs are not counted
      return out
    if limits := chip(trainer.mesh.devices.flat[0].device_kind):
      out["mfu"] = trainer.flops / seconds / (trainer.mesh.size * limits.peak)
    return out

  def validate(self, trainer: Trainer, state: TrainState, step: int) -> dict[str, float]:
    """Loss and accuracy over all held-out examples, every `validate_every` steps and after the last one."""
    if not self._validation or (step % self.settings.validate_every and step != trainer.steps):
      return {}
    sums = [trainer.evaluate(state.trainable, b.as_dict()) for b in self._validation]
    tokens = sum(float(s["tokens"]) for s in sums)
    return {
      "validation_loss": sum(float(s["loss"]) for s in sums) / tokens,
      "validation_accuracy": sum(float(s["correct"]) for s in sums) / tokens,
    }


def row_shapes(rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of `data.packing.PackedBatch` with one nesting level."""
  names = ("tokens", "positions", "targets", "segment_ids", "rounds")
  shapes: dict[str, tuple[int, ...]] = {name: (rows, length) for name in names}
  shapes["masked_intervals"] = (rows, length, 1, 2)
  return {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}


def train(config, workdir: str | Path | None) -> dict[str, float]:
  """Runs `config.train` to its last step in `workdir`; returns that step's metrics in the first process.

  Leaves checkpoints, `metrics.jsonl`, `tensorboard/`, `config.json` and, at the end, `adapter.safetensors`;
  after full training also `model/`, a Hugging Face folder with the weights. SIGTERM saves a checkpoint and
  raises `loop.Stopped`. Raises FloatingPointError if loss or gradient is not finite, and ValueError, one
  line, if the folder, the data, the model or an earlier run in `workdir` cannot be used; the folder is then
  unchanged.
  """
  mesh = training_mesh(config, "train")
  workdir = checked_workdir(workdir)  # before minutes of loading
  config = resolve(config, "train", workdir / "config.json")
  set_matmul_precision(config.train.dtype)
  with distributed.writing_in(workdir):
    _train(config, workdir, mesh)
    return last_scalars(workdir) if distributed.is_first() else {}


def _train(config, workdir: Path, mesh: Mesh) -> None:
  c = config.train
  form = forms.from_config(config)
  rows, held_out_rows = mix(c.data), mix(c.validation)
  checkpoint = load_checkpoint(config.model.source).speaking(form)
  start = _start(config, form, workdir)
  teacher = _teacher(config)
  task = _lay_out(config, rows, held_out_rows, checkpoint.vocabulary, start)
  if teacher is not None:
    task.follow(Teacher(checkpoint, teacher, c, mesh), checkpoint.vocabulary.table)
  model = make_model(checkpoint, checkpoint.vocabulary, c, tags=task.tags, adapter=start, mesh=mesh)
  Trainer(task, model, mesh, steps=task.total_steps).fit(workdir, config, checkpoint)


def _start(config, form: Forms, workdir: Path) -> Path | None:
  """The adapter of `train.start`. Raises ValueError, one line, if it cannot be gone on from."""
  path, tags = adapter_path(config.train.start), config.train.annotation != "none"
  if path is None:
    return None
  if path.resolve() == (workdir / "adapter.safetensors").resolve():
    raise ValueError(f"train.start={config.train.start} is the result of this --workdir: choose another")
  if weights_of(path) is not None:
    raise ValueError(
      f"train.start={config.train.start}: all weights were trained: name their folder as model.source instead"
    )
  if has_tags(path) != tags:
    kind = "a PASTA adapter" if tags else "an adapter without tags"
    raise ValueError(
      f"train.start={config.train.start}: train.annotation={config.train.annotation} needs {kind}"
    )
  if tags and (own := form_of(path)) != form:
    raise ValueError(
      f"train.start={config.train.start} speaks another form of the language ({own}) than config.language ({form})"
    )
  rank = next((a.shape[1] for a, _ in read_file(path)[0].factors.values()), 0)
  if config.train.lora_rank not in (0, rank):
    raise ValueError(
      f"train.start={config.train.start} has rank {rank}, and keeps it: give --config.train.lora_rank={rank}"
    )
  return path


def _teacher(config) -> Path | None:
  """The adapter of `train.teacher`. Raises ValueError, one line, if it cannot be learned from."""
  path, name = adapter_path(config.train.teacher), f"train.teacher={config.train.teacher}"
  if path is None:
    return None
  if has_tags(path) or weights_of(path) is not None:
    raise ValueError(
      f"{name} has tags or all weights: name a low-rank adapter without tags, as `baseline` is"
    )
  if not config.train.lora_rank:
    raise ValueError(f"{name} shares the frozen embeddings: give --config.train.lora_rank, 16 for example")
  return path


def _lay_out(
  config, rows: list[dict], held_out_rows: list[dict], vocabulary: Vocabulary, start: Path | None
) -> SFT:
  """The task over annotated rows, of an adapter that goes on from `start`. Prints how many examples are used;
  ValueError, one line, if none is left."""
  c = config.train
  form = forms.from_config(config)
  written = [row for row in rows if "trace" in row]
  rows = [row for row in rows if "trace" not in row]
  own, own_left = _own_answers(config, written, vocabulary.speaking(form), form)
  selection = of_training(config, rows, vocabulary)
  data, held_out = selection.examples, of_training(config, held_out_rows, vocabulary, all_rows=True).examples
  left_out = (
    f"left out: {selection.too_long} longer than {c.length} tokens, {selection.too_slow} with a "
    f"speedup below {c.min_speedup}, {selection.too_thin} with more or thinner chunks than wanted, "
    f"{selection.too_plain} beyond the share of plain ones"
  )
  if written:
    left_out += (
      f"; of {len(written)} own answers {own_left['cut off']} cut off, {own_left['too long']} longer"
    )
  data = [*data, *own]
  if not data:
    raise ValueError(f"no example of train.data={','.join(c.data)!r} is left to train on ({left_out})")
  before = {} if start is None else read_metadata(start)
  notes = settings_entry(config.decode, before)
  if digest := adapter_digest(c.start):
    notes[START] = digest
  if digest := adapter_digest(c.teacher):
    notes[TEACHER] = digest
  if c.annotation == "plan" and (names := annotators([*(rows[i] for i in selection.rows), before])):
    notes["annotator"] = names
  lengths = vocabulary.table.lengths.tolist() if c.annotation != "none" else []
  # Baseline-SFT has no lengths, and takes the same flags.
  if c.length_spread and c.annotation != "none" and not lengths:
    raise ValueError("train.length_spread is for lengths that are tokens: --config.language.number=token")
  task = SFT(c, data, held_out, form, notes, lengths)
  print(
    f"{len(data)} examples ({left_out}), {len(held_out)} held out; {task.total_steps} steps, "
    f"{task.steps_per_epoch:.0f} an epoch"
  )
  return task


def _own_answers(
  config, rows: Sequence[dict], vocabulary: Vocabulary, form: Forms
) -> tuple[list[Layout], dict[str, int]]:
  """The layouts of answers of the policy itself (rows with a `trace`), as it wrote them, and how many were left out by
  cause. Raises ValueError, one line, if they cannot be trained on."""
  c = config.train
  if rows and c.annotation != "plan":
    raise ValueError(
      f"{rows[0]['where']} is a policy's own answer, with its tags: train.annotation=plan learns it"
    )
  kept: list[Layout] = []
  left_out = {"cut off": 0, "too long": 0}
  for row in rows:
    try:
      trace = from_json(row["trace"], vocabulary, form.positions)
      laid = lay_out(trace, vocabulary, form.positions)
      main = laid.positions[(laid.threads == 0) & (laid.index >= 0)]  # another strategy left other gaps
      in_form = trace.form == dataclasses.replace(form, positions=trace.form.positions)
      same_form = len(trace.threads) == 1 or (in_form and np.array_equal(main, trace.threads[0].positions))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
      raise ValueError(f"{row['where']}: its trace cannot be read ({error!r})") from None
    if not same_form:
      raise ValueError(
        f"{row['where']} was written in another form of the language or of positions than {form}"
      )
    cut_off = trace.finish_reason != "stop"
    if cut_off or len(laid) > c.length:
      left_out["cut off" if cut_off else "too long"] += 1
    else:
      kept.append(laid)
  return kept, left_out
