"""GGUF files are read back exactly, and as Hugging Face folders of the same model; broken files are refused
in one line."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import test_families
import tokenizers
from helpers.folders import BYTE_TOKENS, PIECE_TOKENS, PIECES, write_gguf
from hypothesis import given
from hypothesis import strategies as st
from test_model import logits, nested_layout, torch_logits
from test_weights import CONFIG, assert_same, random_params

from pasta_jax.model.config import ModelConfig, RopeScaling
from pasta_jax.weights import build
from pasta_jax.weights.arrays import WeightsError
from pasta_jax.weights.checkpoint import load_checkpoint
from pasta_jax.weights.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
folder, torch_models = test_families.folder, test_families.torch_models  # fixtures

LLAMA3 = dataclasses.replace(CONFIG, rope_theta=500_000.0, rope_scaling=RopeScaling("llama3", 32.0))
GEMMA2 = ModelConfig(
  **vars(CONFIG)
  | dict(
    activation="gelu",
    norm_offset=1.0,
    scale_embeddings=True,
    post_norms=True,
    window=4096,
    query_scale=8**-0.5,
    attention_softcap=50.0,
    logit_softcap=30.0,
    local_layers=(True, False),
  )
)
GEMMA3 = dataclasses.replace(
  GEMMA2,
  qk_norm=True,
  attention_softcap=0.0,
  logit_softcap=0.0,
  local_rope_theta=10_000.0,
  local_layers=(True, True),
)


def refused(path: Path, message: str) -> None:
  with pytest.raises(WeightsError, match=message) as caught:
    load_checkpoint(path)
  assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_gguf_is_read_back_equal(tmp_path: Path):
  params = random_params(CONFIG)
  loaded = load_checkpoint(write_gguf(tmp_path / "tiny.gguf", CONFIG, params))
  assert (loaded.name, loaded.config) == ("tiny", CONFIG)
  assert_same(loaded.params, params)
  assert loaded.tokenizer.eos_id == 2 and loaded.tokenizer.special_ids == {0, 1, 2}


def test_a_head_of_its_own(tmp_path: Path):
  config = dataclasses.replace(CONFIG, tie_embeddings=False)
  loaded = load_checkpoint(write_gguf(tmp_path / "tiny.gguf", config, random_params(config)))
  assert loaded.config == config
  assert_same(loaded.params, random_params(config))


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_plain_types(tmp_path: Path, dtype: type):
  values = random_params(CONFIG)["layers.1.mlp.up.kernel"].astype(dtype)
  path = write_gguf(
    tmp_path / "tiny.gguf", CONFIG, random_params(CONFIG), **{"blk.1.ffn_up.weight": values.T}
  )
  np.testing.assert_array_equal(
    load_checkpoint(path).params["layers.1.mlp.up.kernel"], values.astype(np.float32)
  )


# Fields of Hugging Face's config.json that make it describe the same model as a GGUF file.
AS_GGUF = {
  "llama": {},
  "llama, llama3 RoPE": dict(
    rope_parameters=test_families._LLAMA3 | dict(original_max_position_embeddings=8192)
  ),
  "llama, linear RoPE": {},
  "mistral, window": {},
  "qwen2": {},
  "qwen3": {},
  "gemma": {},
  "gemma2": dict(query_pre_attn_scalar=16),
  "gemma3_text": dict(
    query_pre_attn_scalar=16,
    layer_types=["sliding_attention"] * 3,
    rope_parameters={
      "full_attention": dict(rope_type="linear", rope_theta=1e6, factor=4.0),
      "sliding_attention": dict(rope_type="default", rope_theta=10_000.0),
    },
  ),
}


@pytest.mark.parametrize("name", AS_GGUF)
def test_gguf_and_hugging_face_give_the_same_model(name: str, folder, tmp_path: Path):
  place = folder(name)
  described = json.loads((place / "config.json").read_text())
  (place / "config.json").write_text(json.dumps(described | AS_GGUF[name]))
  loaded = load_checkpoint(place)
  again = load_checkpoint(write_gguf(tmp_path / "model.gguf", loaded.config, loaded.params))
  # Their vocabularies differ, and so do the unused rows that the tags take.
  assert dataclasses.replace(again.config, tag_ids=loaded.config.tag_ids) == loaded.config
  assert again.params.keys() == loaded.params.keys()
  for key, value in loaded.params.items():  # scales lose a bit when an offset is added to them
    np.testing.assert_allclose(
      again.params[key], value, atol=1e-6 * key.endswith("scale"), rtol=0, err_msg=key
    )
  theirs = transformers.AutoModelForCausalLM.from_pretrained(place, attn_implementation="eager").eval()
  tokens, *_ = nested_layout()
  expected = torch_logits(theirs, tokens)
  assert expected.std() > 0.5  # the comparison is not one of zeros
  np.testing.assert_allclose(
    logits(build.from_params(again.config, again.params), tokens), expected, atol=1e-4, rtol=1e-4
  )


# --- metadata that files lack, or have in later versions only ---


@pytest.mark.parametrize(("factor", "head_dim"), [(32.0, 64), (8.0, 128), (8.0, 16)])
def test_rope_factors_of_every_llama_3(tmp_path: Path, factor: float, head_dim: int):
  config = dataclasses.replace(LLAMA3, head_dim=head_dim, rope_scaling=RopeScaling("llama3", factor))
  loaded = load_checkpoint(write_gguf(tmp_path / "tiny.gguf", config, random_params(config)))
  assert loaded.config == config
  assert_same(loaded.params, random_params(config))


@pytest.mark.parametrize(
  "factors", [[1, 1.5, 2, 4], [1, 1, 32], [0.5] * 4, [1, 1, 1, np.nan], [1, 1, 1, np.inf], [[8.0] * 4]]
)
def test_other_rope_factors_are_refused(tmp_path: Path, factors: list):
  path = write_gguf(
    tmp_path / "tiny.gguf",
    LLAMA3,
    random_params(LLAMA3),
    **{"rope_freqs.weight": np.array(factors, np.float32)},
  )
  refused(path, "tensor rope_freqs.weight has RoPE factors that are not Llama 3's")


def test_rope_factors_on_top_of_a_scaling_are_refused(tmp_path: Path):
  path = write_gguf(
    tmp_path / "tiny.gguf",
    LLAMA3,
    random_params(LLAMA3),
    describe=lambda w: (w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR), w.add_rope_scaling_factor(4.0)),
  )
  refused(path, "rope_freqs.weight")


def test_the_oldest_files_name_a_factor_alone(tmp_path: Path):
  path = write_gguf(
    tmp_path / "tiny.gguf",
    CONFIG,
    random_params(CONFIG),
    describe=lambda w: w.add_float32("llama.rope.scale_linear", 4.0),
  )
  assert load_checkpoint(path).config.rope_scaling == RopeScaling("linear", 4.0)


def test_defaults_of_gemma_2_are_those_of_llama_cpp(tmp_path: Path):
  silent = dataclasses.replace(GEMMA2, window=0, attention_softcap=0.0, logit_softcap=0.0)
  assert load_checkpoint(write_gguf(tmp_path / "tiny.gguf", silent, random_params(silent))).config == GEMMA2
  stated = dataclasses.replace(GEMMA2, window=12, attention_softcap=3.0, logit_softcap=2.0)
  assert load_checkpoint(write_gguf(tmp_path / "tiny.gguf", stated, random_params(stated))).config == stated


def test_gemma_3_must_name_its_window(tmp_path: Path):
  silent = dataclasses.replace(GEMMA3, window=0)
  path = write_gguf(tmp_path / "tiny.gguf", silent, random_params(silent), arch="gemma3")
  refused(path, "metadata gemma3.attention.sliding_window is missing")


@pytest.mark.parametrize("pattern", [2, [True, False]])
def test_gemma_3_may_name_its_local_layers(tmp_path: Path, pattern: int | list[bool]):
  path = write_gguf(
    tmp_path / "tiny.gguf",
    GEMMA3,
    random_params(GEMMA3),
    describe=lambda w: (w.add_sliding_window_pattern(pattern), w.add_rope_freq_base_swa(5_000.0)),
  )
  assert load_checkpoint(path).config == dataclasses.replace(
    GEMMA3, local_layers=(True, False), local_rope_theta=5_000.0
  )


# --- files that are refused ---

UP = "blk.0.ffn_up.weight"
SHAPED = {  # message: (architecture, tensors)
  "architecture 'mamba' is not supported, only llama, qwen2, qwen3, gemma, gemma2, gemma3": ("mamba", {}),
  "blk.1.attn_k.weight is missing": ("", {"blk.1.attn_k.weight": None}),
  "blk.1.attn_norm.weight is missing": ("", {"blk.1.attn_norm.weight": None}),
  "token_embd.weight is missing": ("", {"token_embd.weight": None}),
  "blk.0.attn_q.bias is not part of": ("", {"blk.0.attn_q.bias": np.ones(48, "f")}),
  "rope_factors_long.weight and 1 more is not part of": (
    "",
    {f"rope_factors_{x}.weight": np.ones(4, "f") for x in ("long", "short")},
  ),
  r"ffn_up.weight has shape \[24, 40\], not \[40, 24\]": ("", {UP: np.ones((24, 40), "f")}),
  f"tensor {UP} is I32, which cannot be read": ("", {UP: np.ones((40, 24), np.int32)}),
}


@pytest.mark.parametrize("message", SHAPED)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, message: str):
  arch, changes = SHAPED[message]
  refused(write_gguf(tmp_path / "tiny.gguf", CONFIG, random_params(CONFIG), arch=arch, **changes), message)


DESCRIBED: dict[str, Callable[[gguf.GGUFWriter], object]] = {
  "RoPE scaling 'yarn' is not supported": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
  "RoPE scaling 'longrope' is not supported": lambda w: w.add_rope_scaling_type(
    gguf.RopeScalingType.LONGROPE
  ),
  "metadata llama.rope.scaling.factor is missing": lambda w: w.add_rope_scaling_type(
    gguf.RopeScalingType.LINEAR
  ),
  "metadata llama.block_count is missing": lambda w: w.kv_data[0].pop("llama.block_count"),
  "llama.block_count = 2.0 is not a count": lambda w: w.add_float32("llama.block_count", 2.0),
  "tensor blk.299999.attn_norm.weight is missing": lambda w: w.add_block_count(300_000),
  "llama.feed_forward_length = \\[40, 40\\] is not a count": lambda w: w.add_feed_forward_length([40, 40]),
  "llama.expert_count = 8 is not supported": lambda w: w.add_expert_count(8),
  "RoPE over 4 of 8 dimensions is not supported": lambda w: w.add_rope_dimension_count(4),
  "tokenizer 'bert' is not supported": lambda w: w.add_tokenizer_model("bert"),
  "metadata tokenizer.ggml.merges is missing": lambda w: w.kv_data[0].pop("tokenizer.ggml.merges"),
}


@pytest.mark.parametrize("message", DESCRIBED)
def test_metadata_that_do_not_fit_are_refused(tmp_path: Path, message: str):
  refused(
    write_gguf(tmp_path / "tiny.gguf", CONFIG, random_params(CONFIG), describe=DESCRIBED[message]), message
  )


def test_gguf_truncated_anywhere_is_refused(tmp_path: Path):
  whole = write_gguf(tmp_path / "tiny.gguf", CONFIG, random_params(CONFIG)).read_bytes()
  cut = tmp_path / "cut.gguf"
  for size in [0, 3, 4, 10, 100, *range(200, len(whole), len(whole) // 50), len(whole) - 64]:
    cut.write_bytes(whole[:size])
    with pytest.raises(WeightsError, match="cut.gguf"):
      load_checkpoint(cut)
  last = list(random_params(CONFIG))[-1]
  assert last == "final_norm.scale" and CONFIG.d_model * 4 % 32 == 0  # no bytes after it
  refused(
    cut, f"truncated: tensor output_norm.weight ends at byte {len(whole)}, the file has {len(whole) - 64}"
  )


def test_gguf_with_damaged_header_never_fails_otherwise(tmp_path: Path):
  whole = bytearray(write_gguf(tmp_path / "tiny.gguf", CONFIG, random_params(CONFIG)).read_bytes())
  damaged = tmp_path / "damaged.gguf"
  rng = np.random.default_rng(1)
  for at in rng.integers(4, 9_000, size=150):
    copy = whole.copy()
    copy[at] ^= int(rng.integers(1, 256))
    damaged.write_bytes(copy)
    try:
      load_checkpoint(damaged)
    except WeightsError:
      pass


# --- models in parts ---


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
  """The parts of the model of LLAMA3, whose RoPE factors are in the last one."""
  write_gguf(tmp_path / "big.gguf", LLAMA3, random_params(LLAMA3), part_tensors=8)
  return sorted(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize("which", [0, 1, 2, None])
def test_parts_are_read_as_one(parts: list[Path], which: int | None):
  assert [p.name for p in parts] == [f"big-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
  source = parts[0].parent if which is None else parts[which]
  loaded = load_checkpoint(source)
  assert loaded.name == (source.name if which is None else "big") and loaded.source == str(source)
  assert loaded.config == LLAMA3 and loaded.tokenizer.eos_id == 2
  assert_same(loaded.params, random_params(LLAMA3))


def test_one_file_in_a_folder(tmp_path: Path):
  write_gguf(tmp_path / "tiny.gguf", CONFIG, random_params(CONFIG))
  assert load_checkpoint(tmp_path).config == CONFIG
  write_gguf(tmp_path / "other.gguf", CONFIG, random_params(CONFIG))
  refused(tmp_path, "has several models; name one: other.gguf, tiny.gguf")


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_missing_part_is_named(parts: list[Path], lost: int):
  parts[lost].unlink()
  for source in (parts[lost - 1], parts[0].parent):
    with pytest.raises(
      WeightsError, match=f"big-0000{lost + 1}-of-00003.gguf: missing: part {lost + 1} of 3"
    ):
      load_checkpoint(source)


def test_parts_that_do_not_belong_together_are_refused(parts: list[Path], tmp_path: Path):
  other = [tmp_path / "other" / part.name for part in parts]
  other[0].parent.mkdir()
  again = lambda size, **changes: write_gguf(
    other[0].with_name("big.gguf"), LLAMA3, random_params(LLAMA3), part_tensors=size, **changes
  )
  first, second, third = (part.read_bytes() for part in parts)
  parts[1].write_bytes(third)
  refused(parts[0].parent, "big-00002-of-00003.gguf: not part 2 of 3 of the model of big-00001-of-00003.gguf")
  again(7)
  parts[1].write_bytes(other[1].read_bytes())
  refused(parts[0].parent, "big-00002-of-00003.gguf: tensor .* is also in another part")
  parts[1].write_bytes(second)
  again(10)
  parts[2].write_bytes(other[2].read_bytes())
  refused(parts[0], "17 tensors in 3 parts, not 21")
  again(8, **{"rope_freqs.weight": None})
  parts[2].write_bytes(other[2].read_bytes())
  refused(parts[0].parent, "big-00003-of-00003.gguf: not part 3 of 3 of the model of big-00001-of-00003.gguf")
  parts[1].write_bytes(second[:-100])
  refused(parts[1], r"big-00002-of-00003.gguf: truncated: tensor .* ends at byte")
  (alone := tmp_path / "alone.gguf").write_bytes(first)
  refused(alone, "one of 3 parts, whose files must be named NAME-00001-of-00003.gguf and so on")


# --- tokenizers ---


def test_gguf_tokenizer_without_a_chat_template(tmp_path: Path):
  tokenizer = load_checkpoint(write_gguf(tmp_path / "tiny.gguf", CONFIG, random_params(CONFIG))).tokenizer
  assert tokenizer.decode(tokenizer.encode("he 12 é")) == "he 12 é"
  assert tokenizer.digit_values()[BYTE_TOKENS.index("12")] == (12, 100)
  with pytest.raises(ValueError, match="no chat template"):
    tokenizer.chat_prompt([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe"])
def test_byte_level_gguf_cuts_texts_as_hugging_face_does(pre: str):
  """Against the regular expressions of transformers for these vocabularies."""
  from transformers.convert_slow_tokenizer import TikTokenConverter
  from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

  pattern = PRETOKENIZE_REGEX if pre == "qwen2" else TikTokenConverter("").pattern
  bytes_ = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  merges = [("h", "e"), ("l", "o"), ("Ġ", "he"), ("1", "2"), ("12", "3"), ("'", "s"), ("Ċ", "Ċ"), ("Ġ", "Ġ")]
  tokens = [*bytes_, *map("".join, merges), "helo", "<|end|>"]  # no merge yields the entry "helo"
  backend = tokenizers.Tokenizer(
    tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, merges, ignore_merges=pre == "llama-bpe")
  )
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  ours = Tokenizer.from_gguf_fields(
    tokens, [1] * (len(tokens) - 1) + [3], len(tokens) - 1, pre=pre, merges=[" ".join(m) for m in merges]
  )

  @given(
    text=st.lists(st.text() | st.sampled_from(["helo", " he", "1234", "'s", "\n\n", "  ", "é"])).map("".join)
  )
  def same(text: str):
    assert ours.encode(text) == backend.encode(text).ids and ours.decode(ours.encode(text)) == text

  same()
  assert (len(tokens) - 2 in ours.encode("helo")) == (pre == "llama-bpe")
  assert max(value for value, _ in ours.digit_values().values()) == 123


def test_tokens_that_gguf_names(tmp_path: Path):
  """The end of a turn and of a text, and what `save` writes for other engines."""
  ours = load_checkpoint(
    write_gguf(
      tmp_path / "tiny.gguf",
      CONFIG,
      random_params(CONFIG),
      describe=lambda w: (
        w.add_eos_token_id(0),
        w.add_eot_token_id(2),
        w.add_pad_token_id(0),
        w.add_unk_token_id(1),
      ),
    )
  ).tokenizer
  assert ours.eos_id == 2 and ours.end_ids == (0, 2) and ours.bos_id is None
  ours.save(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert (theirs.pad_token_id, theirs.unk_token_id) == (0, 1)


@pytest.mark.parametrize(
  ("pre", "stated", "begins"),
  [
    ("smollm", None, False),
    ("smollm", True, True),
    ("llama-bpe", None, True),
    ("llama-bpe", False, False),
    ("", None, True),
    ("", False, False),
  ],
)
def test_texts_begin_as_llama_cpp_begins_them(tmp_path: Path, pre: str, stated: bool | None, begins: bool):
  """Byte-level vocabularies, and pieces ("")."""
  config = dataclasses.replace(CONFIG, vocab_size=len(PIECE_TOKENS))

  def describe(writer: gguf.GGUFWriter) -> None:
    writer.add_bos_token_id(2)
    if pre:
      writer.add_tokenizer_pre(pre)
    if stated is not None:
      writer.add_add_bos_token(stated)

  load_checkpoint(
    write_gguf(tmp_path / "tiny.gguf", config, random_params(config), pieces=not pre, describe=describe)
  ).tokenizer.save(tmp_path)
  assert (transformers.AutoTokenizer.from_pretrained(tmp_path)("he").input_ids[0] == 2) == begins


def test_a_blank_before_texts_of_gguf(tmp_path: Path):
  given = dict(
    tokens=["<unk>", "<s>", "</s>", *PIECES],
    token_types=[2, 3, 3] + [6] * 256 + [1] * (len(PIECES) - 256),
    scores=[-float(i) for i in range(len(PIECES) + 3)],
    eos_id=2,
    bos_id=1,
    chat_template="{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}he",
  )
  ours = Tokenizer.from_gguf_fields(**given, prefix=True)
  ids = ours.chat_prompt([{"role": "user", "content": "he world"}])
  assert [ours.token_bytes(t) for t in ids] == [b"<s>", b" he", b" world", b"</s>", b" he"]
  assert ours.token_bytes(ours.encode("he")[0]) == b"he"
  ours.save(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert (
    theirs.apply_chat_template(
      [{"role": "user", "content": "he world"}], return_dict=False, add_generation_prompt=True
    )
    == ids
  )


def test_pieces_of_gguf(tmp_path: Path):
  config = dataclasses.replace(GEMMA2, vocab_size=len(PIECE_TOKENS))
  tokenizer = load_checkpoint(
    write_gguf(tmp_path / "it.gguf", config, random_params(config), pieces=True)
  ).tokenizer
  assert [tokenizer.token_bytes(t) for t in tokenizer.encode("hello he world\n\n  1▁é<eos>\n")] == [
    b"he",
    b"l",
    b"lo",
    b" he",
    b" world",
    b"\n\n",
    b"  ",
    b"1",
    b"\xe2",
    b"\x96",
    b"\x81",
    "é".encode(),
    b"<",
    b"e",
    b"o",
    b"s",
    b">",
    b"\n",
  ]
  assert tokenizer.special_ids == set(range(6))
  assert tokenizer.decode(tokenizer.chat_prompt([{"role": "user", "content": "he"}])) == (
    "<bos><start_of_turn>user\nhe<end_of_turn>\n<start_of_turn>model\n"
  )
