"""Every family against its class in transformers: weights in and out, logits, PASTA's mask and positions,
tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from helpers.folders import CONTROLS, TEMPLATE
from safetensors.numpy import load_file, save_file
from test_export import with_adapter, write_adapter
from test_model import Letters, decoding_form, logits, nested_layout, torch_logits

from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.model.transformer import stack
from pasta_jax.weights import build
from pasta_jax.weights.arrays import WeightsError
from pasta_jax.weights.checkpoint import load_checkpoint
from pasta_jax.weights.export import export
from pasta_jax.weights.hf_folder import save_hf_folder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# All widths differ, the heads together are wider than the model, and the vocabulary has the size of `Letters`
# and the tags.
_SHAPE = dict(
  vocab_size=Vocabulary(Letters()).size,
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=3,
  num_attention_heads=6,
  num_key_value_heads=2,
  head_dim=16,
  max_position_embeddings=4096,
  rms_norm_eps=1e-5,
  bos_token_id=None,
  eos_token_id=None,
  pad_token_id=0,
  attn_implementation="eager",
)
_LLAMA3 = dict(
  rope_type="llama3",
  rope_theta=10_000.0,
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=64,
)
FAMILIES = {
  "llama": dict(tie_word_embeddings=True),
  "llama, llama3 RoPE": dict(tie_word_embeddings=False, rope_parameters=_LLAMA3),
  "llama, linear RoPE": dict(rope_parameters=dict(rope_type="linear", rope_theta=5e4, factor=4.0)),
  "mistral": dict(sliding_window=None),
  "mistral, window": dict(sliding_window=24),
  "qwen2": dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
  "qwen2, window": dict(use_sliding_window=True, sliding_window=24, max_window_layers=1),
  "qwen3": dict(tie_word_embeddings=False),
  "qwen3, window": dict(
    use_sliding_window=True,
    sliding_window=24,
    layer_types=["full_attention", "sliding_attention", "full_attention"],
  ),
  "gemma": {},  # ties its head by default
  "gemma2": dict(
    sliding_window=24, query_pre_attn_scalar=11, attn_logit_softcapping=3.0, final_logit_softcapping=2.0
  ),
  "gemma3_text": dict(
    sliding_window=24,
    query_pre_attn_scalar=20,
    rope_local_base_freq=1e3,
    layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    rope_parameters={
      "full_attention": dict(rope_type="linear", rope_theta=1e6, factor=4.0),
      "sliding_attention": dict(rope_type="default", rope_theta=1e3),
    },
  ),
}
EVERY = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="module")
def torch_models():
  """By family: transformers' model with random weights, norms and biases too."""
  made = {}

  def of(name: str):
    if name not in made:
      torch.manual_seed(len(made))
      model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(name.split(",")[0], **_SHAPE | FAMILIES[name])
      ).eval()
      with torch.no_grad():
        for key, x in model.named_parameters():
          noise = torch.randn_like(x)
          x.copy_(x + 0.2 * noise if "norm" in key else noise * 2 * 24**-0.5)
      made[name] = model
    return made[name]

  return of


@pytest.fixture
def folder(tmp_path: Path, torch_models):
  """Writes a family's model with transformers, and a tokenizer to the same folder."""

  def write(name: str) -> Path:
    backend = tokenizers.Tokenizer(
      tokenizers.models.BPE(vocab={c: i for i, c in enumerate(CONTROLS)}, merges=[])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(CONTROLS)
    torch_models(name).save_pretrained(tmp_path / "model")
    backend.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "model" / "tokenizer_config.json").write_text(
      json.dumps({"eos_token": "<|im_end|>", "chat_template": TEMPLATE})
    )
    return tmp_path / "model"

  return write


def masked_logits(model, tokens, positions, mask) -> np.ndarray:
  """transformers' logits under PASTA's mask; its local layers see a window of positions."""
  config = model.config
  if not getattr(config, "sliding_window", None):
    return torch_logits(model, tokens, positions, mask)
  local_mask = np.asarray(mask) & (positions[:, :, None] - positions[:, None, :] < config.sliding_window)
  if "full_attention" not in (getattr(config, "layer_types", None) or ()):
    return torch_logits(model, tokens, positions, local_mask)
  additive = lambda m: torch.where(
    torch.from_numpy(np.array(m))[:, None], 0.0, torch.finfo(torch.float32).min
  )
  with torch.no_grad():
    return model(
      torch.from_numpy(tokens.astype(np.int64)),
      position_ids=torch.from_numpy(positions.astype(np.int64)),
      attention_mask={"full_attention": additive(mask), "sliding_attention": additive(local_mask)},
      use_cache=False,
    ).logits.numpy()


@EVERY
def test_logits_equal_those_of_transformers(name: str, folder, torch_models):
  """Plain text, and a program with nested chunks under its own mask and positions, also at large
  positions."""
  loaded = load_checkpoint(folder(name))
  ours, theirs = build.from_params(loaded.config, loaded.params), torch_models(name)
  tokens, positions, mask = nested_layout()
  assert tokens.shape[1] > 4 * 24  # longer than windows
  expected = torch_logits(theirs, tokens)
  np.testing.assert_allclose(logits(ours, tokens), expected, atol=1e-4, rtol=1e-4)
  assert expected.std() > 0.5  # the comparison is not one of zeros
  for shift, error in ((0, 1e-4), (2000, 1e-3)):  # at large positions float32 angles are rounded by 1e-4
    expected = masked_logits(theirs, tokens, positions + shift, mask)
    actual = logits(ours, tokens, positions + shift, mask, block=48)
    np.testing.assert_allclose(actual, expected, atol=error, rtol=1e-4)


