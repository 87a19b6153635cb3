"""Shape of a decoder. One frozen record serves every family that `decoder.py` can express."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Architecture of a llama-family decoder (RMSNorm, RoPE, grouped queries, SwiGLU).

  Letters used for array shapes all over the project: B batch, T tokens of a row, P entries of the
  key-value pool, D model width, N query heads, K key-value heads, G = N // K queries per
  key-value head, H head width, F feed-forward width, V vocabulary.
  """

  vocab_size: int  # V
  d_model: int  # D
  n_layers: int
  n_heads: int  # N
  n_kv_heads: int  # K
  head_dim: int  # H
  d_ff: int  # F
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-5
  tie_embeddings: bool = True
  max_position: int = 2048  # longest context the weights were trained for, in positions

  def __post_init__(self):
    if self.n_heads % self.n_kv_heads:
      raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
    if self.head_dim % 2:
      raise ValueError(f"head_dim={self.head_dim} must be even: RoPE rotates pairs")

  @property
  def n_groups(self) -> int:
    """Query heads that share one key-value head (G)."""
    return self.n_heads // self.n_kv_heads
