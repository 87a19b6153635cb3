"""Losses over packed rows under PASTA's mask, positions and targets (docs/language.md section 6).

`visibility` is that of `lang.forms`, in every function: the mask of training is the one that decoding will have.

SFT minimises the negative log-likelihood of the targets. Training on pairs uses BoNBoN, or DPO or IPO for
comparison. With Δ = log p(y⁺)/p(y⁻) − log p_ref(y⁺)/p_ref(y⁻), every log p summed over the answer's targets:

    bonbon   −α log p(y⁺) + (1 − α) (Δ − 1/β)²      Gui et al. 2024, arXiv 2406.00832
    ipo      (Δ − 1/(2β))²                          Azar et al. 2023, arXiv 2310.12036
    dpo      −log σ(β Δ)                            Rafailov et al. 2023, arXiv 2305.18290

Fast answers are short, so the rejected answer is usually the longer one, and the cheapest way to increase Δ
is to make every text token slightly less likely: the sum over the longer answer falls by more, and the
probability that text loses goes to tags. `per_token` removes this incentive. With n targets an answer and m
the mean of both,

    Δ = m (log p(y⁺)/p_ref(y⁺) / n⁺ − log p(y⁻)/p_ref(y⁻) / n⁻)

which does not change when all tokens shift alike, and equals the sum when both answers have the same length.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pasta_jax.config.sections import LOSSES
from pasta_jax.lang.layout import NO_TARGET
from pasta_jax.model.sharding import constrain_rows
from pasta_jax.model.transformer import Transformer, tag_columns
from pasta_jax.train.attention import DeviceBatch, make_attend

_DPO_BETA = 0.1


class LengthTargets(NamedTuple):
  """What is learned where the target is a length that is one token (`length_targets`)."""

  ids: np.ndarray  # [n] of the lengths, shortest first
  weights: np.ndarray  # [n, n], rows sum to 1: of each length, where the row's is the target


def length_targets(lengths: np.ndarray, spread: float) -> LengthTargets | None:
  """A Gaussian over neighbouring lengths, `spread` tokens wide: 50 is nearly right where 40 was written, and a loss
  over each length alone does not say so. None if `spread` is 0 or there are no such tokens.

  `lengths` are the ids of `automaton.LENGTHS`, ten tokens apart.
  """
  if not spread or not len(lengths):
    return None
  step = 10 * np.arange(len(lengths))
  weights = np.exp(-((step[:, None] - step[None]) ** 2) / (2 * spread**2))
  return LengthTargets(np.asarray(lengths), weights / weights.sum(1, keepdims=True))


def hidden_states(
  model: Transformer, batch: DeviceBatch, *, remat: str, attention: str, visibility: str
) -> jax.Array:
  """[B, T, D] after the final norm."""
  attend = make_attend(attention, batch, model.config, model.dtype, visibility)
  hidden, _ = model(batch["tokens"], batch["positions"], attend, remat=remat)
  return constrain_rows(hidden)


def token_log_likelihood(
  model: Transformer,
  batch: DeviceBatch,
  *,
  chunk: int = 1024,
  remat: str = "none",
  attention: str = "auto",
  visibility: str = "promise",
  lengths: LengthTargets | None = None,
) -> tuple[jax.Array, jax.Array]:
  """(log p of each target [B, T], whether the target is the argmax [B, T]); zero and False without a target.
  With `lengths`, log p of a length is the mean over its neighbours, less their entropy: zero is the best still.
  In a batch with what `teacher.Teacher` adds, log p of a token of text is log p(text) − KL(teacher ‖ student) over the
  tokens of text, in place of log p(text) + log p(token | text).

  `remat` is one of `transformer.REMAT`, `attention` one of `config.sections.ATTENTION`. Logits are computed for about
  `chunk` tokens at a time, the same columns of every row, and recomputed in the backward pass: their memory
  is O(chunk x V).
  """
  hidden = hidden_states(model, batch, remat=remat, attention=attention, visibility=visibility)
  targets = batch["targets"]
  rows, length = targets.shape
  columns = min(max(chunk // rows, 1), length)
  padding = -length % columns
  hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
  targets = jnp.pad(targets, ((0, 0), (0, padding)), constant_values=NO_TARGET)
  beside: tuple[jax.Array, ...] = ()
  if "taught" in batch:
    beside = (
      jnp.pad(batch["taught"], ((0, 0), (0, padding), (0, 0))),
      jnp.pad(batch["reading_source"] != NO_TARGET, ((0, 0), (0, padding))),
    )

  @jax.checkpoint
  def score(hidden, targets, *beside):
    logits = constrain_rows(model.logits(constrain_rows(hidden)), None, "tensor")
    chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    log_p = chosen - jax.nn.logsumexp(logits, axis=-1)
    if lengths is not None:
      is_this = targets[..., None] == lengths.ids  # [..., n]
      is_length = is_this.any(-1)
      weights = is_this @ jnp.asarray(lengths.weights, jnp.float32)  # 0 where the target is no length
      of_lengths = logits[..., lengths.ids] - jax.nn.logsumexp(logits, -1, keepdims=True)
      spread = (weights * of_lengths).sum(-1) + jax.scipy.special.entr(weights).sum(-1)
      log_p = jnp.where(is_length, spread, log_p)
    if beside:
      taught, is_text = beside
      # The head's rows of tags are trained, the teacher has none: nothing of it may flow back.
      theirs = jax.lax.stop_gradient(model.logits(constrain_rows(taught)))
      tags = tag_columns(model.config, logits.shape[-1])
      followed = _log_p_text(logits, tags) - _divergence(theirs, logits, tags)
      log_p = jnp.where(is_text, followed, log_p)
    learned = targets != NO_TARGET
    return jnp.where(learned, log_p, 0.0), learned & (chosen >= jnp.max(logits, axis=-1))

  split = lambda x: x.reshape(rows, -1, columns, *x.shape[2:]).swapaxes(
    0, 1
  )  # [B, T, …] -> [n, B, columns, …]
  found = jax.lax.map(lambda xs: score(*xs), (split(hidden), split(targets), *map(split, beside)))
  log_p, correct = (x.swapaxes(0, 1).reshape(rows, -1)[:, :length] for x in found)
  return log_p, correct


def _of_text(logits: jax.Array, tags: np.ndarray) -> jax.Array:
  return logits.at[..., tags].set(-1e9)


def _log_p_text(logits: jax.Array, tags: np.ndarray) -> jax.Array:
  """[..., V] -> [...]: log p that the next token is no tag."""
  return jax.nn.logsumexp(_of_text(logits, tags), -1) - jax.nn.logsumexp(logits, -1)


def _divergence(theirs: jax.Array, ours: jax.Array, tags: np.ndarray) -> jax.Array:
  """[..., V] logits -> [...]: KL(theirs ‖ ours) over the tokens that are no tags."""
  log_q, log_p = (jax.nn.log_softmax(_of_text(x, tags), -1) for x in (theirs, ours))
  return (jnp.exp(log_q) * (log_q - log_p)).sum(-1)


def sft_loss(model: Transformer, batch: DeviceBatch, **how) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Sum of the targets' negative log-likelihood, and sums for metrics: `loss`, `tokens`, `correct`. `how`: the
  keywords of `token_log_likelihood`.

  Sums, not means: the gradients of several batches add up, and dividing once by the total number of tokens
  gives the gradient of one large batch.
  """
  log_p, correct = token_log_likelihood(model, batch, **how)
  total = -log_p.sum()
  tokens = (batch["targets"] != NO_TARGET).sum()
  sums = {"loss": total, "tokens": tokens, "correct": correct.sum()}
  if "taught" in batch:
    is_text = batch["reading_source"] != NO_TARGET
    sums |= {"text_loss": -(log_p * is_text).sum(), "text_tokens": is_text.sum()}
  return total, sums


