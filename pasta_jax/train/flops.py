"""FLOPs of a training step, for model FLOPs utilisation (Chowdhery et al. 2022)."""

from pasta_jax.model.config import ModelConfig


def matmul_parameters(c: ModelConfig) -> int:
  """Parameters of matrix products: the layers' matrices and the head, not the embedding lookup."""
  attention = c.d_model * c.head_dim * 2 * (c.n_heads + c.n_kv_heads)
  return c.n_layers * (attention + 3 * c.d_model * c.d_ff) + c.d_model * c.vocab_size


def step_flops(c: ModelConfig, rows: int, length: int, *, full: bool) -> float:
  """FLOPs of a step on `rows` rows of `length` tokens: forward and backward, without recomputation.

  Low-rank training (`full` False) needs no gradient of the weights. Attention is counted as if each row were
  one plain text, within its windows: several examples in a row, and chunks masked from each other, need less.
  """
  passes = 3 if full else 2
  keys = [min(length / 2, c.window) if c.is_local(i) else length / 2 for i in range(c.n_layers)]  # of a query
  attention = 2 * c.n_heads * c.head_dim * sum(keys)  # scores and context, multiplications a token
  return 2.0 * rows * length * (passes * matmul_parameters(c) + 3 * attention)
