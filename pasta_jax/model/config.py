"""Architecture of a model: one frozen record for every family that `transformer` can express."""

import dataclasses
from typing import Any

import numpy as np

# Bounds of what a file may claim. Far beyond any model, and small enough for int32, for float32, and for
# lists by layer.
MAX_COUNT, MAX_LAYERS, LARGEST = 2**31 - 1, 10_000, 1e30


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """RoPE scaling for contexts longer than the pretrained one. `kind` "linear" divides every frequency by
  `factor`; "llama3" divides only the low ones, with a ramp whose ends the other fields give."""

  kind: str
  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position: int = 8192

  def __post_init__(self):
    if self.kind not in ("linear", "llama3"):
      raise ValueError(f"RoPE scaling {self.kind!r} is not supported, only 'linear' and 'llama3'")
    _check_range("RoPE's factor", self.factor, 1 / LARGEST)
    if self.kind == "llama3":
      _check_range("RoPE's low_freq_factor", self.low_freq_factor, 0)
      _check_range("RoPE's high_freq_factor", self.high_freq_factor, 0)
      _check_range("RoPE's original context", self.original_max_position, 1)
      if self.low_freq_factor == self.high_freq_factor:
        raise ValueError(f"RoPE's low_freq_factor and high_freq_factor are both {self.low_freq_factor}")

  def __call__(self, frequency: np.ndarray) -> np.ndarray:
    """Scaled frequencies [H/2], in radians per position."""
    if self.kind == "linear":
      return frequency / self.factor
    turns = self.original_max_position * frequency / (2 * np.pi)  # over the original context
    kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
    kept = np.clip(kept, 0, 1)
    return frequency * kept + frequency / self.factor * (1 - kept)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Architecture of a decoder-only transformer with RMSNorm, RoPE, grouped queries and a gated feed-forward:
  Llama and its relatives.

  Letters for array shapes, used in the whole project: B batch, T tokens of a row, P entries of the key-value
  pool, D model width, N query heads, K key-value heads, G = N // K query heads per key-value head, H head
  width, F feed-forward width, V vocabulary.
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
  max_position: int = 2048  # longest context of the pretraining, in positions
  rope_scaling: RopeScaling | None = None
  activation: str = "silu"  # of the feed-forward's gate; or "gelu", in its tanh approximation (Gemma)
  norm_offset: float = 0.0  # added to the scales of norms: Gemma stores them minus 1
  scale_embeddings: bool = False  # multiply embeddings by sqrt(D) (Gemma)
  qkv_bias: bool = False  # Qwen 2
  qk_norm: bool = False  # normalise the heads of queries and keys before RoPE (Qwen 3, Gemma 3)
  post_norms: bool = False  # also normalise the output of attention and feed-forward (Gemma 2 and 3)
  query_scale: float = 0.0  # factor of queries; 0: H ** -0.5
  attention_softcap: float = 0.0  # scores become cap * tanh(score / cap) (Gemma 2); 0: no cap
  logit_softcap: float = 0.0  # the same for logits
  # Local layers see keys less than `window` *positions* before the query. 0: no local layers.
  window: int = 0
  local_layers: tuple[bool, ...] = ()  # which layers are local; (): all, if there is a window
  local_rope_theta: float = 0.0  # unscaled RoPE of local layers; 0: the same as other layers (Gemma 3)
  # Vocabulary rows of PASTA's six tags, and of its 64 lengths where each is one token (lang.forms), which may be
  # additional rows; (): six additional rows after the others.
  tag_ids: tuple[int, ...] = ()

  def __post_init__(self):
    for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff"):
      _check_count(name, getattr(self, name), 1, MAX_LAYERS if name == "n_layers" else MAX_COUNT)
    _check_count("max_position", self.max_position, 1)
    _check_count("window", self.window, 0)
    _check_range("rope_theta", self.rope_theta, 1)
    _check_range("norm_eps", self.norm_eps, 0)
    for name in ("query_scale", "attention_softcap", "logit_softcap"):
      _check_range(name, getattr(self, name), 0)
    if self.local_rope_theta:
      _check_range("local_rope_theta", self.local_rope_theta, 1)
    if self.n_heads % self.n_kv_heads:
      raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
    if self.head_dim % 2:
      raise ValueError(f"head_dim={self.head_dim} must be even: RoPE rotates pairs")
    if self.local_layers and len(self.local_layers) != self.n_layers:
      raise ValueError(f"local_layers has {len(self.local_layers)} entries for {self.n_layers} layers")
    if self.activation not in ("silu", "gelu"):
      raise ValueError(f"activation {self.activation!r} is not supported, only 'silu' and 'gelu'")

  @property
  def n_groups(self) -> int:
    """Query heads per key-value head (G)."""
    return self.n_heads // self.n_kv_heads

  def is_local(self, layer: int) -> bool:
    """Whether a layer's attention is limited to the sliding window."""
    return bool(self.window) and (not self.local_layers or self.local_layers[layer])

  def rope_frequencies(self, local: bool = False) -> np.ndarray:
    """[H/2] float32, in radians per position: RoPE of the local layers, or of the others."""
    local_theta = local and self.local_rope_theta
    exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / self.head_dim
    frequency = 1 / np.float32(local_theta or self.rope_theta) ** exponents  # rounded as transformers does
    if self.rope_scaling and not local_theta:
      frequency = self.rope_scaling(frequency)
    return frequency.astype(np.float32)


def _check_count(name: str, value: Any, least: int, most: int = MAX_COUNT) -> None:
  if not isinstance(value, int | np.integer) or not least <= value <= most:
    raise ValueError(f"{name} = {value!r:.40} is not a whole number from {least} to {most}")


def _check_range(name: str, value: Any, least: float) -> None:
  """Refuses NaN too, which compares as false."""
  if not isinstance(value, int | float | np.number) or not least <= value <= LARGEST:
    raise ValueError(f"{name} = {value!r:.40} is not a number from {least:g} to {LARGEST:g}")