def default_beta(loss: str, samples: int) -> float:
  """β if the config gives none.

  For the policy that answers with the best of n samples of the reference, E Δ = (n − 1) H(n−1) between the
  best and the worst of n, where H are harmonic numbers (order statistics of n uniform ranks; Gui et al. 2024,
  section 4, whose β is half of this one because they write 1/(2β)). BoNBoN and IPO use this as their target: 18.15 for
  n = 8, as in BoNBoN's own release, and 25.46 for n = 10. The paper prints the target as 1/β, and no β.
  """
  if loss == "dpo":
    return _DPO_BETA
  target = (samples - 1) * sum(1 / k for k in range(1, samples))
  return 1 / target if loss == "bonbon" else 1 / (2 * target)


def _by_answer(x: jax.Array, batch: DeviceBatch) -> jax.Array:
  """[P, 2] sums of a per-token value [B, T] over the chosen and the rejected answer of each pair."""
  n = 2 * batch["weight"].shape[0]
  return jax.ops.segment_sum(x.reshape(-1), batch["answers"].reshape(-1), n + 1)[:n].reshape(-1, 2)


def answer_log_likelihood(model: Transformer, batch: DeviceBatch, **how) -> jax.Array:
  """[P, 2] log p of the chosen and the rejected answer of each pair, summed over their targets; 0 for unused
  pairs. `how`: the keywords of `token_log_likelihood`."""
  log_p, _ = token_log_likelihood(model, batch, **how)
  return _by_answer(log_p, batch)


def preference_loss(
  model: Transformer,
  batch: DeviceBatch,
  *,
  loss: str,
  alpha: float,
  beta: float,
  per_token: bool = False,
  **how,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Sum of the pairs' losses, and sums for metrics (divide by `pairs`; `ref_logp_drop` by `tokens`).

  `margin` is Δ, `accuracy` counts Δ > 0, `chosen` and `rejected` are log p, and `ref_logp_drop` is log p_ref
  − log p of both answers together: how much less likely they have become.
  """
  log_p = answer_log_likelihood(model, batch, **how)
  weight = batch["weight"]
  gain = log_p - batch["reference"]
  lengths = jnp.maximum(_by_answer((batch["targets"] >= 0).astype(jnp.float32), batch), 1)
  scaled = gain * lengths.mean(axis=1, keepdims=True) / lengths if per_token else gain
  margin = scaled[:, 0] - scaled[:, 1]
  if loss == "bonbon":
    losses = -alpha * log_p[:, 0] + (1 - alpha) * (margin - 1 / beta) ** 2
  elif loss == "ipo":
    losses = (margin - 1 / (2 * beta)) ** 2
  elif loss == "dpo":
    losses = -jax.nn.log_sigmoid(beta * margin)
  else:
    raise ValueError(f"unknown loss {loss!r}: choose one of {', '.join(LOSSES)}")
  total = jnp.sum(weight * losses)
  over = lambda x: jnp.sum(weight * x)
  tokens = jnp.sum(weight[:, None] * lengths)
  return total, {
    "loss": total,
    "pairs": weight.sum(),
    "margin": over(margin),
    "accuracy": over(margin > 0),
    "chosen": over(log_p[:, 0]),
    "rejected": over(log_p[:, 1]),
    "ref_logp_drop": -over(gain.sum(axis=1)),
    "tokens": tokens,
  }
