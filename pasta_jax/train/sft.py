"""Supervised finetuning on annotated responses: PASTA, and Baseline-SFT on the same data without tags.

Batch `step` is a function of seed and step, so a run that was killed goes on bit for bit (`train.loop`).
"""

import hashlib
import json
import math
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from pasta_jax.config import identity
from pasta_jax.data.examples import examples, mix
from pasta_jax.data.packing import PackedBatches, single_batches
from pasta_jax.data.pipeline import Batch, DataIterator, fingerprint
from pasta_jax.lang.layout import PositionRule
from pasta_jax.model.transformer import Transformer, set_matmul_precision
from pasta_jax.train import distributed
from pasta_jax.train.attention import check_machine
from pasta_jax.train.flops import chip, step_flops
from pasta_jax.train.loop import checked_workdir, run_steps
from pasta_jax.train.losses import sft_loss
from pasta_jax.train.metrics import last_scalars
from pasta_jax.train.sharding import check_rows, local_rows, make_mesh, shard_put_batch
from pasta_jax.train.state import (
  TrainState,
  checkpoint_metadata,
  compute_model,
  init_train_state,
  make_model,
  make_optimizer,
)
from pasta_jax.train.update import make_step
from pasta_jax.weights.adapter import save_adapter
from pasta_jax.weights.build import to_params
from pasta_jax.weights.checkpoint import load_checkpoint
from pasta_jax.weights.hf_folder import save_hf_folder
from pasta_jax.weights.tokenizer import Tokenizer


def make_update(graph, optimiser: optax.GradientTransformation, config):
  """(update, evaluate): `update.make_step` over batches of `data.packing`, and jitted sums of one of them."""
  loss = partial(sft_loss, chunk=config.loss_chunk, remat=config.remat, attention=config.attention)

  def one(trainable, frozen, batch):
    return loss(compute_model(graph, trainable, frozen, config.dtype), batch)

  def means(sums, tokens):
    return {"loss": sums["loss"] / tokens, "accuracy": sums["correct"] / tokens}

  evaluate = jax.jit(lambda trainable, frozen, batch: one(trainable, frozen, batch)[1])
  return make_step(one, optimiser, over="tokens", means=means), evaluate


