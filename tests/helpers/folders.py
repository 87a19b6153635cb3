"""Tiny models as Hugging Face folders, for tests of whole modes, and as GGUF files."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, pre_tokenizers, trainers

from pasta_jax.config import Config, with_changes
from pasta_jax.model.config import ModelConfig
from pasta_jax.model.families import family_of
from pasta_jax.train import sft
from pasta_jax.utils.jsonl import read_jsonl
from pasta_jax.weights.arrays import param_shapes

SEED_DATA = Path(__file__).parents[2] / "data" / "seed.jsonl"
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
  "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# Vocabularies of GGUF files, by `write_gguf`: of bytes, and of pieces with bytes to fall back on.
BYTE_TOKENS = [*CONTROLS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "12"]
PIECES = [
  *(f"<0x{b:02X}>" for b in range(256)),
  "▁he",
  "▁world",
  "he",
  "▁w",
  "orld",
  "or",
  "ld",
  "lo",
  *"helorwd▁é1",
]
PIECE_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "\n\n", "  ", *PIECES]


def model_config(**changes) -> ModelConfig:
  return ModelConfig(**dict(
    vocab_size=520, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48,
    rope_theta=10_000.0, norm_eps=1e-5, tie_embeddings=True, max_position=1024,
  ) | changes)  # fmt: skip


def write_gguf(
  path: Path,
  config: ModelConfig,
  params: Mapping[str, np.ndarray],
  *,
  arch: str = "",
  pieces: bool = False,
  part_tensors: int = 0,
  describe: Callable[[gguf.GGUFWriter], None] | None = None,
  **changes: np.ndarray | None,
) -> Path:
  """A GGUF file as llama.cpp's converter writes it: scales of norms as they are used, rows of q and k in
  another order for Llama, and its names.

  `pieces`: the vocabulary is PIECE_TOKENS, not BYTE_TOKENS. `part_tensors`: in parts of so many tensors,
  beside `path`. `describe` adds fields, or takes some away. `changes` replaces tensors by name; None drops
  one.
  """
  family = family_of(config).removesuffix("_text").replace("mistral", "llama")
  writer = gguf.GGUFWriter(path, arch or family, split_max_tensors=part_tensors)
  _describe(writer, config)
  (_piece_tokens if pieces else _byte_tokens)(writer)
  if describe:
    describe(writer)
  tensors: dict[str, np.ndarray | None] = {}
  for name, x in params.items():
    if family == "llama" and name.endswith(("attn.q.kernel", "attn.k.kernel")):
      heads = config.n_heads if "attn.q" in name else config.n_kv_heads
      x = x.T.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(x.T.shape).T
    kind = name.rsplit(".", 1)[1]
    tensors[_gguf_name(name)] = (
      x.T if kind == "kernel" else x + np.float32(config.norm_offset * (kind == "scale"))
    )
  if config.rope_scaling and config.rope_scaling.kind == "llama3":
    tensors["rope_freqs.weight"] = _rope_factors(config)
  for name, tensor in (tensors | changes).items():
    if tensor is not None:
      writer.add_tensor(name, np.ascontiguousarray(tensor))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def _describe(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
  writer.add_block_count(config.n_layers)
  writer.add_context_length(config.max_position)
  writer.add_embedding_length(config.d_model)
  writer.add_feed_forward_length(config.d_ff)
  writer.add_head_count(config.n_heads)
  writer.add_head_count_kv(config.n_kv_heads)
  writer.add_key_length(config.head_dim)
  writer.add_rope_dimension_count(config.head_dim)
  writer.add_rope_freq_base(config.rope_theta)
  writer.add_layer_norm_rms_eps(config.norm_eps)
  if config.rope_scaling and config.rope_scaling.kind == "linear":
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(config.rope_scaling.factor)
  if config.window:
    writer.add_sliding_window(config.window)
  if config.attention_softcap:
    writer.add_attn_logit_softcapping(config.attention_softcap)
    writer.add_final_logit_softcapping(config.logit_softcap)


def _rope_factors(config: ModelConfig) -> np.ndarray:
  """Llama 3's, [H/2], in the words of llama.cpp's converter, which knows one original context only."""
  scaling, out = config.rope_scaling, []
  for i in range(0, config.head_dim, 2):
    wavelength = 2 * np.pi * config.rope_theta ** (i / config.head_dim)
    if wavelength < 8192 / scaling.high_freq_factor:
      out.append(1.0)
    elif wavelength > 8192 / scaling.low_freq_factor:
      out.append(scaling.factor)
    else:
      smooth = (8192 / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
      )
      out.append(1 / ((1 - smooth) / scaling.factor + smooth))
  return np.array(out, np.float32)


def _byte_tokens(writer: gguf.GGUFWriter) -> None:
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("smollm")
  writer.add_token_list(BYTE_TOKENS)
  writer.add_token_types([3] * len(CONTROLS) + [1] * (len(BYTE_TOKENS) - len(CONTROLS)))
  writer.add_token_merges(["h e", "1 2"])
  writer.add_eos_token_id(2)


def _piece_tokens(writer: gguf.GGUFWriter) -> None:
  writer.add_tokenizer_model("llama")
  writer.add_token_list(PIECE_TOKENS)
  writer.add_token_types([3] * 6 + [4, 4] + [6] * 256 + [1] * (len(PIECES) - 256))
  writer.add_token_scores([-1000.0] * 8 + [0.0] * 256 + [-float(i) for i in range(len(PIECES) - 256)])
  writer.add_add_space_prefix(False)
  writer.add_eos_token_id(1)
  writer.add_bos_token_id(2)


def _gguf_name(name: str) -> str:
  """Of a parameter of ours."""
  words = {
    "embed": "token_embd",
    "final_norm": "output_norm",
    "head": "output",
    "attn.o": "attn_output",
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
    "attn_post_norm": "post_attention_norm",
    "mlp_post_norm": "post_ffw_norm",
  }
  whole, kind = name.rsplit(".", 1)
  layer, part = (
    (f"blk.{whole.split('.')[1]}.", whole.split(".", 2)[2]) if whole.startswith("layers.") else ("", whole)
  )
  return f"{layer}{words.get(part, part)}.{'bias' if kind == 'bias' else 'weight'}"


def write_model(folder: Path, config: ModelConfig, reserved: Sequence[str] = ()) -> Path:
  """A Hugging Face folder: random weights, and a byte-level BPE of 512 entries learned from the seed data,
  with those that are `reserved` among them."""
  folder.mkdir()
  rng = np.random.default_rng(0)
  words = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "layers": "model.layers",
    "attn": "self_attn",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
  }
  words |= {name: f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
  tensors = {}
  for name, shape in param_shapes(config).items():
    *path, kind = name.split(".")
    value = rng.normal(size=shape).astype("f")
    value = 1 + 0.1 * value if kind == "scale" else value * config.d_model**-0.5
    tensors[".".join(words.get(part, part) for part in path) + ".weight"] = np.ascontiguousarray(
      value.T if kind == "kernel" else value
    )
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
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
  )
  backend.decoder = decoders.ByteLevel()
  backend.train_from_iterator(
    (row["response"] for row in read_jsonl(SEED_DATA)),
    trainers.BpeTrainer(
      vocab_size=512,
      special_tokens=[*CONTROLS, *reserved],
      show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ),
  )
  backend.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(
    json.dumps({"eos_token": "<|im_end|>", "chat_template": TEMPLATE})
  )
  return folder


def trained_config(folder: Path) -> Config:
  """A config with a tiny model in `folder` and an adapter that the trainer made in four steps on the seed
  data."""
  train = dict(
    data=str(SEED_DATA),
    length=1024,
    batch_size=1,
    steps=4,
    lora_rank=2,
    dtype="float32",
    validate_every=4,
    validation=str(SEED_DATA),
    min_speedup=2.2,
  )
  changes = {f"train.{name}": value for name, value in train.items()}
  source = str(write_model(folder / "model", model_config()))
  config = with_changes(Config(), {"model.source": source, **changes})
  sft.train(config, folder / "run")
  return with_changes(config, {"model.adapter": str(folder / "run" / "adapter.safetensors")})


def with_fields(config: Config, section: str, **fields) -> Config:
  """A config with other values of a section."""
  return with_changes(config, {f"{section}.{name}": value for name, value in fields.items()})
