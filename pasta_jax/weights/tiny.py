"""A model with random weights and a byte tokenizer, to run every mode in seconds without a download. Its
output is noise."""

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from pasta_jax.model.config import ModelConfig
from pasta_jax.weights.arrays import param_shapes
from pasta_jax.weights.tokenizer import Tokenizer

_CONTROLS = ("<|start|>", "<|end|>")
_TEMPLATE = (
  "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def tiny_model() -> tuple[ModelConfig, dict[str, np.ndarray], Tokenizer]:
  """Architecture, parameters (see `arrays.param_shapes`) and tokenizer; the same on every call."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  backend = tokenizers.Tokenizer(
    models.BPE({token: i for i, token in enumerate((*_CONTROLS, *alphabet))}, [])
  )
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(list(_CONTROLS))
  tokenizer = Tokenizer(backend, eos_id=1, bos_id=None, chat_template=_TEMPLATE)
  config = ModelConfig(
    vocab_size=264, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=128, max_position=8192
  )
  rng = np.random.default_rng(0)

  def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith(".scale"):
      return np.ones(shape, np.float32)
    width = shape[1] if name == "embed.embedding" else shape[0]
    return (rng.normal(size=shape) * width**-0.5).astype(np.float32)

  return config, {name: draw(name, shape) for name, shape in param_shapes(config).items()}, tokenizer
