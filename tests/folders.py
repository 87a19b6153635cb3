"""A tiny model as a Hugging Face folder, for tests of whole modes."""

import json
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, pre_tokenizers, trainers

from configs.smollm2_135m import get_config
from pasta_jax.data.examples import read_jsonl
from pasta_jax.model.config import ModelConfig
from pasta_jax.model.weights import param_shapes
from pasta_jax.train import sft

SEED_DATA = Path(__file__).parent.parent / "data" / "seed.jsonl"
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
  "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def model_config(**changes) -> ModelConfig:
  return ModelConfig(**dict(
    vocab_size=520, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48,
    rope_theta=10_000.0, norm_eps=1e-5, tie_embeddings=True, max_position=1024,
  ) | changes)  # fmt: skip


def describe_shape(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
  """The fields of a GGUF file that every family has."""
  writer.add_block_count(config.n_layers)
  writer.add_context_length(config.max_position)
  writer.add_embedding_length(config.d_model)
  writer.add_feed_forward_length(config.d_ff)
  writer.add_head_count(config.n_heads)
  writer.add_head_count_kv(config.n_kv_heads)
  writer.add_key_length(config.head_dim)
  writer.add_rope_freq_base(config.rope_theta)
  writer.add_layer_norm_rms_eps(config.norm_eps)


def write_model(folder: Path, config: ModelConfig, reserved: Sequence[str] = ()) -> Path:
  """A Hugging Face folder: random weights, and a byte-level BPE of 512 entries learned from the seed data, with those
  that are `reserved` among them."""
  folder.mkdir()
  rng = np.random.default_rng(0)
  words = {"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head",
           "layers": "model.layers", "attn": "self_attn", "attn_norm": "input_layernorm",
           "mlp_norm": "post_attention_layernorm"}
  words |= {name: f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
  tensors = {}
  for name, shape in param_shapes(config).items():
    *path, kind = name.split(".")
    value = rng.normal(size=shape).astype("f")
    value = 1 + 0.1 * value if kind == "scale" else value * config.d_model ** -0.5
    tensors[".".join(words.get(part, part) for part in path) + ".weight"] = np.ascontiguousarray(
      value.T if kind == "kernel" else value)
  save_file(tensors, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps({
    "model_type": "llama", "vocab_size": config.vocab_size, "hidden_size": config.d_model,
    "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads,
    "num_key_value_heads": config.n_kv_heads, "head_dim": config.head_dim, "intermediate_size": config.d_ff,
    "rope_theta": config.rope_theta, "rms_norm_eps": config.norm_eps,
    "tie_word_embeddings": config.tie_embeddings, "max_position_embeddings": config.max_position,
  }))  # fmt: skip
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
  backend.decoder = decoders.ByteLevel()
  backend.train_from_iterator(
    (row["response"] for row in read_jsonl(SEED_DATA)),
    trainers.BpeTrainer(vocab_size=512, special_tokens=[*CONTROLS, *reserved], show_progress=False,
                        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  backend.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(
    json.dumps({"eos_token": "<|im_end|>", "chat_template": TEMPLATE}))
  return folder


def trained_config(folder: Path):
  """A config with a tiny model in `folder` and an adapter that the trainer made in four steps on the seed data."""
  config = get_config()
  config.model.source = str(write_model(folder / "model", model_config()))
  config.train.update(data=str(SEED_DATA), length=1024, batch_size=1, steps=4, lora_rank=2, dtype="float32",
                      validate_every=4, validation=str(SEED_DATA), min_speedup=2.2)
  sft.train(config, folder / "run")
  config.model.adapter = str(folder / "run" / "adapter.safetensors")
  return config
