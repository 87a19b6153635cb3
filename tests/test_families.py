"""Every family against transformers' own classes: weights in and out, logits, PASTA's mask and positions, tokens."""

import dataclasses
import json
import pickle
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
from folders import CONTROLS, TEMPLATE, describe_shape
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from test_model import Letters, decoding_form, logits, nested_layout, torch_logits

from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.model import build
from pasta_jax.model.checkpoint import load_checkpoint
from pasta_jax.model.config import ModelConfig
from pasta_jax.model.families import family_of, local_layers
from pasta_jax.model.hf_folder import save_hf_folder
from pasta_jax.model.tokenizer import Tokenizer
from pasta_jax.model.weights import WeightsError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# All widths differ, heads together are wider than the model, and rows are as many as `Letters` and the tags need.
_SHAPE = dict(vocab_size=Vocabulary(Letters()).size, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
              num_attention_heads=6, num_key_value_heads=2, head_dim=16, max_position_embeddings=4096,
              rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=None, pad_token_id=0, attn_implementation="eager")
_LLAMA3 = dict(rope_type="llama3", rope_theta=10_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=64)
FAMILIES = {
  "llama": dict(tie_word_embeddings=True),
  "llama, llama3 RoPE": dict(tie_word_embeddings=False, rope_parameters=_LLAMA3),
  "llama, linear RoPE": dict(rope_parameters=dict(rope_type="linear", rope_theta=5e4, factor=4.0)),
  "mistral": dict(sliding_window=None),
  "mistral, window": dict(sliding_window=24),
  "qwen2": dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
  "qwen3": dict(tie_word_embeddings=False),
  "gemma": {},  # ties its head without saying so
  "gemma2": dict(sliding_window=24, query_pre_attn_scalar=11, attn_logit_softcapping=3.0, final_logit_softcapping=2.0),
  "gemma3_text": dict(sliding_window=24, query_pre_attn_scalar=20, rope_local_base_freq=1e3,
                      layer_types=["sliding_attention", "sliding_attention", "full_attention"], rope_parameters={
                        "full_attention": dict(rope_type="linear", rope_theta=1e6, factor=4.0),
                        "sliding_attention": dict(rope_type="default", rope_theta=1e3)}),
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
        transformers.AutoConfig.for_model(name.split(",")[0], **_SHAPE | FAMILIES[name])).eval()
      with torch.no_grad():
        for key, x in model.named_parameters():
          noise = torch.randn_like(x)
          x.copy_(x + 0.2 * noise if "norm" in key else noise * 2 * 24 ** -0.5)
      made[name] = model
    return made[name]

  return of


@pytest.fixture
def folder(tmp_path: Path, torch_models):
  """Writes a family's model as transformers does, with a tokenizer beside it."""

  def write(name: str) -> Path:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(CONTROLS)}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(CONTROLS)
    torch_models(name).save_pretrained(tmp_path / "model")
    backend.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "model" / "tokenizer_config.json").write_text(
      json.dumps({"eos_token": "<|im_end|>", "chat_template": TEMPLATE}))
    return tmp_path / "model"

  return write


def masked_logits(model, tokens, positions, mask) -> np.ndarray:
  """transformers' logits under PASTA's mask; its local layers see a window of positions."""
  config = model.config
  if not getattr(config, "sliding_window", None):
    return torch_logits(model, tokens, positions, mask)
  near = np.asarray(mask) & (positions[:, :, None] - positions[:, None, :] < config.sliding_window)
  if "full_attention" not in (getattr(config, "layer_types", None) or ()):
    return torch_logits(model, tokens, positions, near)
  additive = lambda m: torch.where(torch.from_numpy(np.array(m))[:, None], 0.0, torch.finfo(torch.float32).min)
  with torch.no_grad():
    return model(torch.from_numpy(tokens.astype(np.int64)), position_ids=torch.from_numpy(positions.astype(np.int64)),
                 attention_mask={"full_attention": additive(mask), "sliding_attention": additive(near)},
                 use_cache=False).logits.numpy()


@EVERY
def test_logits_equal_those_of_transformers(name: str, folder, torch_models):
  """Plain text, and a program with nested chunks under its own mask and positions; far out, too."""
  loaded = load_checkpoint(folder(name))
  ours, theirs = build.from_params(loaded.config, loaded.params), torch_models(name)
  tokens, positions, mask = nested_layout()
  assert tokens.shape[1] > 4 * 24  # beyond windows
  expected = torch_logits(theirs, tokens)
  np.testing.assert_allclose(logits(ours, tokens), expected, atol=1e-4, rtol=1e-4)
  assert expected.std() > 0.5  # the comparison is not one of zeros
  for shift, error in ((0, 1e-4), (2000, 1e-3)):  # there a float32 angle is rounded by 1e-4
    expected = masked_logits(theirs, tokens, positions + shift, mask)
    actual = logits(ours, tokens, positions + shift, mask, block=48)
    np.testing.assert_allclose(actual, expected, atol=error, rtol=1e-4)


