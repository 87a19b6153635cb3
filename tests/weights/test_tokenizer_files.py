"""Tokenizers in folders, in Hugging Face's format and in SentencePiece's: they are read as transformers reads
them, and written so that it reads the same."""

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from helpers.folders import SEED_DATA, model_config, write_model
from hypothesis import given
from hypothesis import strategies as st

from pasta_jax.utils.environment import cache_folder
from pasta_jax.utils.jsonl import read_jsonl
from pasta_jax.weights.arrays import WeightsError
from pasta_jax.weights.checkpoint import load_checkpoint
from pasta_jax.weights.download import RELEASES
from pasta_jax.weights.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

# --- Gemma's tokenizer ---

TURNS = ["<start_of_turn>", "<end_of_turn>"]
_WORDS = ["he", "▁he", "▁▁", "lo", "▁world", "é"]


@pytest.fixture(scope="module")
def gemma_folder(tmp_path_factory) -> Path:
  """Small versions of Gemma's two files: pieces with marked blanks, and a token for every byte. Runs of
  blanks are added tokens, written as pieces."""
  folder = tmp_path_factory.mktemp("gemma")
  specials = ["<pad>", "<eos>", "<bos>", "<unk>", *TURNS]
  letters = sorted(set("helo wrd123\n▁é".replace(" ", "")))
  vocab = [
    *specials,
    *(f"<0x{b:02X}>" for b in range(256)),
    *letters,
    *_WORDS[:3],
    "lo",
    "▁w",
    "or",
    "ld",
    "orld",
    "▁world",
  ]
  merges = [
    ("h", "e"),
    ("▁", "he"),
    ("▁", "▁"),
    ("l", "o"),
    ("▁", "w"),
    ("o", "r"),
    ("l", "d"),
    ("or", "ld"),
    ("▁w", "orld"),
  ]
  backend = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocab={t: i for i, t in enumerate(dict.fromkeys(vocab))},
      merges=merges,
      unk_token="<unk>",
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "merged_with_previous")
  backend.decoder = tokenizers.decoders.Sequence(
    [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
  )
  backend.add_special_tokens(specials)
  backend.add_tokens(
    [tokenizers.AddedToken(text, special=False, normalized=False) for text in ("▁▁", "\n", "<0x41>")]
  )
  backend.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "bos_token": "<bos>"}))
  return folder


@pytest.fixture
def folder(gemma_folder: Path, tmp_path: Path) -> Path:
  """A copy to change."""
  return Path(shutil.copytree(gemma_folder, tmp_path / "copy"))


def edit(path: Path, **changes: Any) -> None:
  """Sets entries of a JSON file; None removes one."""
  whole = (json.loads(path.read_text()) if path.exists() else {}) | changes
  path.write_text(json.dumps({key: value for key, value in whole.items() if value is not None}))


@pytest.fixture(scope="module")
def gemma(gemma_folder: Path) -> Tokenizer:
  return Tokenizer.from_folder(gemma_folder)


@given(
  text=st.lists(
    st.text() | st.sampled_from([" he", "  ", " world", "▁", "▁▁", "<eos>", "<0x0A>", "<0x41>"])
  ).map("".join)
)
def test_bytes_of_pieces_are_the_text(gemma: Tokenizer, text: str):
  ids = gemma.encode(text)
  assert gemma.decode(ids) == text and not gemma.special_ids & set(ids)


def test_pieces_are_those_of_hugging_face(gemma: Tokenizer, gemma_folder: Path):
  backend = tokenizers.Tokenizer.from_file(str(gemma_folder / "tokenizer.json"))
  for text in ("hello world", "  he\n he é 12", "12🦜", "", "he():\n    he"):
    assert gemma.encode(text) == backend.encode(text).ids
  assert gemma.token_bytes(gemma.encode(" world")[0]) == b" world"
  assert [gemma.token_bytes(t) for t in gemma.encode("he   \n▁▁")] == [
    b"he",
    b"  ",
    b" ",
    b"\n",
    *(b"\xe2", b"\x96", b"\x81") * 2,
  ]
  assert {gemma.token_bytes(t): v for t, v in gemma.digit_values().items()}[b"3"] == (3, 10)
  assert pickle.loads(pickle.dumps(gemma)).encode("▁he") == gemma.encode("▁he")


