"""Folders as people have them: config.json with keys left out or added, heads said to be tied, files left
over. What transformers makes of them is the measure; what cannot be read as it does is refused in one
line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_families import folder, torch_models  # noqa: F401  (fixtures)
from test_model import logits, nested_layout, torch_logits

from pasta_jax.weights import build
from pasta_jax.weights.arrays import WeightsError
from pasta_jax.weights.checkpoint import load_checkpoint
from pasta_jax.weights.hf_config import read_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LEFT_OUT = object()
LINEAR = {"rope_type": "linear", "factor": 4.0}
THETAS = ("rope_theta", "rope_local_base_freq", "rope_parameters", "rope_scaling")


def edit(path: Path, **changes) -> None:
  """Sets keys of a config.json, or removes them; None is written as null."""
  config = json.loads(path.read_text()) | changes
  path.write_text(json.dumps({k: v for k, v in config.items() if v is not LEFT_OUT}))


def assert_as_transformers_reads_it(place: Path) -> None:
  tokens, _, _ = nested_layout()
  theirs = transformers.AutoModelForCausalLM.from_pretrained(place, attn_implementation="eager").eval()
  loaded = load_checkpoint(place)
  expected = torch_logits(theirs, tokens)
  assert expected.std() > 0.1
  np.testing.assert_allclose(
    logits(build.from_params(loaded.config, loaded.params), tokens), expected, atol=1e-4, rtol=1e-4
  )


SAID = {
  "rope_scaling added to a file of transformers 5": ("llama", dict(rope_scaling=LINEAR, rope_theta=1e4)),
  "rope_scaling by its old name": (
    "qwen3",
    dict(rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=1e4),
  ),
  "rope_scaling next to RoPE of two kinds": (
    "gemma3_text",
    dict(rope_scaling={"rope_type": "linear", "factor": 2.0}),
  ),
  "no RoPE": ("llama", dict.fromkeys(THETAS, LEFT_OUT)),
  "no RoPE, Gemma 3": ("gemma3_text", dict.fromkeys(THETAS, LEFT_OUT)),
  "RoPE of two kinds without bases": (
    "gemma3_text",
    dict(rope_theta=LEFT_OUT, rope_parameters={"full_attention": LINEAR, "sliding_attention": None}),
  ),
  "no soft caps": ("gemma2", dict(attn_logit_softcapping=LEFT_OUT, final_logit_softcapping=LEFT_OUT)),
  "null soft caps": ("gemma2", dict(attn_logit_softcapping=None, final_logit_softcapping=None)),
  "no query scale": ("gemma2", dict(query_pre_attn_scalar=LEFT_OUT)),
  "no activation": ("gemma", dict(hidden_act=LEFT_OUT, hidden_activation=LEFT_OUT)),
  "no epsilon": ("qwen2", dict(rms_norm_eps=LEFT_OUT)),
  "no local layers said": ("gemma3_text", dict(layer_types=LEFT_OUT, sliding_window_pattern=2)),
  "a window that is not used": (
    "qwen2",
    dict(sliding_window=4, use_sliding_window=False, layer_types=LEFT_OUT),
  ),
  "a window of no layer": (
    "qwen2",
    dict(sliding_window=4, use_sliding_window=True, max_window_layers=3, layer_types=LEFT_OUT),
  ),
  "a window of the last layers": (
    "qwen2",
    dict(sliding_window=4, use_sliding_window=True, max_window_layers=1, layer_types=LEFT_OUT),
  ),
}


@pytest.mark.parametrize("case", SAID)
def test_keys_mean_the_same_as_in_transformers(case: str, folder):  # noqa: F811
  name, changes = SAID[case]
  place = folder(name)
  edit(place / "config.json", **changes)
  assert_as_transformers_reads_it(place)


@pytest.mark.parametrize(
  "name, key, field, value",
  [
    ("mistral", "sliding_window", "window", 4096),
    ("gemma2", "sliding_window", "window", 4096),
    ("gemma3_text", "sliding_window", "window", 4096),
    ("qwen3", "head_dim", "head_dim", 128),
    ("gemma", "head_dim", "head_dim", 256),
    ("llama", "num_key_value_heads", "n_kv_heads", 6),
    ("mistral", "max_position_embeddings", "max_position", 131_072),
  ],
)
def test_missing_keys_have_the_defaults_of_transformers(name: str, key: str, field: str, value: int, folder):  # noqa: F811
  path = folder(name) / "config.json"
  edit(path, num_attention_heads=16 if name == "gemma" else 6, **{key: LEFT_OUT})
  assert getattr(read_config(path), field) == value


REFUSED = {
  "RoPE scaling 'yarn' is not supported": ("qwen3", dict(rope_scaling={"type": "yarn", "factor": 4.0})),
  "RoPE scaling 'longrope' is not": (
    "llama",
    dict(rope_scaling={"rope_type": "longrope", "long_factor": [1.0]}),
  ),
  "RoPE of local layers of the kind 'linear'": (
    "gemma3_text",
    dict(
      rope_parameters={
        "full_attention": {"rope_theta": 1e6},
        "sliding_attention": LINEAR | {"rope_theta": 1e4},
      }
    ),
  ),
  r"partial_rotary_factor\) is not supported": ("llama", dict(partial_rotary_factor=0.5)),
  "use_bidirectional_attention is not supported": ("gemma3_text", dict(use_bidirectional_attention=True)),
  "layers of the kinds 'chunked_attention'": ("gemma2", dict(layer_types=["chunked_attention"] * 3)),
  "local_layers has 2 entries for 3 layers": (
    "gemma2",
    dict(layer_types=["full_attention", "sliding_attention"]),
  ),
  "weights quantised by 'gptq' are not supported": (
    "llama",
    dict(quantization_config={"quant_method": "gptq"}),
  ),
  "architecture 'qwen3_moe' is not supported": ("qwen3", dict(model_type="qwen3_moe")),
  r"architecture \['llama'\] is not supported": ("llama", dict(model_type=["llama"])),
  r"activation \['silu'\] is not supported": ("llama", dict(hidden_act=["silu"])),
  r"config.json: ": ("llama", dict(rope_parameters=[1])),
  r"config.json: .*": ("llama", dict(quantization_config=[1])),
  "config.json: text_config is missing": ("gemma3_text", dict(model_type="gemma3")),
}


@pytest.mark.parametrize("message", REFUSED)
def test_unsupported_features_are_refused_in_one_line(message: str, folder):  # noqa: F811
  name, changes = REFUSED[message]
  path = folder(name)
  edit(path / "config.json", **changes)
  with pytest.raises(WeightsError, match=message) as caught:
    load_checkpoint(path)
  assert str(path) in str(caught.value) and "\n" not in str(caught.value)


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("form", ["trained apart", "stored twice", "under the head's name"])
def test_the_tensors_say_whether_a_head_is_tied(form: str, folder):  # noqa: F811
  place = folder("llama")
  tensors = load_file(place / "model.safetensors")
  tensors[HEAD] = tensors[EMBEDDING] * (1 if form != "trained apart" else 2)
  if form == "under the head's name":
    del tensors[EMBEDDING]
  save_file(tensors, place / "model.safetensors", {"format": "pt"})
  assert load_checkpoint(place).config.tie_embeddings == (form != "trained apart")
  assert_as_transformers_reads_it(place)


def test_a_single_file_takes_precedence_over_an_index(folder):  # noqa: F811
  place = folder("llama")
  stale = {name: x * 2 for name, x in load_file(place / "model.safetensors").items()}
  save_file(stale, place / "model-00001-of-00001.safetensors", {"format": "pt"})
  (place / "model.safetensors.index.json").write_text(
    json.dumps({"weight_map": dict.fromkeys(stale, "model-00001-of-00001.safetensors")})
  )
  assert_as_transformers_reads_it(place)


@pytest.mark.parametrize(
  "damage, message",
  [
    ({"weight_map": {"a": ["b"]}}, "index.json: weight_map is missing or damaged"),
    ({}, "index.json: weight_map is missing or damaged"),
    ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors: cannot be read"),
  ],
)
def test_an_index_that_is_damaged(damage: dict, message: str, folder):  # noqa: F811
  place = folder("llama")
  shutil.move(place / "model.safetensors", place / "part.safetensors")
  (place / "model.safetensors.index.json").write_text(json.dumps(damage))
  with pytest.raises(WeightsError, match=message):
    load_checkpoint(place)


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
def test_quantised_types_are_named(kind: str, folder):  # noqa: F811
  place, name = folder("llama"), "model.layers.1.mlp.up_proj.weight"
  from safetensors.torch import load_file as load_torch
  from safetensors.torch import save_file as save_torch

  tensors = load_torch(place / "model.safetensors")
  tensors[name] = tensors[name].to(getattr(torch, kind))
  save_torch(tensors, place / "model.safetensors", {"format": "pt"})
  with pytest.raises(WeightsError, match=f"model.safetensors: tensor {name} has type ") as caught:
    load_checkpoint(place)
  assert "\n" not in str(caught.value)