@EVERY
def test_written_models_are_read_by_transformers_and_by_us(name: str, folder, torch_models, tmp_path: Path):
  loaded = load_checkpoint(folder(name))
  files = save_hf_folder(tmp_path / "again", loaded.config, loaded.params, loaded.tokenizer, file_bytes=20_000)
  assert len(files) > 2 and max(f.stat().st_size for f in files) < 40_000
  back = load_checkpoint(tmp_path / "again")
  assert back.config == loaded.config
  for key, value in loaded.params.items():
    np.testing.assert_array_equal(back.params[key], value, err_msg=key)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", attn_implementation="eager").eval()
  if name != "mistral":  # without windows it is a Llama, and written as one
    assert type(theirs) is type(torch_models(name))
  tokens, positions, mask = nested_layout()
  np.testing.assert_array_equal(masked_logits(theirs, tokens, positions, mask),
                                masked_logits(torch_models(name), tokens, positions, mask))


def test_the_text_part_of_a_model_that_sees(folder, torch_models, tmp_path: Path):
  """Gemma 3's larger models: their own class, its names for tensors of now and before, and a config that leaves out
  what is usual."""
  text = {**_SHAPE, **FAMILIES["gemma3_text"], "head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
  vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                patch_size=14)
  torch.manual_seed(5)
  theirs = transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(
    text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=3)).eval()
  place = folder("gemma3_text")  # for its tokenizer
  (place / "model.safetensors").unlink()
  theirs.save_pretrained(place)
  described = json.loads((place / "config.json").read_text())
  usual = ("head_dim", "num_attention_heads", "num_key_value_heads")
  assert described["model_type"] == "gemma3"
  described["text_config"] = {k: v for k, v in described["text_config"].items() if k not in usual}
  (place / "config.json").write_text(json.dumps(described))
  tokens, positions, _ = nested_layout()
  with torch.no_grad():
    expected = theirs(torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits.numpy()
  assert expected.std() > 0.01
  for prefixes in ({}, {"language_model.model.": "model.language_model.", "vision_tower.": "model.vision_tower.",
                        "multi_modal_projector.": "model.multi_modal_projector."}):
    tensors = load_file(place / "model.safetensors")
    renamed = {next((new + k.removeprefix(old) for old, new in prefixes.items() if k.startswith(old)), k): x
               for k, x in tensors.items()}
    save_file(renamed, place / "model.safetensors", {"format": "pt"})
    loaded = load_checkpoint(place)
    assert loaded.config.head_dim == 256 and loaded.config.local_layers == (True, True, False)
    np.testing.assert_allclose(logits(build.from_params(loaded.config, loaded.params), tokens), expected, atol=1e-4)
  name = next(k for k in renamed if "q_proj" in k and "language" in k)
  save_file({k: x for k, x in renamed.items() if k != name}, place / "model.safetensors", {"format": "pt"})
  with pytest.raises(WeightsError, match="tensor model.layers.0.self_attn.q_proj.weight is missing"):
    load_checkpoint(place)


@EVERY
def test_forms_of_the_model_agree(name: str, folder):
  """Layers in a list and stacked, as it is and as it decodes, and back to named arrays."""
  loaded = load_checkpoint(folder(name))
  model = build.from_params(loaded.config, loaded.params)
  tokens, positions, mask = nested_layout()
  expected = logits(model, tokens, positions, mask)
  stacked = build.stack(model)
  np.testing.assert_allclose(logits(stacked, tokens, positions, mask), expected, atol=1e-4)
  np.testing.assert_allclose(logits(decoding_form(stacked), tokens, positions, mask), expected,
                             atol=1e-4)
  params = build.to_params(stacked)
  assert params.keys() == loaded.params.keys()
  for key, value in loaded.params.items():
    np.testing.assert_array_equal(params[key], value, err_msg=key)


BREAKAGES = {
  "use_sliding_window is not supported in the family 'qwen2'": ("qwen2", dict(use_sliding_window=True)),
  "RoPE scaling 'yarn' is not supported": ("llama", dict(rope_parameters=dict(rope_type="yarn", factor=2.0))),
  "activation 'relu' is not supported in the family 'qwen3'": ("qwen3", dict(hidden_act="relu")),
  "attention_bias is not supported": ("qwen3", dict(attention_bias=True)),
  "factor is missing": ("llama", dict(rope_parameters=dict(rope_type="linear"))),
}


@pytest.mark.parametrize("message", BREAKAGES)
def test_features_that_the_decoder_lacks_are_named(message: str, folder):
  name, changes = BREAKAGES[message]
  path = folder(name)
  config = json.loads((path / "config.json").read_text())
  (path / "config.json").write_text(json.dumps(config | changes))
  with pytest.raises(WeightsError, match=message) as caught:
    load_checkpoint(path)
  assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# --- Gemma's tokenizer ---

TURNS = ["<start_of_turn>", "<end_of_turn>"]
_WORDS = ["he", "▁he", "▁▁", "lo", "▁world", "é"]


@pytest.fixture(scope="module")
def gemma_folder(tmp_path_factory) -> Path:
  """Gemma's two files in small: pieces with marked blanks, and a token for every byte."""
  folder = tmp_path_factory.mktemp("gemma")
  specials = ["<pad>", "<eos>", "<bos>", "<unk>", *TURNS]
  letters = sorted(set("helo wrd123\n▁é".replace(" ", "")))
  vocab = [*specials, *(f"<0x{b:02X}>" for b in range(256)), *letters, *_WORDS[:3], "lo", "▁w", "or", "ld", "orld",
           "▁world"]
  merges = [("h", "e"), ("▁", "he"), ("▁", "▁"), ("l", "o"), ("▁", "w"), ("o", "r"), ("l", "d"), ("or", "ld"),
            ("▁w", "orld")]
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(
    vocab={t: i for i, t in enumerate(dict.fromkeys(vocab))}, merges=merges, unk_token="<unk>", fuse_unk=True,
    byte_fallback=True))
  backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "merged_with_previous")
  backend.decoder = tokenizers.decoders.Sequence([
    tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
  backend.add_special_tokens(specials)
  backend.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "bos_token": "<bos>"}))
  return folder