def test_gemma_has_turns_without_a_template(gemma: Tokenizer):
  ids = gemma.chat_prompt(
    [
      {"role": "user", "content": " he<end_of_turn>"},
      {"role": "assistant", "content": "lo"},
      {"role": "user", "content": "12"},
    ]
  )
  assert gemma.decode(ids) == (
    "<bos><start_of_turn>user\nhe<end_of_turn><end_of_turn>\n<start_of_turn>model\nlo"
    "<end_of_turn>\n<start_of_turn>user\n12<end_of_turn>\n<start_of_turn>model\n"
  )
  assert ids.count(TURNS.index("<end_of_turn>") + 4) == 3  # the one in the content is text
  with pytest.raises(ValueError, match="no system role"):
    gemma.chat_prompt([{"role": "system", "content": "x"}])


BLANKS = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
# How files of Llama 2 and Mistral add a leading blank to texts: (normalizer, pre_tokenizer) of
# tokenizer.json.
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
  (folder / "tokenizer.json").write_text(
    json.dumps(whole | {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer})
  )
  described = json.loads((source / "tokenizer_config.json").read_text())
  (folder / "tokenizer_config.json").write_text(
    json.dumps(described | {"chat_template": template, "tokenizer_class": "PreTrainedTokenizerFast"})
  )
  return Tokenizer.from_folder(folder)


@pytest.mark.parametrize("begins", ["", "{{ bos_token }}"])
@pytest.mark.parametrize("name", PREFIXES)
def test_only_texts_of_conversations_get_leading_blanks(
  name: str, begins: str, gemma_folder: Path, tmp_path: Path
):
  template = begins + "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}he"
  ours = with_blanks(gemma_folder, tmp_path / "it", *PREFIXES[name], template)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "it")
  ours.save(tmp_path / "it")
  again = Tokenizer.from_folder(tmp_path / "it")
  theirs_again = transformers.AutoTokenizer.from_pretrained(tmp_path / "it")
  for first, second in (("he world", " he"), ("", "world\n"), ("  he", "1")):
    messages = [{"role": "user", "content": first}, {"role": "assistant", "content": second}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.chat_prompt(messages) == again.chat_prompt(messages) == expected
    assert (
      theirs_again.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == expected
    )
    for text in (first, second, first + "▁" + second):
      assert ours.decode(ours.encode(text)) == text and ours.encode(text) == again.encode(text)


def test_pieces_that_change_a_text_are_refused(gemma_folder: Path, tmp_path: Path):
  lower = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, BLANKS]}
  with pytest.raises(WeightsError, match="tokenizer.json: its normaliser changes more than blanks"):
    with_blanks(gemma_folder, tmp_path / "it", lower, None, "")


# --- tokens without an embedding, and other files of a folder ---


def with_image_tokens(folder: Path) -> int:
  """Adds two tokens for images, as in Gemma 3; returns the number of tokens before."""
  path = folder / "tokenizer.json"
  whole = json.loads(path.read_text())
  rows = max(whole["model"]["vocab"].values()) + 1
  entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
  more = [
    {"id": rows, "content": "<image_soft_token>", **entry},
    {"id": rows + 1, "content": "<image>", **entry},
  ]
  whole["model"]["vocab"]["<image_soft_token>"] = rows  # some files list added tokens among the entries, too
  edit(path, added_tokens=[*whole["added_tokens"], *more], model=whole["model"])
  return rows


def test_tokens_that_have_no_embedding_are_left_out(folder: Path, tmp_path: Path, gemma: Tokenizer):
  rows = with_image_tokens(folder)
  assert (
    Tokenizer.from_folder(folder).vocab_size == Tokenizer.from_folder(folder, rows + 2).vocab_size == rows + 2
  )
  ours = Tokenizer.from_folder(folder, rows)
  assert ours.vocab_size == gemma.vocab_size == rows and ours.special_ids == gemma.special_ids
  text = "he<image> world<image_soft_token>"
  assert ours.encode(text) == gemma.encode(text) and ours.decode(ours.encode(text)) == text
  ours.save(tmp_path)
  assert len(transformers.AutoTokenizer.from_pretrained(tmp_path)) == rows


