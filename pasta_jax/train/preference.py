"""Training on pairs of answers: the same model, masks, optimiser and loop as SFT, another loss."""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pasta_jax.data.examples import read_jsonl
from pasta_jax.data.pairs import PairBatches, PreferencePair
from pasta_jax.lang.layout import PositionRule
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.model.checkpoint import Checkpoint
from pasta_jax.model.decoder import DTYPES, exact_products
from pasta_jax.progress import progress_bar
from pasta_jax.train.loop import checked_workdir, run_steps
from pasta_jax.train.preference_loss import LOSSES, answer_log_likelihood, default_beta, preference_loss
from pasta_jax.train.sft import export
from pasta_jax.train.state import TrainState, compute_model, make_model, make_optimiser


def make_pair_update(graph, optimiser: optax.GradientTransformation, config, beta: float):
  """The jitted update: (state, frozen, batches) -> (state, metrics), as `sft.make_update`, over `data.pairs` batches.

  `batches` has leaves [A, …]: the losses of A batches are summed and divided by all their pairs.
  """
  loss = partial(preference_loss, loss=config.loss, alpha=config.alpha, beta=beta, chunk=config.loss_chunk,
                 remat=config.remat)

  def one(trainable, frozen, batch):
    return loss(compute_model(graph, trainable, frozen, config.dtype), batch)

  @partial(jax.jit, donate_argnums=0)
  def update(state: TrainState, frozen, batches):
    def add(sums, batch):
      (_, metrics), gradient = jax.value_and_grad(one, has_aux=True)(state.trainable, frozen, batch)
      return jax.tree.map(jnp.add, sums, (gradient, metrics)), None

    first = jax.tree.map(lambda x: x[0], batches)
    _, shapes = jax.eval_shape(one, state.trainable, frozen, first)
    start = (jax.tree.map(jnp.zeros_like, state.trainable), jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))
    (gradient, sums), _ = jax.lax.scan(add, start, batches)
    pairs, tokens = jnp.maximum(sums["pairs"], 1), jnp.maximum(sums["tokens"], 1)
    gradient = jax.tree.map(lambda g: g / pairs, gradient)
    updates, optimiser_state = optimiser.update(gradient, state.optimiser, state.trainable)
    metrics = {name: sums[name] / pairs for name in ("loss", "margin", "accuracy", "chosen", "rejected")}
    metrics |= {"drift": sums["drift"] / tokens, "pairs": sums["pairs"], "tokens": sums["tokens"],
                "gradient_norm": optax.global_norm(gradient)}
    return TrainState(state.step + 1, optax.apply_updates(state.trainable, updates), optimiser_state), metrics

  return update


def answer_likelihoods(graph, trainable, frozen, config, batches: PairBatches, pairs: Sequence[PreferencePair],
                       what: str) -> list[tuple[float, float]]:
  """(log p of the chosen, of the rejected answer) of each pair by the trainer's own forward pass."""
  run = jax.jit(lambda trainable, frozen, batch: answer_log_likelihood(
      compute_model(graph, trainable, frozen, config.dtype), batch, chunk=config.loss_chunk))
  bar, task = progress_bar(what, len(pairs))
  out = []
  with bar:
    for pair in pairs:
      chosen, rejected = np.asarray(run(trainable, frozen, batches.batch([pair])))[0]
      out.append((float(chosen), float(rejected)))
      bar.advance(task)
  return out


def check_settings(c) -> None:
  """Raises ValueError, one line, for what training on pairs cannot use of `config.preference`."""
  if c.loss not in LOSSES:
    raise ValueError(f"preference.loss must be one of {', '.join(LOSSES)}, not {c.loss!r}")
  if c.dtype not in DTYPES:
    raise ValueError(f"preference.dtype must be {' or '.join(DTYPES)}, not {c.dtype!r}")
  if not 0 <= c.alpha <= 1 or c.beta < 0:
    raise ValueError(f"preference.alpha must be in [0, 1] and preference.beta 0 or more, not {c.alpha} and {c.beta}")
  for field in ("batch_size", "accumulate", "length", "loss_chunk", "checkpoint_every"):
    if c[field] < 1:
      raise ValueError(f"preference.{field} must be 1 or more, not {c[field]}")