@EVERY
def test_written_models_are_read_by_transformers_and_by_us(name: str, folder, torch_models, tmp_path: Path):
  loaded = load_checkpoint(folder(name))
  files = save_hf_folder(
    tmp_path / "again", loaded.config, loaded.params, loaded.tokenizer, file_bytes=20_000
  )
  assert len(files) > 2 and max(f.stat().st_size for f in files) < 40_000
  back = load_checkpoint(tmp_path / "again")
  assert back.config == loaded.config
  for key, value in loaded.params.items():
    np.testing.assert_array_equal(back.params[key], value, err_msg=key)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "again", attn_implementation="eager"
  ).eval()
  if name != "mistral":  # without a window it is a Llama, and written as one
    assert type(theirs) is type(torch_models(name))
  tokens, positions, mask = nested_layout()
  np.testing.assert_array_equal(
    masked_logits(theirs, tokens, positions, mask), masked_logits(torch_models(name), tokens, positions, mask)
  )


@pytest.fixture
def vision_model(folder):
  """(folder, transformers' model) of a Gemma 3 with a vision part, whose config lacks keys that have a
  default."""
  text = {
    **_SHAPE,
    **FAMILIES["gemma3_text"],
    "head_dim": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
  }
  vision = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
  )
  torch.manual_seed(5)
  theirs = transformers.Gemma3ForConditionalGeneration(
    transformers.Gemma3Config(
      text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=3
    )
  ).eval()
  place = folder("gemma3_text")  # for its tokenizer
  (place / "model.safetensors").unlink()
  theirs.save_pretrained(place)
  described = json.loads((place / "config.json").read_text())
  defaults = ("head_dim", "num_attention_heads", "num_key_value_heads")
  assert described["model_type"] == "gemma3"
  described["text_config"] = {k: v for k, v in described["text_config"].items() if k not in defaults}
  (place / "config.json").write_text(json.dumps(described))
  return place, theirs


def test_the_text_part_of_a_model_with_vision(vision_model):
  """Gemma 3's larger models, with the present and the earlier names of their tensors."""
  place, theirs = vision_model
  tokens, positions, _ = nested_layout()
  with torch.no_grad():
    expected = theirs(torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits.numpy()
  assert expected.std() > 0.01
  for prefixes in (
    {},
    {
      "language_model.model.": "model.language_model.",
      "vision_tower.": "model.vision_tower.",
      "multi_modal_projector.": "model.multi_modal_projector.",
    },
  ):
    tensors = load_file(place / "model.safetensors")
    renamed = {
      next((new + k.removeprefix(old) for old, new in prefixes.items() if k.startswith(old)), k): x
      for k, x in tensors.items()
    }
    save_file(renamed, place / "model.safetensors", {"format": "pt"})
    loaded = load_checkpoint(place)
    assert loaded.config.head_dim == 256 and loaded.config.local_layers == (True, True, False)
    np.testing.assert_allclose(
      logits(build.from_params(loaded.config, loaded.params), tokens), expected, atol=1e-4
    )
  name = next(k for k in renamed if "q_proj" in k and "language" in k)
  save_file({k: x for k, x in renamed.items() if k != name}, place / "model.safetensors", {"format": "pt"})
  with pytest.raises(WeightsError, match="tensor model.layers.0.self_attn.q_proj.weight is missing"):
    load_checkpoint(place)


def test_peft_finds_the_text_part_of_a_model_with_vision(vision_model, tmp_path: Path):
  peft = pytest.importorskip("peft")
  source, _ = vision_model
  adapter = write_adapter(tmp_path / "adapter.safetensors", source)
  checkpoint, model = with_adapter(source, adapter)
  assert export(tmp_path / "peft", checkpoint, adapter, form="peft", dtype="float32").endswith(
    "PEFT in float32"
  )
  base = transformers.AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
  theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
  tokens = np.r_[checkpoint.vocabulary.tags.ids, np.arange(40, 60)].astype(np.int32)[None]
  with torch.no_grad():
    expected = theirs(torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits.numpy()
  np.testing.assert_allclose(logits(model, tokens), expected, atol=1e-4, rtol=1e-4)


@EVERY
def test_forms_of_the_model_agree(name: str, folder):
  """Layers in a list and stacked, the form for decoding, and back to named arrays."""
  loaded = load_checkpoint(folder(name))
  model = build.from_params(loaded.config, loaded.params)
  tokens, positions, mask = nested_layout()
  expected = logits(model, tokens, positions, mask)
  stacked = stack(model)
  np.testing.assert_allclose(logits(stacked, tokens, positions, mask), expected, atol=1e-4)
  np.testing.assert_allclose(logits(decoding_form(stacked), tokens, positions, mask), expected, atol=1e-4)
  params = build.to_params(stacked)
  assert params.keys() == loaded.params.keys()
  for key, value in loaded.params.items():
    np.testing.assert_array_equal(params[key], value, err_msg=key)


BREAKAGES = {
  "activation 'relu' is not supported in the family 'qwen3'": ("qwen3", dict(hidden_act="relu")),
  "attention_bias is not supported": ("qwen3", dict(attention_bias=True)),
  "factor is missing": ("llama", dict(rope_parameters=dict(rope_type="linear"))),
}


@pytest.mark.parametrize("message", BREAKAGES)
def test_unsupported_features_are_named(message: str, folder):
  name, changes = BREAKAGES[message]
  path = folder(name)
  config = json.loads((path / "config.json").read_text())
  (path / "config.json").write_text(json.dumps(config | changes))
  with pytest.raises(WeightsError, match=message) as caught:
    load_checkpoint(path)
  assert str(path) in str(caught.value) and "\n" not in str(caught.value)