@pytest.mark.parametrize("change", ["entries", "eos_token", "bos_token"])
def test_tokens_that_texts_need_must_have_an_embedding(folder: Path, change: str):
  rows = with_image_tokens(folder)
  if change != "entries":
    edit(folder / "tokenizer_config.json", **{change: "<image>"})
  with pytest.raises(WeightsError, match=f"tokenizer.json: {rows + 2} tokens, but only") as caught:
    Tokenizer.from_folder(folder, rows - (change == "entries"))
  assert "\n" not in str(caught.value)


def test_names_of_tokens_may_be_in_the_map(folder: Path, gemma: Tokenizer):
  """It takes precedence over a config that does not describe its tokens, as in transformers."""
  (folder / "tokenizer_config.json").unlink()
  edit(
    folder / "special_tokens_map.json",
    eos_token={"content": "<end_of_turn>", "lstrip": False},
    bos_token="<bos>",
    pad_token="<pad>",
  )
  ours = Tokenizer.from_folder(folder)
  assert (ours.decode([ours.eos_id]), ours.bos_id, ours.end_ids) == (
    "<end_of_turn>",
    gemma.bos_id,
    (ours.eos_id,),
  )
  for described in (None, {}):
    edit(
      folder / "tokenizer_config.json",
      eos_token="<eos>",
      tokenizer_class="PreTrainedTokenizerFast",
      added_tokens_decoder=described,
      chat_template="{{ eos_token }}",
    )
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids = Tokenizer.from_folder(folder).chat_prompt([{"role": "user", "content": ""}])
    assert ids == [theirs.eos_token_id] and theirs.eos_token == (
      "<end_of_turn>" if described is None else "<eos>"
    )


def test_what_ends_a_text_is_a_control_token(folder: Path):
  """Even if tokenizer.json has it as an ordinary entry: transformers does the same."""
  whole = json.loads((folder / "tokenizer.json").read_text())
  edit(folder / "tokenizer.json", added_tokens=[e for e in whole["added_tokens"] if e["content"] != "<eos>"])
  ours = Tokenizer.from_folder(folder)
  assert whole["model"]["vocab"]["<eos>"] == 1 and 1 in ours.special_ids and 1 not in ours.encode("<eos>")
  assert 1 in transformers.PreTrainedTokenizerFast.from_pretrained(folder).all_special_ids


# --- the end of a turn ---

TURN = "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
# Template -> the token that ends a turn if the config names <eos>.
ENDS = {
  TURN: "<end_of_turn>",
  TURN + "{{ raise_exception('never') }}": "<eos>",  # a template that fails
  "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}": "<eos>",
  "<start_of_turn>{% for m in messages %}{{ m.content }}{{ eos_token }}<end_of_turn>{% endfor %}": "<eos>",
  "{% for m in messages if m.role == 'user' %}{{ m.content }}<end_of_turn>{% endfor %}": "<eos>",
  "": "<end_of_turn>",  # Gemma's base models
}


@pytest.mark.parametrize("template", ENDS)
def test_the_template_determines_what_ends_a_turn(folder: Path, template: str, gemma: Tokenizer):
  edit(folder / "tokenizer_config.json", chat_template=template)
  edit(folder / "generation_config.json", eos_token_id=[1, 3, 5, 10**6])
  ours = Tokenizer.from_folder(folder)
  assert ours.token_bytes(ours.eos_id).decode() == ENDS[template]
  assert ours.end_ids == (1, 3, 5)
  edit(folder / "generation_config.json", eos_token_id=1)
  assert Tokenizer.from_folder(folder).end_ids == tuple(sorted({1, ours.eos_id}))


def test_ends_and_names_are_written(folder: Path, tmp_path: Path):
  edit(
    folder / "tokenizer_config.json",
    pad_token="<pad>",
    unk_token="<unk>",
    mask_token="<nowhere>",
    chat_template=TURN,
  )
  edit(folder / "generation_config.json", eos_token_id=[1, 5, 3])
  ours = Tokenizer.from_folder(folder)
  ours.save(tmp_path)
  assert json.loads((tmp_path / "generation_config.json").read_text()) == dict(
    eos_token_id=[1, 3, 5], bos_token_id=2, pad_token_id=0
  )
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert theirs.special_tokens_map == dict(
    eos_token="<end_of_turn>", bos_token="<bos>", pad_token="<pad>", unk_token="<unk>"
  )
  assert len(theirs) == ours.vocab_size
  assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == [1, 3, 5]
  again = Tokenizer.from_folder(tmp_path)
  assert (
    (again.eos_id, again.end_ids, again.bos_id)
    == (ours.eos_id, ours.end_ids, ours.bos_id)
    == (5, (1, 3, 5), 2)
  )