def train_on_pairs(config, workdir: str | Path, pairs: Sequence[PreferencePair], names: Sequence[str], *,
                   checkpoint: Checkpoint, vocabulary: Vocabulary, rule: PositionRule, adapter: Path | None,
                   samples: int, notes: dict[str, str] | None = None) -> dict[str, float]:
  """Trains `config.preference` on pairs, from the policy that `adapter` is; returns the last metrics.

  That policy is the reference too: its log p of every pair is computed once and kept in `reference.jsonl`, by
  the pair's name. `samples` is the number that best and worst were chosen from (β follows from it), `notes` go
  into the adapter's header. Leaves what SFT leaves. Raises ValueError, one line, for settings or folders that
  cannot be used.
  """
  c = config.preference
  check_settings(c)
  exact_products(c.dtype)
  workdir = checked_workdir(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  graph, trainable, frozen = make_model(checkpoint, vocabulary, c, adapter=adapter)
  levels = max(e.hidden.shape[1] for p in pairs for e in (p.chosen, p.rejected))
  shape = dict(rows=c.batch_size, length=c.length, levels=levels, seed=c.seed)

  path = workdir / "reference.jsonl"
  start = "" if adapter is None else hashlib.sha256(adapter.read_bytes()).hexdigest()
  known = {r["id"]: r["log_p"] for r in read_jsonl(path) if r["start"] == start} if path.exists() else {}
  todo = [i for i, name in enumerate(names) if name not in known]
  if todo:
    found = answer_likelihoods(graph, trainable, frozen, c, PairBatches(pairs, **shape), [pairs[i] for i in todo],
                               "reference")
    known |= {names[i]: log_p for i, log_p in zip(todo, found)}
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps({"id": n, "start": start, "log_p": known[n]}) + "\n" for n in names))
    temporary.replace(path)
  pairs = [dataclasses.replace(p, reference=tuple(known[n])) for p, n in zip(pairs, names)]

  batches = PairBatches(pairs, **shape)
  per_epoch = batches.steps_in_epoch(0) / c.accumulate
  total = c.steps or math.ceil(c.epochs * per_epoch)
  beta = c.beta or default_beta(c.loss, samples)
  print(f"{len(pairs)} pairs; {total} steps, {per_epoch:.0f} an epoch; {c.loss}, beta {beta:.4f}")
  optimiser, schedule = make_optimiser(c, total)
  update = make_pair_update(graph, optimiser, c, beta)

  def one_step(step: int, state: TrainState) -> tuple[TrainState, dict[str, float]]:
    started = time.perf_counter()
    chosen = [batches(step * c.accumulate + i) for i in range(c.accumulate)]
    state, metrics = update(state, frozen, jax.tree.map(lambda *x: np.stack(x), *chosen))
    scalars = {k: float(v) for k, v in metrics.items()}
    seconds = time.perf_counter() - started
    return state, scalars | {"learning_rate": float(schedule(step)), "epoch": (step + 1) / per_epoch,
                             "pairs_per_second": scalars["pairs"] / seconds}

  state = TrainState(jnp.zeros((), jnp.int32), trainable, optimiser.init(trainable))
  state, scalars = run_steps(config, workdir, state, total, one_step, checkpoint_every=c.checkpoint_every)
  if int(state.step) == total:
    model = compute_model(graph, state.trainable, frozen, jnp.float32)
    export(workdir, model, rule, checkpoint.tokenizer, full=c.lora_rank == 0, tags=True,
           metadata={"preference": _recipe(c), **(notes or {})})
  return scalars


def _recipe(c) -> str:
  """The settings for an adapter's header: what it depends on, of files the names only."""
  recipe = json.loads(c.to_json_best_effort())
  for field in ("stages", "audit", "requests", "width", "rounds", "weights"):
    del recipe[field]
  for field in ("prompts", "cost"):
    recipe[field] = Path(recipe[field]).name
  return json.dumps(recipe)
