"""Training on pairs of answers (docs/language.md section 6): the model, masks and trainer of SFT, another
loss."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from pasta_jax.config import identity
from pasta_jax.data.pairs import PairBatches, PreferencePair
from pasta_jax.data.pipeline import Batch, fingerprint
from pasta_jax.lang import forms
from pasta_jax.lang.forms import Forms
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.model.sharding import PER_PAIR
from pasta_jax.model.transformer import Transformer, set_matmul_precision
from pasta_jax.train.attention import DeviceBatch
from pasta_jax.train.loop import checked_workdir
from pasta_jax.train.losses import answer_log_likelihood, default_beta, preference_loss
from pasta_jax.train.sft import row_shapes
from pasta_jax.train.state import make_model
from pasta_jax.train.trainer import Sums, Task, Trainer, training_mesh
from pasta_jax.utils import distributed
from pasta_jax.utils.progress import progress_bar
from pasta_jax.utils.records import Records
from pasta_jax.weights.checkpoint import Checkpoint


class Preference(Task):
  """A loss over pairs of answers (`losses.preference_loss`), a mean over pairs."""

  section, count = "preference", "pairs"

  def __init__(
    self,
    settings,
    pairs: Sequence[PreferencePair] = (),
    form: Forms = Forms(),
    notes: Mapping[str, str] | None = None,
  ):
    """`pairs` were laid out in `form`; `notes` are further entries of the adapter's header."""
    super().__init__(settings, form)
    self.beta = settings.beta or default_beta(settings.loss, settings.samples)
    self._notes = notes or {}
    if pairs:
      self.use(pairs)

  def use(self, pairs: Sequence[PreferencePair]) -> None:
    """Trains on these pairs. Batches do not depend on the reference's log p, so pairs may get theirs
    later."""
    self._pairs = pairs
    self._batches = self.batches_of(pairs)

  def batches_of(self, pairs: Sequence[PreferencePair]) -> PairBatches:
    c = self.settings
    levels = max(e.masked_intervals.shape[1] for p in pairs for e in (p.chosen, p.rejected))
    return PairBatches(pairs, rows=c.batch_size, length=c.length, levels=levels, seed=c.seed)

  def loss(self, model: Transformer, batch: DeviceBatch) -> tuple[jax.Array, Sums]:
    c = self.settings
    return preference_loss(
      model,
      batch,
      loss=c.loss,
      alpha=c.alpha,
      beta=self.beta,
      per_token=c.per_token,
      chunk=c.loss_chunk,
      remat=c.remat,
      attention=c.attention,
      visibility=self.form.visibility,
    )

  def means(self, sums: Sums, count: jax.Array) -> Sums:
    means = {name: sums[name] / count for name in ("loss", "margin", "accuracy", "chosen", "rejected")}
    return means | {"ref_logp_drop": sums["ref_logp_drop"] / jnp.maximum(sums["tokens"], 1)}

  def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    rows, length = self.settings.batch_size, self.settings.length
    return row_shapes(rows, length) | {
      "answers": jax.ShapeDtypeStruct((rows, length), jnp.int32),
      "reference": jax.ShapeDtypeStruct((2 * rows, 2), jnp.float32),
      "weight": jax.ShapeDtypeStruct((2 * rows,), jnp.float32),
    }

  def batch(self, number: int, rows: Sequence[int]) -> Batch:
    return {name: x if name in PER_PAIR else x[list(rows)] for name, x in self._batches(number).items()}

  @property
  def batches_per_epoch(self) -> int:
    return self._batches.steps_in_epoch(0)

  @property
  def fingerprint(self) -> str:
    return fingerprint([e for p in self._pairs for e in (p.chosen, p.rejected)])

  @property
  def kept(self) -> tuple[float, ...]:
    return self.settings.keep

  def header(self) -> dict[str, str]:
    return {
      "preference": json.dumps(identity(self.settings)),
      **forms.to_metadata(self.form),
      **self._notes,
    }

  def scalars(self, trainer: Trainer, metrics: dict[str, float], seconds: float) -> dict[str, float]:
    return {"pairs_per_second": metrics["pairs"] / seconds}