def test_one_end_is_written_as_a_number(folder: Path, tmp_path: Path):
  edit(
    folder / "tokenizer_config.json",
    chat_template="{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
  )
  Tokenizer.from_folder(folder).save(tmp_path)
  assert json.loads((tmp_path / "generation_config.json").read_text()) == dict(eos_token_id=1, bos_token_id=2)


def test_a_template_that_writes_the_end_of_texts_writes_the_same_again(folder: Path, tmp_path: Path):
  edit(folder / "tokenizer_config.json", chat_template=TURN + "{{ eos_token }}")
  ours = Tokenizer.from_folder(folder)
  ours.save(tmp_path)
  messages = [{"role": "user", "content": "he"}]
  assert ours.eos_id == 5 and ours.chat_prompt(messages)[-1] == 1
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for ids in (
    Tokenizer.from_folder(tmp_path).chat_prompt(messages),
    theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False),
  ):
    assert ids == ours.chat_prompt(messages)


def test_ends_of_the_default_model(smollm2_checkpoint, tmp_path: Path):
  ours = smollm2_checkpoint.tokenizer
  assert (ours.eos_id, ours.end_ids) == (2, (2,))
  ours.save(tmp_path)
  again = Tokenizer.from_folder(tmp_path)
  assert (again.eos_id, again.end_ids, again.bos_id) == (2, (2,), 1)


@pytest.mark.skipif(not (cache_folder() / RELEASES["gemma3-270m"].gguf).exists(), reason="not in the cache")
def test_ends_of_gemmas_released_file():
  ours = load_checkpoint("gemma3-270m", progress=False).tokenizer
  assert (ours.decode([ours.eos_id]), ours.eos_id, ours.end_ids) == ("<end_of_turn>", 106, (1, 106))
  text = "def f():\n    ab   <s>x</s>" + " " * 40
  assert ours.decode(ours.encode(text)) == text


# --- SentencePiece's files ---

LINES = [line for row in read_jsonl(SEED_DATA)[:60] for line in row["response"].splitlines() if line.strip()]
SPOKEN = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


def write_pieces(folder: Path, **settings: Any) -> sentencepiece.SentencePieceProcessor:
  """A tokenizer.model like Llama 2's, but for `settings`."""
  folder.mkdir(exist_ok=True)
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(LINES),
    model_writer=model,
    **dict(
      model_type="bpe",
      vocab_size=600,
      byte_fallback=True,
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
      split_digits=True,
      character_coverage=0.99,
      minloglevel=2,
    )
    | settings,
  )
  (folder / "tokenizer.model").write_bytes(model.getvalue())
  edit(
    folder / "tokenizer_config.json",
    eos_token="</s>",
    bos_token="<s>",
    unk_token="<unk>",
    chat_template=SPOKEN,
    tokenizer_class="PreTrainedTokenizerFast",
  )
  return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


# (settings of the model, entries of tokenizer_config.json, whether SentencePiece itself is to cut texts
# alike)
WHOLE = ["▁▁", "▁▁▁", "<b>"]
PIECE_FILES = {
  "a blank before each text": ({}, {}, True),
  "a blank before the first text": ({}, {"legacy": False}, False),
  "no blank": (dict(add_dummy_prefix=False), {}, True),
  "a blank, runs of blanks": (dict(user_defined_symbols=WHOLE), {"legacy": True}, True),
  "no blank, runs of blanks": (dict(user_defined_symbols=WHOLE, add_dummy_prefix=False), {}, True),
}
TEXTS = st.lists(
  st.text() | st.sampled_from(["<b>", " ", "  ", "\n", "12", "<s>", "</s>", "the ", "ing", "▁", *LINES[:20]])
).map("".join)


