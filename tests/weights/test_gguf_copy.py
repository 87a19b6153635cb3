"""GGUF files written from GGUF files: weights within the rounding of each precision, tokenizer and metadata the same,
adapters merged."""

import dataclasses
from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers.folders import write_gguf
from test_gguf import GEMMA3, LLAMA3
from test_weights import CONFIG, assert_same, random_params

from pasta_jax.config import Config, with_changes
from pasta_jax.evaluate.against_llama_cpp import merged
from pasta_jax.model.lora import Adapter, merged_kernel
from pasta_jax.weights.adapter import write_adapter
from pasta_jax.weights.checkpoint import load_checkpoint
from pasta_jax.weights.gguf_container import read_container
from pasta_jax.weights.gguf_copy import KINDS, gguf_file

WHOLE_BLOCKS = dict(d_model=64, d_ff=96, n_heads=4, head_dim=16)  # of 32 numbers
BLOCKS = dataclasses.replace(CONFIG, **WHOLE_BLOCKS)
FAMILIES = {
  "llama": BLOCKS,
  "llama, a head of its own": dataclasses.replace(BLOCKS, tie_embeddings=False),
  "llama 3": dataclasses.replace(LLAMA3, **WHOLE_BLOCKS),  # has factors of RoPE
  "gemma 3": dataclasses.replace(
    GEMMA3, **WHOLE_BLOCKS, query_scale=0.25
  ),  # norms with an offset, rows in order
}


def written(folder: Path, config=BLOCKS, **more) -> Path:
  return write_gguf(folder / "model.gguf", config, random_params(config), **more)


def largest_error(kind: str, stored: np.ndarray) -> np.ndarray:
  """Of each number of a matrix as it is stored, by the definition of the kind; half a unit in the last place."""
  if kind in ("F16", "BF16"):
    return np.maximum(
      np.abs(stored) * 2.0 ** {"F16": -11, "BF16": -8}[kind], 2.0**-25
    )  # float16 is subnormal there
  blocks = stored.reshape(-1, 32)
  step = np.abs(blocks).max(-1) / 127 if kind == "Q8_0" else (blocks.max(-1) - blocks.min(-1)) / 15
  # Scales and offsets are float16 themselves.
  bound = step / 2 + np.abs(blocks).max(-1) * 2.0**-10
  return np.repeat(bound, 32).reshape(stored.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_within_the_rounding_of_each_kind(tmp_path: Path, kind: str):
  source = written(tmp_path, describe=lambda w: w.add_file_type(gguf.LlamaFileType.MOSTLY_Q6_K))
  path = gguf_file(source, kind, tmp_path)
  before, after = load_checkpoint(source), load_checkpoint(path)
  assert path != source and after.config == before.config
  different = 0
  for name, expected in before.params.items():
    found = after.params[name]
    if expected.ndim == 1 or kind == "F32":
      np.testing.assert_array_equal(found, expected, err_msg=name)
      continue
    as_stored = lambda x, name=name: x.T if name.endswith("kernel") else x
    error = np.abs(as_stored(found) - as_stored(expected))
    assert (error <= largest_error(kind, as_stored(expected))).all(), name
    different += (error > 0).sum()
  assert (different == 0) == (kind == "F32")


def test_metadata_and_tokenizer_stay(tmp_path: Path):
  source = written(tmp_path, describe=lambda w: w.add_file_type(gguf.LlamaFileType.ALL_F32))
  path = gguf_file(source, "Q8_0", tmp_path)
  (fields, tensors), (copied, stored) = read_container(source), read_container(path)
  own = ("general.file_type", "general.quantization_version")
  assert copied["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0 and own[1] in copied
  drop = lambda all_fields: {k: v for k, v in all_fields.items() if k not in own}
  assert drop(copied) == drop(fields) and "tokenizer.ggml.tokens" in fields
  assert [(n, t.shape) for n, t in stored.items()] == [(n, t.shape) for n, t in tensors.items()]
  assert {t.kind.name for t in stored.values()} == {"Q8_0", "F32"}
  text = "he 12 and she"
  assert load_checkpoint(path).tokenizer.encode(text) == load_checkpoint(source).tokenizer.encode(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_without_its_tags_is_merged(tmp_path: Path, family: str):
  """In F32 the file is read back as the merged parameters, bit for bit where norms have no offset."""
  source = written(tmp_path, FAMILIES[family])
  checkpoint = load_checkpoint(source)
  config, rng = checkpoint.config, np.random.default_rng(1)
  random = lambda *shape: rng.integers(-8, 9, shape).astype("f") / 8  # exact in bfloat16
  names = ("layers.0.attn.q", "layers.1.attn.k", "layers.1.mlp.down")
  shapes = {name: checkpoint.params[f"{name}.kernel"].shape for name in names}
  factors = {name: (random(n_in, 2), random(2, n_out)) for name, (n_in, n_out) in shapes.items()}
  tags = random(len(config.tag_ids) or 6, config.d_model)
  adapter = Adapter(0.5, factors, tags, None if config.tie_embeddings else tags.T)
  write_adapter(tmp_path / "adapter.safetensors", adapter, config)
  settings = with_changes(Config(), {"model.source": str(source)})
  params = merged(settings, str(tmp_path / "adapter.safetensors"))
  again = load_checkpoint(gguf_file(source, "F32", tmp_path, params))
  assert again.config == config
  expected = dict(checkpoint.params) | {
    f"{name}.kernel": merged_kernel(checkpoint.params[f"{name}.kernel"], pair, 0.5)
    for name, pair in factors.items()
  }
  assert all((np.asarray(expected[f"{n}.kernel"]) != checkpoint.params[f"{n}.kernel"]).any() for n in names)
  if config.norm_offset:
    for name, value in expected.items():  # scales lose a bit when an offset is added to them
      np.testing.assert_allclose(again.params[name], value, rtol=0, atol=1e-6 * name.endswith("scale"))
  else:
    assert_same(again.params, {name: np.asarray(x) for name, x in expected.items()})


def test_a_file_of_that_kind_is_taken_as_it_is(tmp_path: Path):
  source = written(tmp_path, describe=lambda w: w.add_file_type(gguf.LlamaFileType.MOSTLY_BF16))
  assert gguf_file(source, "BF16", tmp_path) == source
  assert gguf_file(source, "BF16", tmp_path, dict(load_checkpoint(source).params)) != source


def test_what_cannot_be_written_is_refused(tmp_path: Path):
  source = written(tmp_path)
  with pytest.raises(ValueError, match="written in F32, F16, BF16, Q8_0, Q4_1, not in 'Q3'"):
    gguf_file(source, "Q3", tmp_path)
  params = dict(load_checkpoint(source).params)
  del params["final_norm.scale"]
  with pytest.raises(ValueError, match="^final_norm.scale is a parameter of .*, not of both$"):
    gguf_file(source, "F32", tmp_path, params)
  narrow = write_gguf(tmp_path / "narrow.gguf", CONFIG, random_params(CONFIG))
  with pytest.raises(
    ValueError, match="^rows of .* have 24 numbers, no whole number of Q8_0's blocks of 32$"
  ):
    gguf_file(narrow, "Q8_0", tmp_path)
  assert not [p for p in tmp_path.iterdir() if "Q8_0" in p.name]
  write_gguf(tmp_path / "parts.gguf", BLOCKS, random_params(BLOCKS), part_tensors=8)
  [first] = tmp_path.glob("parts-00001-*")
  with pytest.raises(ValueError, match="is a model in parts"):
    gguf_file(first, "F32", tmp_path)