def train(config, workdir: str | Path | None) -> dict[str, float]:
  """Runs `config.train` to its last step in `workdir`; returns the metrics of that step, in the first
  process.

  Leaves checkpoints, `metrics.jsonl`, `tensorboard/`, `config.json` and, at the end, `adapter.safetensors`
  there; after full training `model/` too (a Hugging Face folder, which the adapter names and finds). SIGTERM
  saves and raises `loop.Stopped`. Raises FloatingPointError when loss or gradient is not finite, and
  ValueError, one line, when folder, data, model or an earlier run in `workdir` cannot be used; the folder is
  then as it was.
  """
  c = config.train
  check_machine(c, "train")
  set_matmul_precision(c.dtype)
  mesh = make_mesh(vars(config.mesh))
  check_rows(mesh, c.batch_size, "train.batch_size")
  workdir = checked_workdir(workdir)  # before minutes of loading
  rows, held_out_rows = mix(c.data), mix(c.validation)
  checkpoint = load_checkpoint(config.model.source)
  vocabulary = checkpoint.vocabulary
  rule = PositionRule(config.positions.strategy, config.positions.fixed)
  load = partial(
    examples,
    vocabulary=vocabulary,
    rule=rule,
    annotation=c.annotation,
    max_length=c.length,
    workers=c.workers,
  )
  selection = load(rows, min_speedup=c.min_speedup, plain_share=c.plain_share)
  data, held_out = selection.examples, load(held_out_rows).examples
  left_out = (
    f"left out: {selection.too_long} longer than {c.length} tokens, {selection.too_slow} with a "
    f"speedup below {c.min_speedup}, {selection.too_plain} beyond the share of plain ones"
  )
  if not data:
    raise ValueError(f"no example of train.data={','.join(c.data)!r} is left to train on ({left_out})")
  levels = max(e.masked_intervals.shape[1] for e in data + held_out)
  shape = dict(batch_size=c.batch_size, length=c.length, levels=levels)
  batches, share = PackedBatches(data, seed=c.seed, **shape), local_rows(mesh, c.batch_size)
  validation = single_batches(held_out, **shape) if held_out else []
  per_epoch = batches.steps_in_epoch(0) / c.grad_accum_steps
  total = c.steps or math.ceil(c.epochs * per_epoch)
  print(
    f"{len(data)} examples ({left_out}), {len(held_out)} held out; {total} steps, {per_epoch:.0f} an epoch"
  )

  graph, trainable, frozen = make_model(checkpoint, vocabulary, c, tags=c.annotation != "none", mesh=mesh)
  optimiser, schedule = make_optimizer(c, total)
  state = init_train_state(mesh, trainable, optimiser)
  update, evaluate = make_update(graph, optimiser, c)
  flops = c.grad_accum_steps * step_flops(checkpoint.config, c.batch_size, c.length, full=c.lora_rank == 0)
  limits = chip(mesh.devices.flat[0].device_kind)
  peak = mesh.size * limits.peak if limits else 0.0

  def one_step(step: int, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, float]]:
    started = time.perf_counter()
    state, metrics = update(state, frozen, shard_put_batch(mesh, batch, (share, c.batch_size)))
    scalars = {k: float(v) for k, v in metrics.items()}
    seconds = time.perf_counter() - started
    scalars |= {
      "learning_rate": float(schedule(step)),
      "epoch": (step + 1) / per_epoch,
      "tokens_per_second": c.grad_accum_steps * c.batch_size * c.length / seconds,
    }
    if peak:
      scalars["mfu"] = flops / seconds / peak
    if validation and (step + 1 == total or (step + 1) % c.validate_every == 0):
      sums = [evaluate(state.trainable, frozen, shard_put_batch(mesh, b.as_dict())) for b in validation]
      tokens = sum(float(s["tokens"]) for s in sums)
      scalars["validation_loss"] = sum(float(s["loss"]) for s in sums) / tokens
      scalars["validation_accuracy"] = sum(float(s["correct"]) for s in sums) / tokens
    return state, scalars

  metadata = {"train": json.dumps(identity(c))} | (positions_of(rule) if c.annotation != "none" else {})
  with jax.set_mesh(mesh):
    feed = DataIterator(
      lambda i: batches(i, share).as_dict(),
      steps=total,
      grad_accum_steps=c.grad_accum_steps,
      identity=fingerprint(data),
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
    trainable, frozen = distributed.to_host((state.trainable, frozen), mesh)
  if not distributed.is_first():
    return {}
  export(
    workdir,
    compute_model(graph, trainable, frozen, jnp.float32),
    checkpoint.tokenizer,
    full=c.lora_rank == 0,
    metadata=metadata,
  )
  return last_scalars(workdir)


def positions_of(rule: PositionRule) -> dict[str, str]:
  """What an adapter of PASTA says in its metadata of the positions that it was trained with."""
  return {"positions": json.dumps({"strategy": rule.strategy, "fixed": rule.fixed})}


def export(
  workdir: Path, model: Transformer, tokenizer: Tokenizer, *, full: bool, metadata: dict[str, str]
) -> None:
  """What decoding loads: `adapter.safetensors` with updates and tag rows; of full training, where it only
  names its weights and holds the tags, `model/` too."""
  if full:
    of_weights = hashlib.sha256()
    for weights in save_hf_folder(workdir / "model", model.config, to_params(model), tokenizer):
      with weights.open("rb") as file:
        of_weights.update(hashlib.file_digest(file, "sha256").digest())
    metadata = metadata | {"base": "model", "base's sha256": of_weights.hexdigest()}
  save_adapter(workdir / "adapter.safetensors", model, metadata)
