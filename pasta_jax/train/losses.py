"""Log-likelihood of packed rows under PASTA's mask, positions and targets (PASTA.md section 6)."""

import jax
import jax.numpy as jnp

from pasta_jax.lang.layout import NO_TARGET
from pasta_jax.model.transformer import Transformer
from pasta_jax.train.attention import Batch, make_attend
from pasta_jax.train.sharding import constrain_rows


def hidden_states(model: Transformer, batch: Batch, *, remat: str, attention: str) -> jax.Array:
  """[B, T, D] behind the final norm."""
  attend = make_attend(attention, batch, model.config, model.dtype)
  hidden, _ = model(batch["tokens"], batch["positions"], attend, remat=remat)
  return constrain_rows(hidden)


def token_log_likelihood(
  model: Transformer, batch: Batch, *, chunk: int = 1024, remat: str = "none", attention: str = "auto"
) -> tuple[jax.Array, jax.Array]:
  """(log p of each target [B, T], whether it is the model's first choice [B, T]); zero where none is. `remat`
  is one of `decoder.REMAT`, `attention` of `config.sections.ATTENTION`.

  The vocabulary's logits are formed for about `chunk` tokens at a time, as many of each row, and recomputed
  in the backward pass, so that memory stays at chunk x V.
  """
  hidden, targets = hidden_states(model, batch, remat=remat, attention=attention), batch["targets"]
  rows, length = targets.shape
  columns = min(max(chunk // rows, 1), length)
  padding = -length % columns
  hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
  targets = jnp.pad(targets, ((0, 0), (0, padding)), constant_values=NO_TARGET)

  @jax.checkpoint
  def score(hidden, targets):
    logits = constrain_rows(model.logits(constrain_rows(hidden)), None, "tensor")
    chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    log_p = chosen - jax.nn.logsumexp(logits, axis=-1)
    learned = targets != NO_TARGET
    return jnp.where(learned, log_p, 0.0), learned & (chosen >= jnp.max(logits, axis=-1))

  split = lambda x: x.reshape(rows, -1, columns, *x.shape[2:]).swapaxes(
    0, 1
  )  # [B, T, …] -> [T / columns, B, …]
  found = jax.lax.map(lambda xs: score(*xs), (split(hidden), split(targets)))
  log_p, correct = (x.swapaxes(0, 1).reshape(rows, -1)[:, :length] for x in found)
  return log_p, correct


def sft_loss(
  model: Transformer, batch: Batch, *, chunk: int = 1024, remat: str = "none", attention: str = "auto"
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Sum of the targets' negative log-likelihood, and sums for metrics: `loss`, `tokens`, `correct`.

  Sums, not means: gradients of several batches add up, and one division by Σ tokens gives what the big
  batch gives.
  """
  log_p, correct = token_log_likelihood(model, batch, chunk=chunk, remat=remat, attention=attention)
  total = -log_p.sum()
  tokens = (batch["targets"] != NO_TARGET).sum()
  return total, {"loss": total, "tokens": tokens, "correct": correct.sum()}
