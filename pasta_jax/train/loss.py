"""Log-likelihood of packed rows under PASTA's mask, positions and targets (PASTA.md section 6)."""

import jax
import jax.numpy as jnp

from pasta_jax.lang.layout import NO_TARGET, is_visible
from pasta_jax.model.decoder import Decoder, dense_attention

Batch = dict[str, jax.Array]  # the fields of data.packing.Batch


def attention_mask(batch: Batch) -> jax.Array:
  """[B, T, T] boolean: `layout.is_visible` within each segment."""
  length = batch["tokens"].shape[1]
  q = jnp.arange(length)[:, None]
  k = jnp.arange(length)[None, :]
  seen = is_visible(q, k, batch["hidden"][:, None])
  segments = batch["segments"]
  return seen & (segments[:, :, None] == segments[:, None, :])


def hidden_states(model: Decoder, batch: Batch, *, remat: bool) -> jax.Array:
  """[B, T, D] behind the final norm."""
  attend = dense_attention(attention_mask(batch), model.dtype)
  hidden, _ = model(batch["tokens"], batch["positions"], lambda *a: (attend(*a)[0], None), remat=remat)
  return hidden


def token_log_likelihood(model: Decoder, batch: Batch, *, chunk: int = 1024,
                         remat: bool = False) -> tuple[jax.Array, jax.Array]:
  """(log p of each target [B, T], whether it is the model's first choice [B, T]); zero where none is.

  The vocabulary's logits are formed for `chunk` tokens at a time and recomputed in the backward pass, so
  that memory stays at chunk x V.
  """
  hidden = hidden_states(model, batch, remat=remat)
  shape = batch["targets"].shape
  flat, targets = hidden.reshape(-1, hidden.shape[-1]), batch["targets"].reshape(-1)
  chunk = min(chunk, len(targets))
  padding = -len(targets) % chunk
  flat = jnp.pad(flat, ((0, padding), (0, 0)))
  targets = jnp.pad(targets, (0, padding), constant_values=NO_TARGET)

  @jax.checkpoint
  def score(hidden, targets):
    logits = model.logits(hidden)
    chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1)[:, 0]
    log_p = chosen - jax.nn.logsumexp(logits, axis=-1)
    learned = targets != NO_TARGET
    return jnp.where(learned, log_p, 0.0), learned & (chosen >= jnp.max(logits, axis=-1))

  log_p, correct = jax.lax.map(lambda xs: score(*xs), (flat.reshape(-1, chunk, flat.shape[-1]),
                                                       targets.reshape(-1, chunk)))
  unpad = lambda x: x.reshape(-1)[: shape[0] * shape[1]].reshape(shape)
  return unpad(log_p), unpad(correct)


def sft_loss(model: Decoder, batch: Batch, *, chunk: int = 1024,
             remat: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Sum of the targets' negative log-likelihood, and sums for metrics: `loss`, `tokens`, `correct`.

  Sums, not means: gradients of several batches add up, and one division by Σ tokens gives what the big
  batch gives.
  """
  log_p, correct = token_log_likelihood(model, batch, chunk=chunk, remat=remat)
  total = -log_p.sum()
  tokens = (batch["targets"] != NO_TARGET).sum()
  return total, {"loss": total, "tokens": tokens, "correct": correct.sum()}