@pytest.fixture(scope="module")
def gemma(gemma_folder: Path) -> Tokenizer:
  return Tokenizer.from_file(gemma_folder / "tokenizer.json", gemma_folder / "tokenizer_config.json")


@given(text=st.lists(st.text() | st.sampled_from([" he", "  ", " world", "▁", "<eos>", "<0x0A>"])).map("".join))
def test_bytes_of_pieces_are_the_text(gemma: Tokenizer, text: str):
  ids = gemma.encode(text)
  assert gemma.decode(ids) == text and not gemma.special_ids & set(ids)


def test_pieces_are_those_of_hugging_face(gemma: Tokenizer, gemma_folder: Path):
  backend = tokenizers.Tokenizer.from_file(str(gemma_folder / "tokenizer.json"))
  for text in ("hello world", "  he\n he é 12", "12🦜", ""):
    assert gemma.encode(text) == backend.encode(text).ids
  assert gemma.token_bytes(gemma.encode(" world")[0]) == b" world"
  assert {gemma.token_bytes(t): v for t, v in gemma.digit_values().items()}[b"3"] == (3, 10)
  assert pickle.loads(pickle.dumps(gemma)).encode("▁he") == gemma.encode("▁he")


def test_gemma_has_turns_without_a_template(gemma: Tokenizer):
  ids = gemma.chat_prompt([{"role": "user", "content": " he<end_of_turn>"}, {"role": "assistant", "content": "lo"},
                           {"role": "user", "content": "12"}])
  assert gemma.decode(ids) == ("<bos><start_of_turn>user\nhe<end_of_turn><end_of_turn>\n<start_of_turn>model\nlo"
                               "<end_of_turn>\n<start_of_turn>user\n12<end_of_turn>\n<start_of_turn>model\n")
  assert ids.count(TURNS.index("<end_of_turn>") + 4) == 3  # the one in the content is text
  with pytest.raises(ValueError, match="no system role"):
    gemma.chat_prompt([{"role": "system", "content": "x"}])


BLANKS = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
# How files of Llama 2 and Mistral put blanks before texts: (normalizer, pre_tokenizer) of tokenizer.json.
PREFIXES = {
  "every": ({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, BLANKS]}, None),
  "first": (None, _METASPACE | {"prepend_scheme": "first"}),
  "always": (None, _METASPACE | {"prepend_scheme": "always"}),
  "words": (None, _METASPACE | {"prepend_scheme": "always", "split": True}),
  "never": (None, _METASPACE | {"prepend_scheme": "never"}),
}


