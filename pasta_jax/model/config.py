"""Shape of a decoder. One frozen record serves every family that `decoder.py` can express."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Longer contexts than the frequencies were trained for: all of them slower (`kind` "linear"), or only the
  slow ones, with a ramp between (`kind` "llama3", whose further fields say where it begins and ends)."""

  kind: str
  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position: int = 8192

  def __post_init__(self):
    if self.kind not in ("linear", "llama3"):
      raise ValueError(f"RoPE scaling {self.kind!r} is not supported, only 'linear' and 'llama3'")

  def __call__(self, frequency: np.ndarray) -> np.ndarray:
    """Frequencies [H/2], in radians a position, as they are used."""
    if self.kind == "linear":
      return frequency / self.factor
    turns = self.original_max_position * frequency / (2 * np.pi)  # of the original context
    kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
    kept = np.clip(kept, 0, 1)
    return frequency * kept + frequency / self.factor * (1 - kept)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Architecture of a decoder with RMSNorm, RoPE, grouped queries and a gated feed-forward: Llama and its
  relatives.

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
  rope_scaling: RopeScaling | None = None
  activation: str = "silu"  # of the feed-forward's gate; or "gelu", by its tanh approximation (Gemma)
  norm_offset: float = 0.0  # added to the scales of norms: Gemma's are stored less 1
  scale_embeddings: bool = False  # tokens enter as sqrt(D) times their rows (Gemma)
  qkv_bias: bool = False  # Qwen 2
  qk_norm: bool = False  # heads of queries and keys are normalised before RoPE (Qwen 3, Gemma 3)
  post_norms: bool = False  # what a block adds is normalised too (Gemma 2 and 3)
  query_scale: float = 0.0  # of queries; 0: H ** -0.5
  attention_softcap: float = 0.0  # scores go through cap * tanh(score / cap) (Gemma 2); 0: they do not
  logit_softcap: float = 0.0  # the same for logits
  window: int = (
    0  # local layers see keys less than so many *positions* before the query; 0: no layer is local
  )
  local_layers: tuple[bool, ...] = ()  # which are; (): all, where there is a window
  local_rope_theta: float = 0.0  # of local layers, without scaling; 0: as the others (Gemma 3)
  tag_ids: tuple[
    int, ...
  ] = ()  # rows of the vocabulary that PASTA's six tags take; (): six more, behind the others

  def __post_init__(self):
    if self.n_heads % self.n_kv_heads:
      raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
    if self.head_dim % 2:
      raise ValueError(f"head_dim={self.head_dim} must be even: RoPE rotates pairs")
    if self.local_layers and len(self.local_layers) != self.n_layers:
      raise ValueError(f"local_layers speaks of {len(self.local_layers)} layers, not {self.n_layers}")
    if self.activation not in ("silu", "gelu"):
      raise ValueError(f"activation {self.activation!r} is not supported, only 'silu' and 'gelu'")

  @property
  def n_groups(self) -> int:
    """Query heads that share one key-value head (G)."""
    return self.n_heads // self.n_kv_heads

  def is_local(self, layer: int) -> bool:
    """Whether a layer's attention is limited to the window."""
    return bool(self.window) and (not self.local_layers or self.local_layers[layer])

  def rope_frequencies(self, local: bool = False) -> np.ndarray:
    """[H/2] float32, radians a position, of the layers that are local or of the others."""
    own = local and self.local_rope_theta
    exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / self.head_dim
    frequency = 1 / np.float32(own or self.rope_theta) ** exponents  # rounded as transformers rounds
    return (self.rope_scaling(frequency) if self.rope_scaling and not own else frequency).astype(np.float32)