def answer_likelihoods(
  trainer: Trainer, batches: PairBatches, on_pair: Callable[[int, tuple[float, float]], None]
) -> None:
  """Calls `on_pair(i, (log p of the chosen answer, of the rejected one))` for each pair of an epoch, under
  the parameters that the trainer starts from."""
  c, form = trainer.task.settings, trainer.task.form
  how = dict(chunk=c.loss_chunk, attention=c.attention, visibility=form.visibility)
  run = trainer.evaluator(partial(answer_log_likelihood, **how))
  for step, members in enumerate(batches.epoch(0)):
    for i, (chosen, rejected) in zip(members, run(trainer.trainable, batches(step))):
      on_pair(i, (float(chosen), float(rejected)))


def with_reference(
  trainer: Trainer, task: Preference, pairs: Sequence[PreferencePair], path: Path, made_with: dict[str, str]
) -> list[PreferencePair]:
  """The pairs with the log p of their answers under the parameters that the trainer starts from.

  They are computed once and stored in `path`, by the first process; `made_with` is what they depend on.
  """
  records: list[Records] = []  # of the first process

  def stored() -> dict[str, list[float]]:
    records.append(Records(path, made_with))
    return {key: row["log_p"] for key, row in records[0].rows.items()}

  known = distributed.from_first(stored)
  keys = [_reference_key(p) for p in pairs]
  todo = [i for i, key in enumerate(keys) if key not in known]
  if todo:
    bar, line = progress_bar("reference", len(pairs), len(pairs) - len(todo))

    def store(i: int, log_p: tuple[float, float]) -> None:
      known[keys[todo[i]]] = list(log_p)
      for file in records:
        file.add({"id": keys[todo[i]], "log_p": log_p})
      bar.advance(line)

    with bar:
      answer_likelihoods(trainer, task.batches_of([pairs[i] for i in todo]), store)
  return [dataclasses.replace(p, reference=tuple(known[key])) for p, key in zip(pairs, keys)]


def _reference_key(pair: PreferencePair) -> str:
  """Changes with what the reference model reads."""
  parts = [a.tobytes() for e in (pair.chosen, pair.rejected) for a in (e.tokens, e.positions, e.targets)]
  return hashlib.sha256(b"".join(parts)).hexdigest()[:24]


def train_on_pairs(
  config,
  workdir: str | Path,
  pairs: Sequence[PreferencePair],
  *,
  checkpoint: Checkpoint,
  vocabulary: Vocabulary,
  form: Forms,
  adapter: Path,
  notes: dict[str, str],
) -> None:
  """Trains `config.preference` on pairs, laid out in `form`, starting from the policy `adapter`, which is also the
  reference.

  The reference's log p of every pair is computed once and stored in `reference.jsonl`. `notes` go into the
  new adapter's header. Leaves the files that SFT leaves. Every process of several calls this with the same
  arguments. Raises ValueError, one line, for settings or folders that cannot be used.
  """
  c = config.preference
  mesh = training_mesh(config, "preference")
  set_matmul_precision(c.dtype)
  workdir = checked_workdir(workdir)
  with distributed.writing_in(workdir):
    task = Preference(c, pairs, form, notes)
    model = make_model(checkpoint, vocabulary, c, adapter=adapter, mesh=mesh)
    trainer = Trainer(task, model, mesh, steps=task.total_steps)
    made_with = {"reference": hashlib.sha256(adapter.read_bytes()).hexdigest(), "dtype": c.dtype}
    made_with |= {k: v for k, v in forms.to_metadata(form).items() if k == "forms"}  # none in the paper's
    task.use(with_reference(trainer, task, pairs, workdir / "reference.jsonl", made_with))
    print(
      f"{len(pairs)} pairs; {task.total_steps} steps, {task.steps_per_epoch:.0f} an epoch; {c.loss}, "
      f"beta {task.beta:.4f}"
    )
    trainer.fit(workdir, config, checkpoint)