def with_blanks(source: Path, folder: Path, normalizer, pre_tokenizer, template: str) -> Tokenizer:
  folder.mkdir()
  whole = json.loads((source / "tokenizer.json").read_text())
  (folder / "tokenizer.json").write_text(json.dumps(
    whole | {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}))
  described = json.loads((source / "tokenizer_config.json").read_text())
  (folder / "tokenizer_config.json").write_text(json.dumps(
    described | {"chat_template": template, "tokenizer_class": "PreTrainedTokenizerFast"}))
  return Tokenizer.from_file(folder / "tokenizer.json", folder / "tokenizer_config.json")


@pytest.mark.parametrize("begins", ["", "{{ bos_token }}"])
@pytest.mark.parametrize("name", PREFIXES)
def test_blanks_before_texts_stand_in_conversations_alone(name: str, begins: str, gemma_folder: Path, tmp_path: Path):
  template = begins + "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}he"
  ours = with_blanks(gemma_folder, tmp_path / "it", *PREFIXES[name], template)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "it")
  ours.save(tmp_path / "it")
  again = Tokenizer.from_file(tmp_path / "it" / "tokenizer.json", tmp_path / "it" / "tokenizer_config.json")
  theirs_again = transformers.AutoTokenizer.from_pretrained(tmp_path / "it")
  for first, second in (("he world", " he"), ("", "world\n"), ("  he", "1")):
    messages = [{"role": "user", "content": first}, {"role": "assistant", "content": second}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.chat_prompt(messages) == again.chat_prompt(messages) == expected
    assert theirs_again.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == expected
    for text in (first, second, first + "▁" + second):
      assert ours.decode(ours.encode(text)) == text and ours.encode(text) == again.encode(text)


def test_pieces_that_change_a_text_are_refused(gemma_folder: Path, tmp_path: Path):
  lower = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, BLANKS]}
  with pytest.raises(WeightsError, match="tokenizer.json: its normaliser changes more of a text"):
    with_blanks(gemma_folder, tmp_path / "it", lower, None, "")


# --- GGUF ---

PIECES = [*(f"<0x{b:02X}>" for b in range(256)), "▁he", "▁world", "he", "▁w", "orld", "or", "ld", "lo", *"helorwd▁é1"]


def write_gguf(path: Path, config: ModelConfig, params: dict[str, np.ndarray]) -> Path:
  """As llama.cpp's converter does: scales of norms as they are used, rows of q and k in their order but for Llama."""
  arch = family_of(config).removesuffix("_text")
  writer = gguf.GGUFWriter(path, arch)
  describe_shape(writer, config)
  if config.rope_scaling:
    writer.add_rope_scaling_type(gguf.RopeScalingType(config.rope_scaling.kind))
    writer.add_rope_scaling_factor(config.rope_scaling.factor)
  if config.window:
    writer.add_sliding_window(config.window)
  if config.attention_softcap:
    writer.add_attn_logit_softcapping(config.attention_softcap)
    writer.add_final_logit_softcapping(config.logit_softcap)
  writer.add_tokenizer_model("llama")
  tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *TURNS, "\n\n", "  ", *PIECES]
  writer.add_token_list(tokens)
  writer.add_token_types([3] * 6 + [4, 4] + [6] * 256 + [1] * (len(PIECES) - 256))
  writer.add_token_scores([-1000.0] * 8 + [0.0] * 256 + [-float(i) for i in range(len(PIECES) - 256)])
  writer.add_add_space_prefix(False)
  writer.add_eos_token_id(1)
  writer.add_bos_token_id(2)
  words = {"embed.embedding": "token_embd", "final_norm": "output_norm", "head": "output", "attn.o": "attn_output",
           "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.q_norm": "attn_q_norm",
           "attn.k_norm": "attn_k_norm", "mlp_norm": "ffn_norm", "mlp.gate": "ffn_gate", "mlp.up": "ffn_up",
           "mlp.down": "ffn_down", "attn_post_norm": "post_attention_norm", "mlp_post_norm": "post_ffw_norm"}
  for name, x in params.items():
    layer = name.split(".")[1] if name.startswith("layers.") else None
    middle, kind = (name.split(".", 2)[2] if layer else name), name.rsplit(".", 1)[1]
    middle = middle if kind == "embedding" else middle.rsplit(".", 1)[0]
    x = x.T if kind == "kernel" else x + np.float32(config.norm_offset) if kind == "scale" else x
    writer.add_tensor((f"blk.{layer}." if layer else "") + words.get(middle, middle) + (
      ".bias" if kind == "bias" else ".weight"), np.ascontiguousarray(x))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"])
