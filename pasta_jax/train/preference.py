"""Training on pairs of answers: the same model, masks, optimiser and loop as SFT, another loss."""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from pasta_jax.config import identity
from pasta_jax.data.pairs import PairBatches, PreferencePair
from pasta_jax.data.pipeline import Batch, DataIterator, fingerprint
from pasta_jax.lang.layout import PositionRule
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.model.transformer import set_matmul_precision
from pasta_jax.train.attention import check_machine
from pasta_jax.train.loop import checked_workdir, run_steps
from pasta_jax.train.preference_loss import answer_log_likelihood, default_beta, preference_loss
from pasta_jax.train.sft import export, positions_of
from pasta_jax.train.sharding import check_rows, make_mesh, shard_put_batch
from pasta_jax.train.state import (
  TrainState,
  checkpoint_metadata,
  compute_model,
  init_train_state,
  make_model,
  make_optimizer,
)
from pasta_jax.train.update import make_step
from pasta_jax.utils.progress import progress_bar
from pasta_jax.utils.records import Records
from pasta_jax.weights.checkpoint import Checkpoint


def make_pair_update(graph, optimiser: optax.GradientTransformation, config, beta: float):
  """`update.make_step` over batches of `data.pairs`."""
  loss = partial(
    preference_loss,
    loss=config.loss,
    alpha=config.alpha,
    beta=beta,
    per_token=config.per_token,
    chunk=config.loss_chunk,
    remat=config.remat,
    attention=config.attention,
  )

  def one(trainable, frozen, batch):
    return loss(compute_model(graph, trainable, frozen, config.dtype), batch)

  def means(sums, pairs):
    return {name: sums[name] / pairs for name in ("loss", "margin", "accuracy", "chosen", "rejected")} | {
      "ref_logp_drop": sums["ref_logp_drop"] / jnp.maximum(sums["tokens"], 1)
    }

  return make_step(one, optimiser, over="pairs", means=means)


def answer_likelihoods(
  graph,
  trainable,
  frozen,
  config,
  mesh: Mesh,
  batches: PairBatches,
  done: Callable[[int, tuple[float, float]], None],
) -> None:
  """`done(i, (log p of the chosen, of the rejected answer))` of each pair by the trainer's own forward
  pass."""
  run = jax.jit(
    lambda trainable, frozen, batch: answer_log_likelihood(
      compute_model(graph, trainable, frozen, config.dtype),
      batch,
      chunk=config.loss_chunk,
      attention=config.attention,
    )
  )
  for step, members in enumerate(batches.epoch(0)):
    found = np.asarray(run(trainable, frozen, shard_put_batch(mesh, batches(step))))
    for i, (chosen, rejected) in zip(members, found):
      done(i, (float(chosen), float(rejected)))


def _reference_key(pair: PreferencePair) -> str:
  """Changes with what the reference model reads."""
  parts = [a.tobytes() for e in (pair.chosen, pair.rejected) for a in (e.tokens, e.positions, e.targets)]
  return hashlib.sha256(b"".join(parts)).hexdigest()[:24]


def mesh_for(config) -> Mesh:
  """The devices that train. Raises ValueError, one line, if they do not fit `config.mesh`, the batch's rows
  and the program for attention."""
  check_machine(config.preference, "preference")
  mesh = make_mesh(vars(config.mesh))
  check_rows(mesh, config.preference.batch_size, "preference.batch_size")
  return mesh


def train_on_pairs(
  config,
  workdir: str | Path,
  pairs: Sequence[PreferencePair],
  *,
  checkpoint: Checkpoint,
  vocabulary: Vocabulary,
  rule: PositionRule,
  adapter: Path,
  notes: dict[str, str],
) -> None:
  """Trains `config.preference` on pairs, from the policy that `adapter` is.

  That policy is the reference too: its log p of every pair is computed once and kept in `reference.jsonl`.
  `notes` go into the new adapter's header. Leaves what SFT leaves. Raises ValueError, one line, for settings
  or folders that cannot be used.
  """
  c = config.preference
  mesh = mesh_for(config)
  set_matmul_precision(c.dtype)
  workdir = checked_workdir(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  graph, trainable, frozen = make_model(checkpoint, vocabulary, c, adapter=adapter, mesh=mesh)
  levels = max(e.masked_intervals.shape[1] for p in pairs for e in (p.chosen, p.rejected))
  shape = dict(rows=c.batch_size, length=c.length, levels=levels, seed=c.seed)

  records = Records(
    workdir / "reference.jsonl",
    {"reference": hashlib.sha256(adapter.read_bytes()).hexdigest(), "dtype": c.dtype},
  )
  keys = [_reference_key(p) for p in pairs]
  todo = [i for i, key in enumerate(keys) if key not in records.rows]
  if todo:
    bar, task = progress_bar("reference", len(pairs), len(pairs) - len(todo))

    def note(i: int, log_p: tuple[float, float]) -> None:
      records.add({"id": keys[todo[i]], "log_p": log_p})
      bar.advance(task)

    with bar, jax.set_mesh(mesh):
      answer_likelihoods(
        graph, trainable, frozen, c, mesh, PairBatches([pairs[i] for i in todo], **shape), note
      )
  pairs = [dataclasses.replace(p, reference=tuple(records.rows[k]["log_p"])) for p, k in zip(pairs, keys)]

  batches = PairBatches(pairs, **shape)
  per_epoch = batches.steps_in_epoch(0) / c.grad_accum_steps
  total = c.steps or math.ceil(c.epochs * per_epoch)
  beta = c.beta or default_beta(c.loss, c.samples)
  print(f"{len(pairs)} pairs; {total} steps, {per_epoch:.0f} an epoch; {c.loss}, beta {beta:.4f}")
  optimiser, schedule = make_optimizer(c, total)
  update = make_pair_update(graph, optimiser, c, beta)

  def one_step(step: int, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, float]]:
    started = time.perf_counter()
    state, metrics = update(state, frozen, shard_put_batch(mesh, batch))
    scalars = {k: float(v) for k, v in metrics.items()}
    seconds = time.perf_counter() - started
    return state, scalars | {
      "learning_rate": float(schedule(step)),
      "epoch": (step + 1) / per_epoch,
      "pairs_per_second": scalars["pairs"] / seconds,
    }

  state = init_train_state(mesh, trainable, optimiser)
  metadata = {"preference": json.dumps(identity(c)), **positions_of(rule), **notes}
  with jax.set_mesh(mesh):
    feed = DataIterator(
      batches,
      steps=total,
      grad_accum_steps=c.grad_accum_steps,
      identity=fingerprint([e for p in pairs for e in (p.chosen, p.rejected)]),
    )
    state = run_steps(
      config,
      workdir,
      state,
      total,
      one_step,
      feed,
      checkpoint_every=c.checkpoint_every,
      checkpoint_metadata=checkpoint_metadata(checkpoint, nnx.merge(graph, trainable, frozen), metadata),
    )
  model = compute_model(graph, state.trainable, frozen, jnp.float32)
  export(workdir, model, checkpoint.tokenizer, full=c.lora_rank == 0, metadata=metadata)
