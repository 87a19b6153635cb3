"""Kinds of damaged input for the readers of models: `harness` says what is done with them."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from helpers.folders import PIECE_TOKENS, TEMPLATE, model_config, write_gguf, write_model
from sentencepiece import sentencepiece_model_pb2

from fuzz.harness import Kind
from pasta_jax.model.config import ModelConfig
from pasta_jax.model.lora import Adapter
from pasta_jax.train.checkpoints import Checkpoints
from pasta_jax.train.state import TrainState
from pasta_jax.weights.adapter import Storage, read_adapter, weights_of, write_adapter
from pasta_jax.weights.arrays import param_shapes
from pasta_jax.weights.checkpoint import load_checkpoint

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_MESSAGES = [
  {"role": "user", "content": " Compare <|im_end|> 12 trains.\n"},
  {"role": "assistant", "content": "é"},
]


def _small(**changes) -> ModelConfig:
  return model_config(d_model=8, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=8, **changes)


def _random(config: ModelConfig) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {name: rng.normal(size=shape).astype("f") for name, shape in param_shapes(config).items()}


def load(path: Path) -> None:
  """All that decoding reads of a model: numbers, tokens, a conversation."""
  checkpoint = load_checkpoint(path, progress=False)
  for name in checkpoint.params:
    checkpoint.params[name]
  tokenizer, _ = checkpoint.tokenizer, checkpoint.vocabulary
  try:
    assert tokenizer.decode(tokenizer.encode(" 12 trains")) == " 12 trains"
    tokenizer.chat_prompt(_MESSAGES)
  except ValueError as error:  # at the first prompt: the model is named by what was asked for
    raise ValueError(f"{path}: {error}") from error


def folder(path: Path) -> None:
  write_model(path / "model", _small())
  (path / "model" / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
  described = json.loads((path / "model" / "tokenizer_config.json").read_text())
  entry = {"content": "<|im_end|>", "special": True, "rstrip": True, "normalized": False}
  described |= {"added_tokens_decoder": {"2": entry}, "bos_token": "<|im_start|>"}
  (path / "model" / "tokenizer_config.json").write_text(json.dumps(described))


def with_template(path: Path) -> None:
  folder(path)
  (path / "model" / "chat_template.jinja").write_text(TEMPLATE)


def in_parts(path: Path) -> None:
  folder(path)
  whole = path / "model" / "model.safetensors"
  tensors = safetensors.numpy.load_file(whole)
  where = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
  for file in set(where.values()):
    safetensors.numpy.save_file(
      {name: x for name, x in tensors.items() if where[name] == file}, whole.with_name(file)
    )
  whole.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
  whole.unlink()


def of_pieces(path: Path) -> None:
  write_model(path / "model", _small(vocab_size=len(PIECE_TOKENS) + 4))
  (path / "model" / "tokenizer.json").unlink()
  model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # generated code
  model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 2, True
  model.normalizer_spec.remove_extra_whitespaces, model.normalizer_spec.name = False, "identity"
  for i, text in enumerate(PIECE_TOKENS):
    kind = 6 if text.startswith("<0x") else 2 if text == "<unk>" else 3 if text.startswith("<") else 1
    model.pieces.add(piece=text, score=-float(i), type=kind)
  (path / "model" / "tokenizer.model").write_bytes(model.SerializeToString())
  entry = {"content": "<|x|>", "special": True}
  (path / "model" / "tokenizer_config.json").write_text(
    json.dumps({"eos_token": "<eos>", "added_tokens_decoder": {str(len(PIECE_TOKENS)): entry}})
  )


def gguf(*, pieces: bool) -> Callable[[Path], None]:
  def make(path: Path) -> None:
    config = _small(vocab_size=len(PIECE_TOKENS)) if pieces else _small(vocab_size=270)
    describe = lambda writer: writer.add_chat_template(TEMPLATE)
    write_gguf(path / "model.gguf", config, _random(config), pieces=pieces, describe=describe)

  return make


def adapter(path: Path, storage: Storage = "bfloat16") -> None:
  config, rng = _small(), np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype("f")
  factors = {"layers.0.attn.q": (draw(8, 2), draw(2, 8)), "layers.1.mlp.up": (draw(8, 2), draw(2, 8))}
  metadata = {"positions": '{"strategy": "pred_10x", "fixed": 60}', "speeds": "[1, 2]", "base": "model"}
  (path / "model").mkdir()
  made = Adapter(2.0, factors, draw(6, 8), None, metadata)
  write_adapter(path / "adapter.safetensors", made, config, storage=storage)


def load_adapter(path: Path) -> None:
  weights_of(path / "adapter.safetensors")
  read_adapter(path / "adapter.safetensors", _small())


def run(path: Path) -> None:
  folder(path)
  draw = lambda *shape: jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
  trainable = {"layers.attn.q.lora_a": draw(2, 8, 2), "layers.attn.q.lora_b": draw(2, 2, 8)}
  trainable |= {"embed.tags": draw(6, 8)}
  metadata = {"positions": '{"strategy": "pred_10x", "fixed": 60}'}
  checkpoints = Checkpoints(
    path / "run", 1, {"source": str(path / "model"), "scale": 2.0, "metadata": metadata}
  )
  checkpoints.save(TrainState(jnp.int32(1), trainable, ()), {"next": 1})
  checkpoints.close()


_in_folder = lambda path: load(path / "model")
_TOKENS = ["model/tokenizer*.json", "model/generation_config.json"]
KINDS = {
  "gguf_bytes": Kind(gguf(pieces=False), lambda path: load(path / "model.gguf"), ["*.gguf"], 2),
  "gguf_pieces": Kind(gguf(pieces=True), lambda path: load(path / "model.gguf"), ["*.gguf"], 2),
  "safetensors": Kind(folder, _in_folder, ["model/*.safetensors"]),
  "config": Kind(folder, _in_folder, ["model/config.json"]),
  "tokenizer": Kind(folder, _in_folder, ["model/tokenizer.json"], 2),
  "tokenizer_config": Kind(folder, _in_folder, [*_TOKENS[1:], "model/tokenizer_config.json"]),
  "pieces": Kind(of_pieces, _in_folder, ["model/tokenizer.model"]),
  "pieces_config": Kind(of_pieces, _in_folder, ["model/tokenizer_config.json"]),
  "index": Kind(in_parts, _in_folder, ["model/*.index.json"]),
  "template": Kind(with_template, _in_folder, ["model/*.jinja"]),
  "adapter": Kind(adapter, load_adapter, ["*.safetensors"]),
  "adapter_int8": Kind(partial(adapter, storage="int8"), load_adapter, ["*.safetensors"]),
  "checkpoint": Kind(run, lambda path: load(path / "run"), ["run/checkpoints/1/**/*"], 0.3),
}
