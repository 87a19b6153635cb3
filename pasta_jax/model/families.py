"""Model families: the fields of `ModelConfig` in which they differ. The readers of file formats share this
table.

To add a family, add a row to `FAMILIES`; then its names in `weights.hf_config` and `weights.gguf_file`.
"""

from typing import Any

from pasta_jax.model.config import ModelConfig

_LLAMA: dict[str, Any] = {"activation": "silu", "norm_offset": 0.0, "scale_embeddings": False, "qkv_bias": False,
                          "qk_norm": False, "post_norms": False}  # fmt: skip
_GEMMA = _LLAMA | {"activation": "gelu", "norm_offset": 1.0, "scale_embeddings": True}
# By Hugging Face's `model_type`. Mistral is Llama with a sliding window.
FAMILIES = {
  "llama": _LLAMA,
  "mistral": _LLAMA,
  "qwen2": _LLAMA | {"qkv_bias": True},
  "qwen3": _LLAMA | {"qk_norm": True},
  "gemma": _GEMMA,
  "gemma2": _GEMMA | {"post_norms": True},
  "gemma3_text": _GEMMA | {"post_norms": True, "qk_norm": True},
}
# Every n-th layer is global, unless the file says otherwise.
_PATTERNS = {"gemma2": 2, "gemma3_text": 6}


def has_local_layers(family: str) -> bool:
  """Whether models of a family mix local and global layers."""
  return family in _PATTERNS


def local_layers(family: str, n_layers: int, every: int | None = None) -> tuple[bool, ...]:
  """Which layers are local: all but every n-th one, for n = `every` or the family's usual value."""
  every = every or _PATTERNS[family]
  return tuple(bool((i + 1) % every) for i in range(n_layers))


def family_of(config: ModelConfig) -> str:
  """The first family with the features of `config`."""
  family = next(name for name, features in FAMILIES.items() if features.items() <= vars(config).items())
  return "mistral" if family == "llama" and config.window else family