@pytest.mark.parametrize("name", PIECE_FILES)
def test_pieces_are_those_of_transformers_and_of_sentencepiece(name: str, tmp_path: Path):
  settings, described, alike = PIECE_FILES[name]
  original = write_pieces(tmp_path / "it", **settings)
  edit(tmp_path / "it" / "tokenizer_config.json", **described)
  ours, theirs = (
    Tokenizer.from_folder(tmp_path / "it"),
    transformers.AutoTokenizer.from_pretrained(tmp_path / "it"),
  )
  (tmp_path / "json").mkdir()
  ours.save(tmp_path / "json")
  again, whole = (
    Tokenizer.from_folder(tmp_path / "json"),
    transformers.AutoTokenizer.from_pretrained(tmp_path / "json"),
  )
  assert not (tmp_path / "json" / "tokenizer.model").exists()
  assert ours.special_ids == {0, 1, 2} and (ours.eos_id, ours.bos_id) == (2, 1)
  assert whole("the")["input_ids"][0] == again.bos_id  # by default, files of pieces add a BOS token

  @given(first=TEXTS, second=TEXTS)
  def same(first: str, second: str):
    assert ours.decode(ours.encode(first)) == first and not ours.special_ids & set(ours.encode(first))
    assert again.encode(first) == ours.encode(first)
    if not any(
      text in first + second for text in ("▁", "<s>", "</s>", "<unk>")
    ):  # which are texts here, not tokens
      messages = [{"role": "user", "content": first}, {"role": "assistant", "content": second}]
      ids = ours.chat_prompt(messages)
      assert ids == again.chat_prompt(messages)
      assert ids == theirs.apply_chat_template(messages, return_dict=False)
      if not (
        ours._prefix and settings
      ):  # tokenizer.json cannot say both: there, what is to stay whole ends a text
        assert ids == whole.apply_chat_template(messages, return_dict=False)
      if alike:
        assert ids == [*original.encode(first), 2, *original.encode(second), 2]

  same()


@pytest.mark.parametrize("described", [dict(legacy=True), dict(legacy=False), dict(add_prefix_space=False)])
def test_pieces_are_those_of_transformers_own_llama(described: dict, tmp_path: Path):
  """On texts without a leading blank: its newest release adds no second one."""
  write_pieces(tmp_path)
  edit(tmp_path / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", **described)
  ours, theirs = Tokenizer.from_folder(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert isinstance(theirs, transformers.LlamaTokenizer)
  for first, second in zip(LINES[:40], LINES[40:]):
    messages = [{"role": "user", "content": first.strip()}, {"role": "assistant", "content": second.strip()}]
    assert ours.chat_prompt(messages) == theirs.apply_chat_template(messages, return_dict=False)


@pytest.mark.parametrize("form", ["added_tokens_decoder", "added_tokens.json"])
def test_tokens_that_other_files_add_to_pieces(form: str, tmp_path: Path):
  write_pieces(tmp_path, control_symbols=["<sep>"], user_defined_symbols=["<pad0>", "<start_of_turn>"])
  entry = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
  if form == "added_tokens.json":
    edit(tmp_path / form, **{"<|end|>": 600, "<tool>": 601, "<image>": 604})
  else:
    added = {
      "3": ("<sep>", False),
      "4": ("<pad>", True),
      "600": ("<|end|>", True),
      "601": ("<tool>", False),
      "604": ("<image>", True),
    }
    edit(
      tmp_path / "tokenizer_config.json",
      added_tokens_decoder={
        i: {"content": text, "special": special, **entry} for i, (text, special) in added.items()
      },
    )
  edit(
    tmp_path / "tokenizer_config.json",
    pad_token="<|end|>",
    chat_template=TURN.replace("<end_of_turn>", "<|end|>"),
  )
  ours = Tokenizer.from_folder(tmp_path)
  assert ours.vocab_size == 605 and {3, 5, 600} <= ours.special_ids and not {601, 602} & ours.special_ids
  assert ours.encode("<tool>") == [601] and not set(ours.encode("<|end|>")) & {600}
  assert (ours.eos_id, ours.end_ids) == (600, (2, 600))
  assert (ours.token_bytes(4) == b"<pad>") == (4 in ours.special_ids) == (form == "added_tokens_decoder")
  fewer = Tokenizer.from_folder(tmp_path, 602)
  assert fewer.vocab_size == 602 and fewer.encode("<tool>") == [601]
  for rows in (601, 600):  # the end of a turn has an embedding, then it has none
    assert Tokenizer.from_folder(tmp_path, rows).eos_id == (600 if rows > 600 else 2)
  with pytest.raises(WeightsError, match="tokenizer.model: 600 tokens, but only 599 embeddings"):
    Tokenizer.from_folder(tmp_path, 599)
  edit(tmp_path / "tokenizer_config.json", eos_token="<|end|>")
  with pytest.raises(WeightsError, match="tokenizer.model: 605 tokens, but only 600 embeddings"):
    Tokenizer.from_folder(tmp_path, 600)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(model_type="unigram"), "tokenizer.model: not a BPE tokenizer"),
    (dict(byte_fallback=False), "tokenizer.model: not a BPE tokenizer"),
    (dict(normalization_rule_name="nmt_nfkc"), "tokenizer.model: its normaliser changes more than blanks"),
    (dict(remove_extra_whitespaces=True), "tokenizer.model: its normaliser changes more than blanks"),
  ],
)
def test_other_kinds_of_pieces_are_refused(settings: dict, message: str, tmp_path: Path):
  write_pieces(tmp_path, **settings)
  with pytest.raises(WeightsError, match=message) as caught:
    Tokenizer.from_folder(tmp_path)
  assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


