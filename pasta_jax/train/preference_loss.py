"""Losses over pairs of answers: BoNBoN (PASTA.md section 6), and DPO and IPO for comparison.

With Δ = log p(y⁺)/p(y⁻) − log p_ref(y⁺)/p_ref(y⁻), every log p summed over the answer's targets:

    bonbon   −α log p(y⁺) + (1 − α) (Δ − 1/β)²      Gui et al. 2024, arXiv 2406.00832
    ipo      (Δ − 1/(2β))²                          Azar et al. 2023, arXiv 2310.12036
    dpo      −log σ(β Δ)                            Rafailov et al. 2023, arXiv 2305.18290

Fast answers are short, so the rejected one is mostly the longer one, and the cheapest way to a large Δ is to
make every token of text a little less likely: the sum over the longer answer falls by more. What is taken
from text goes to tags. `per_token` closes this way out: with n targets an answer and m the mean of both,

    Δ = m (log p(y⁺)/p_ref(y⁺) / n⁺ − log p(y⁻)/p_ref(y⁻) / n⁻)

which a shift of all tokens alike leaves as it is, and which is the sum where both are of one length.
"""

import jax
import jax.numpy as jnp

from pasta_jax.config.sections import LOSSES
from pasta_jax.model.transformer import Transformer
from pasta_jax.train.losses import Batch, token_log_likelihood

_DPO_BETA = 0.1


def default_beta(loss: str, samples: int) -> float:
  """β where none is given.

  The policy that answers as the best of n samples of the reference does has E Δ = (n − 1) H(n−1) between the
  best and the worst of n, H being harmonic numbers (from the order statistics of n uniform ranks; Gui et al.
  2024, section 4, whose β is half of this one, as theirs stands in 1/(2β)). BoNBoN and IPO aim there.
  """
  if loss == "dpo":
    return _DPO_BETA
  target = (samples - 1) * sum(1 / k for k in range(1, samples))
  return 1 / target if loss == "bonbon" else 1 / (2 * target)


def _by_answer(x: jax.Array, batch: Batch) -> jax.Array:
  """[P, 2] sums of a number for each token [B, T] over the chosen and the rejected answer of each pair."""
  n = 2 * batch["weight"].shape[0]
  return jax.ops.segment_sum(x.reshape(-1), batch["answers"].reshape(-1), n + 1)[:n].reshape(-1, 2)


def answer_log_likelihood(model: Transformer, batch: Batch, **how) -> jax.Array:
  """[P, 2] log p of the chosen and the rejected answer of each pair, summed over their targets; 0 where no
  pair is. `how` is `token_log_likelihood`'s chunk, remat and attention."""
  log_p, _ = token_log_likelihood(model, batch, **how)
  return _by_answer(log_p, batch)


def preference_loss(
  model: Transformer, batch: Batch, *, loss: str, alpha: float, beta: float, per_token: bool = False, **how
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Sum of the pairs' losses, and sums for metrics (divide by `pairs`, token ones by `tokens`).

  `margin` is Δ, `accuracy` counts Δ > 0, `chosen` and `rejected` are log p, `ref_logp_drop` is
  log p_ref − log p of both answers together: how much less likely they became.
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