def test_gguf_and_hugging_face_give_the_same_model(name: str, folder, tmp_path: Path):
  loaded = load_checkpoint(folder(name))
  config = loaded.config
  if config.window:  # GGUF does not say these: llama.cpp knows them by the family
    config = dataclasses.replace(config, local_layers=local_layers(name, 3), query_scale=config.head_dim ** -0.5,
                                 local_rope_theta=10_000.0 if name == "gemma3_text" else 0.0)
  config = dataclasses.replace(config, vocab_size=(rows := len(PIECES) + 8), tag_ids=())  # another vocabulary
  params = {k: np.resize(v, (rows, 24)) if k.startswith("embed") else np.resize(v.T, (rows, 24)).T
            if k.startswith("head") else v for k, v in loaded.params.items()}
  again = load_checkpoint(write_gguf(tmp_path / "model.gguf", config, params))
  assert again.config == config and again.params.keys() == params.keys()
  for key, value in params.items():
    np.testing.assert_allclose(again.params[key], value, atol=1e-6 * key.endswith("scale"), rtol=0, err_msg=key)


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe"])
def test_byte_level_gguf_cuts_texts_as_hugging_face_does(pre: str):
  """Against the expressions that transformers holds for these vocabularies."""
  from transformers.convert_slow_tokenizer import TikTokenConverter
  from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
  pattern = PRETOKENIZE_REGEX if pre == "qwen2" else TikTokenConverter("").pattern
  bytes_ = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  merges = [("h", "e"), ("l", "o"), ("Ġ", "he"), ("1", "2"), ("12", "3"), ("'", "s"), ("Ċ", "Ċ"), ("Ġ", "Ġ")]
  tokens = [*bytes_, *map("".join, merges), "helo", "<|end|>"]  # "helo" is an entry that no merge leads to
  backend = tokenizers.Tokenizer(tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, merges,
                                                       ignore_merges=pre == "llama-bpe"))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
    tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
    tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  ours = Tokenizer.from_gguf_fields(tokens, [1] * (len(tokens) - 1) + [3], len(tokens) - 1, pre=pre,
                                    merges=[" ".join(m) for m in merges])

  @given(text=st.lists(st.text() | st.sampled_from(["helo", " he", "1234", "'s", "\n\n", "  ", "é"])).map("".join))
  def same(text: str):
    assert ours.encode(text) == backend.encode(text).ids and ours.decode(ours.encode(text)) == text

  same()
  assert (len(tokens) - 2 in ours.encode("helo")) == (pre == "llama-bpe")
  assert max(value for value, _ in ours.digit_values().values()) == 123


def test_a_blank_before_texts_of_gguf(tmp_path: Path):
  given = dict(tokens=["<unk>", "<s>", "</s>", *PIECES], token_types=[2, 3, 3] + [6] * 256 + [1] * (len(PIECES) - 256),
               scores=[-float(i) for i in range(len(PIECES) + 3)], eos_id=2, bos_id=1,
               chat_template="{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}he")
  ours = Tokenizer.from_gguf_fields(**given, prefix=True)
  ids = ours.chat_prompt([{"role": "user", "content": "he world"}])
  assert [ours.token_bytes(t) for t in ids] == [b"<s>", b" he", b" world", b"</s>", b" he"]
  assert ours.token_bytes(ours.encode("he")[0]) == b"he"
  ours.save(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert theirs.apply_chat_template([{"role": "user", "content": "he world"}], return_dict=False,
                                    add_generation_prompt=True) == ids


def test_pieces_of_gguf(folder, tmp_path: Path):
  loaded = load_checkpoint(folder("gemma"))
  config = dataclasses.replace(loaded.config, vocab_size=len(PIECES) + 8)
  params = dict(loaded.params) | {"embed.embedding": np.zeros((len(PIECES) + 8, 24), np.float32)}
  tokenizer = load_checkpoint(write_gguf(tmp_path / "model.gguf", config, params)).tokenizer
  assert [tokenizer.token_bytes(t) for t in tokenizer.encode("hello he world\n\n  1▁é<eos>\n")] == [
    b"he", b"l", b"lo", b" he", b" world", b"\n\n", b"  ", b"1", b"\xe2", b"\x96", b"\x81", "é".encode(), b"<", b"e",
    b"o", b"s", b">", b"\n"]
  assert tokenizer.special_ids == set(range(6))
  assert tokenizer.decode(tokenizer.chat_prompt([{"role": "user", "content": "he"}])) == (
    "<bos><start_of_turn>user\nhe<end_of_turn>\n<start_of_turn>model\n")