# --- damaged files ---

TOKENS, CONFIG = "tokenizer.json", "tokenizer_config.json"


def without_tokenizer(folder: Path) -> None:
  (folder / TOKENS).unlink()


def of_other_bytes(folder: Path) -> None:
  without_tokenizer(folder)
  (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # as Llama 3's file of this name


DAMAGES: dict[str, Callable[[Path], None]] = {
  "tokenizer_config.json: chat_template is neither": lambda f: edit(f / CONFIG, chat_template=["{{ x }}"]),
  "tokenizer_config.json: chat_template is neither a": lambda f: edit(
    f / CONFIG, chat_template={"default": "x"}
  ),
  "tokenizer_config.json: chat_template is neither a text": lambda f: edit(
    f / CONFIG, chat_template=[{"name": "default", "template": 3}]
  ),
  "tokenizer_config.json: eos_token 3 is not the text": lambda f: edit(f / CONFIG, eos_token=3),
  "tokenizer_config.json: bos_token \\[1\\] is not the text": lambda f: edit(f / CONFIG, bos_token=[1]),
  "tokenizer_config.json: eos_token None is not a token": lambda f: edit(f / CONFIG, eos_token=None),
  "tokenizer.json: damaged": lambda f: edit(f / TOKENS, model=[1]),
  "tokenizer.json: damaged .*": lambda f: edit(f / TOKENS, added_tokens=[3]),
  "tokenizer.json: damaged \\(": lambda f: edit(f / TOKENS, added_tokens={"<eos>": 1}),
  "tokenizer.json: damaged \\(T": lambda f: edit(f / TOKENS, added_tokens=[{"id": "3", "content": "x"}]),
  "tokenizer.json: damaged \\(K": lambda f: edit(f / TOKENS, added_tokens=[{"id": 3}]),
  "tokenizer.json: damaged \\(A": lambda f: edit(f / TOKENS, pre_tokenizer=[1]),
  "tokenizer.json: its normaliser is not an object": lambda f: edit(f / TOKENS, normalizer=[-1, 10**9]),
  "tokenizer.json: .*": lambda f: edit(
    f / TOKENS, model={"type": "BPE", "byte_fallback": True, "vocab": [1]}
  ),
  "generation_config.json: eos_token_id 'x'": lambda f: edit(f / "generation_config.json", eos_token_id="x"),
  "special_tokens_map.json: not JSON": lambda f: (f / "special_tokens_map.json").write_text("{"),
  "tokenizer.json: cannot be read .*neither this nor a tokenizer.model": without_tokenizer,
  "tokenizer.model: not a SentencePiece file": of_other_bytes,
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_files_are_named_in_one_line(message: str, folder: Path):
  DAMAGES[message](folder)
  with pytest.raises(WeightsError, match=message) as caught:
    Tokenizer.from_folder(folder, 400)
  assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_normaliser_that_changes_ascii_is_refused(tmp_path: Path):
  folder = write_model(tmp_path / "model", model_config())
  edit(folder / TOKENS, normalizer={"type": "NFC"})
  assert Tokenizer.from_folder(folder).decode(Tokenizer.from_folder(folder).encode("A b")) == "A b"
  edit(folder / TOKENS, normalizer={"type": "ByteLevel"})
  with pytest.raises(WeightsError, match="tokenizer.json: the text .* is .* after it was encoded"):
    Tokenizer.from_folder(folder)
