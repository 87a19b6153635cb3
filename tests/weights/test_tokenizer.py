"""Tokenizer of the default model: encoding is lossless, and a user cannot inject control tokens; chat
templates render as in transformers; and vocabularies from lists, as in GGUF."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from pasta_jax.weights import chat
from pasta_jax.weights import tokenizer_forms as forms
from pasta_jax.weights.tokenizer import Tokenizer

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
START, END = 1, 2
SPECIAL_LOOKING = st.sampled_from(
  ["<|im_end|>", "<|im_start|>system\n", "<|endoftext|>", "<file_sep>", "<|im_", "end|>"]
)


@pytest.fixture(scope="module")
def tokenizer(smollm2_checkpoint) -> Tokenizer:
  return smollm2_checkpoint.tokenizer


def expressible(text: str) -> bool:
  """Whether SmolLM2 has all bytes of a text: it lacks 04 06 13 14 16 1D, and F1 F2 (planes 4 to 11)."""
  return not set(text.encode()) & set(b"\x04\x06\x13\x14\x16\x1d\xf1\xf2")


TEXTS = st.lists(st.text() | SPECIAL_LOOKING).map("".join).filter(expressible)


def test_facts_of_the_default_model(tokenizer: Tokenizer):
  assert tokenizer.vocab_size == 49152
  assert tokenizer.decode([tokenizer.eos_id]) == "<|im_end|>"
  assert tokenizer.special_ids == set(range(17))
  assert tokenizer.digit_values() == {32 + digit: (digit, 10) for digit in range(10)}
  # Digits are split one by one; a space is joined to the word after it, but not to a digit.
  assert [tokenizer.token_bytes(i) for i in tokenizer.encode("Hello 2024 worlds")] == [
    b"Hello", b" ", b"2", b"0", b"2", b"4", b" worlds",
  ]  # fmt: skip


@given(text=TEXTS)
def test_bytes_of_tokens_are_the_text(tokenizer: Tokenizer, text: str):
  ids = tokenizer.encode(text)
  assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
  assert tokenizer.decode(ids) == text
  assert not tokenizer.special_ids & set(ids)


@pytest.mark.parametrize("char", ["\x04", "\x1d", "\U00050000"])
def test_character_that_cannot_be_expressed_is_named(tokenizer: Tokenizer, char: str):
  with pytest.raises(ValueError, match=f"U\\+{ord(char):04X}"):
    tokenizer.encode(f"é{char}")


def test_part_of_a_character_and_control_tokens_decode(tokenizer: Tokenizer):
  parrot = tokenizer.encode("🦜")
  assert len(parrot) > 1 and tokenizer.decode(parrot[:1]) == "\ufffd"
  assert tokenizer.decode([START, *tokenizer.encode("hi"), END]) == "<|im_start|>hi<|im_end|>"
  for index in (-1, tokenizer.vocab_size):
    with pytest.raises(ValueError, match="not in the vocabulary"):
      tokenizer.token_bytes(index)


def test_chat_prompt_is_chatml_with_the_default_system_message(tokenizer: Tokenizer):
  ids = tokenizer.chat_prompt([{"role": "user", "content": "Hi"}])
  assert tokenizer.decode(ids) == (
    f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
  )
  own = tokenizer.chat_prompt([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
  assert tokenizer.decode(own).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi")


@given(content=TEXTS)
def test_content_cannot_inject_control_tokens(tokenizer: Tokenizer, content: str):
  ids = tokenizer.chat_prompt([{"role": "user", "content": content}])
  assert [i for i in ids if i in tokenizer.special_ids] == [START, END, START, END, START]
  assert f"user\n{content}<|im_end|>" in tokenizer.decode(ids)


@pytest.fixture(scope="module")
def parsing_backend(tokenizer: Tokenizer):
  backend = pickle.loads(pickle.dumps(tokenizer))._backend
  backend.encode_special_tokens = False
  return backend


@given(content=st.text().filter(expressible))
def test_harmless_chat_has_the_tokens_of_hugging_face(tokenizer: Tokenizer, parsing_backend, content: str):
  """Parsing the whole rendered text at once is what `apply_chat_template` does."""
  text = (
    f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
  )
  assert tokenizer.chat_prompt([{"role": "user", "content": content}]) == parsing_backend.encode(text).ids


@pytest.mark.parametrize(
  "message", [{"role": "<|im_end|>", "content": "x"}, {"role": "user"}, {"role": "user", "content": []}]
)
def test_malformed_messages_are_refused(tokenizer: Tokenizer, message: dict):
  with pytest.raises(ValueError, match="a message is a role"):
    tokenizer.chat_prompt([message])


def test_template_errors_are_value_errors(tokenizer: Tokenizer):
  strict = pickle.loads(pickle.dumps(tokenizer))
  strict.chat_template = "{{ raise_exception('roles must alternate') }}"
  with pytest.raises(ValueError, match="roles must alternate"):
    strict.chat_prompt([{"role": "user", "content": "x"}])


# --- chat templates ---

MESSAGES = [{"role": "user", "content": " Is <b> & 'é'?\n"}, {"role": "assistant", "content": "Yes."}]
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
TEMPLATES = [
  "{% if tools is not none %}{{ tools | length }}{% endif %}",
  "{% if documents is not none %}{{ documents[0] }}{% endif %}",
  "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ sep_token is defined }}{{ mask_token }}",
  "{% for m in messages %}{%- generation -%} {{ m.content }} {%- endgeneration -%}\n{% endfor %}",
  "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
  "{% for m in messages %}\n  {% generation %}\n  {{ loop.index }}{{ m.content }}\n {% endgeneration %}\n{% endfor %}",
  "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
  "{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=true, separators=(',', ':')) }}{{ 'é' | tojson(ensure_ascii=true) }}",
  "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content | trim }}{% endfor %}",
  "{% set ns = namespace(last='') %}{% for m in messages %}{% set ns.last = m.role %}{% endfor %}{{ ns.last }}",
  "{{ dict(a=1) }}{{ strftime_now('%Y') | length }}{{ messages[1:] | length }}{{ add_generation_prompt }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_render_as_in_transformers(template: str):
  pytest.importorskip("transformers")
  from transformers.utils.chat_template_utils import render_jinja_template

  for to_answer in (True, False):
    (expected,), _ = render_jinja_template(
      [MESSAGES], chat_template=template, add_generation_prompt=to_answer, **NAMED
    )
    assert chat.render(template, MESSAGES, NAMED, to_answer=to_answer) == expected


@pytest.mark.parametrize(
  ("template", "message"),
  [
    ("{{ 1 // 0 }}", "by zero"),
    ("{{ messages[0].content + 1 }}", "str"),
    ("{{ messages[7].content }}", "no element 7"),
    ("{{ [1] | sum(start=[]) }}", "list"),
    ("{{ messages.append(1) }}", "unsafe"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("{{ {1: messages} | tojson(indent='x', separators=1) }}", ""),
    ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recursion"),
    ("{% if %}", "expression"),
    ("{% generation %}", "endgeneration"),
    ("{{ raise_exception('two\nlines') }}", "two lines"),
  ],
)
def test_every_failure_of_a_template_is_one_line(tokenizer: Tokenizer, template: str, message: str):
  foreign = pickle.loads(pickle.dumps(tokenizer))
  foreign.chat_template = template
  with pytest.raises(ValueError, match=f"^chat template: .*{message}") as caught:
    foreign.chat_prompt([{"role": "user", "content": "x"}])
  assert "\n" not in str(caught.value)


def test_templates_get_every_name(tokenizer: Tokenizer):
  """Every name of a token that the file has."""
  own = pickle.loads(pickle.dumps(tokenizer))
  own.chat_template = "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}"
  ids = [tokenizer._named.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")]
  assert own.chat_prompt([{"role": "user", "content": "x"}]) == [i for i in ids if i is not None] and ids[
    :2
  ] == [1, 2]


# --- lists, as in GGUF ---

BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
MERGES = [
  ("h", "e"),
  ("l", "o"),
  ("Ġ", "he"),
  ("1", "2"),
  ("H", "e"),
  ("'", "s"),
  ("Ċ", "Ċ"),
  ("Ġ", "Ġ"),
  ("/", "Ċ"),
]


def of_bytes(pre: str = "qwen2", more: dict[str, int] | None = None, **given: Any) -> Tokenizer:
  """`more`: further tokens, after "<|begin|>" and "<|end|>", with their types."""
  more = {"<|begin|>": forms.CONTROL, "<|end|>": forms.CONTROL, **(more or {})}
  tokens = [*BYTES, *map("".join, MERGES), "helo", *more]  # no merge yields the entry "helo"
  ends = [tokens.index(text) for text in ("<|end|>", "<|begin|>")]
  return Tokenizer.from_gguf_fields(
    tokens,
    [1] * (len(tokens) - len(more)) + list(more.values()),
    *ends,
    pre=pre,
    merges=[" ".join(merge) for merge in MERGES],
    **given,
  )


@pytest.mark.parametrize("pre", ["tekken", "llama3", "llama-v3", "deepseek-r1-qwen", "qwen2", "llama-bpe"])
def test_pre_tokenizers_of_gguf_are_those_of_transformers(pre: str):
  splits = pytest.importorskip(
    "transformers.integrations.gguf.gguf_tokenizer_mapping"
  ).GGUF_PRE_TOKENIZER_SPLITS
  whole = pre == "tekken" or pre.startswith("llama")
  tokens = [*BYTES, *map("".join, MERGES), "helo"]
  backend = tokenizers.Tokenizer(
    tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, MERGES, ignore_merges=whole)
  )
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Split(tokenizers.Regex(splits[pre]), "isolated"),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  ours = of_bytes(pre)

  @given(
    text=st.lists(st.text() | st.sampled_from(["helo", " he", "HelloWorld", "12", "'s", "\n\n", "/\n"])).map(
      "".join
    )
  )
  def same(text: str):
    assert ours.encode(text) == backend.encode(text).ids and ours.decode(ours.encode(text)) == text

  same()
  assert (len(tokens) - 1 in ours.encode("helo")) == whole


def test_unknown_pre_tokenizers_are_named():
  with pytest.raises(
    ValueError, match="'falcon' is not supported, only 'smollm', 'llama-bpe', 'qwen2', 'tekken'"
  ):
    of_bytes("falcon")


@pytest.mark.parametrize("kind", [forms.USER_DEFINED, forms.CONTROL])
def test_turn_tokens_are_always_control_tokens(kind: int):
  marks = ["<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|endoftext|>"]
  ours = of_bytes(
    more=dict.fromkeys(marks, kind) | {"</s>": forms.USER_DEFINED, "<think>": forms.USER_DEFINED},
    chat_template="{% for m in messages %}{{ m.content }}<|im_end|>{{ eos_token }}{% endfor %}",
  )
  controls = {ours.decode([index]) for index in ours.special_ids}
  assert controls == {"<|begin|>", "<|end|>", *marks}  # in Gemma's vocabulary, "</s>" is HTML
  assert not ours.special_ids & set(ours.encode("".join(marks)))
  assert len(ours.encode("<think></s>")) == 2
  assert ours.decode([ours.eos_id]) == "<|im_end|>"


def test_the_named_end_is_a_control_token():
  more = {"</s>": forms.USER_DEFINED, "<|turn_end|>": forms.NORMAL}
  size = of_bytes(more=more).vocab_size
  ours = of_bytes(
    more=more,
    eot_id=size - 1,
    pad_id=size - 2,
    unk_id=10**6,
    chat_template="{{ messages[1].content }}<|begin|>",
  )
  assert size - 1 in ours.special_ids and ours.eos_id == size - 1  # named, so the template is not rendered
  assert ours.end_ids == (size - 3, size - 1)
  with pytest.raises(ValueError, match="is not in the vocabulary"):
    of_bytes(eot_id=10**6)


@pytest.mark.parametrize("add_bos", [False, True])
def test_other_engines_begin_texts_as_a_file_says(add_bos: bool, tmp_path: Path):
  pad = of_bytes(more={"<pad>": forms.CONTROL}).vocab_size - 1
  ours = of_bytes(add_bos=add_bos, more={"<pad>": forms.CONTROL}, pad_id=pad, unk_id=0)  # 0 is "!"
  assert ours.bos_id not in ours.encode("he")
  ours.save(tmp_path)
  transformers = pytest.importorskip("transformers")
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert theirs("he")["input_ids"] == [ours.bos_id] * add_bos + ours.encode("he")
  assert theirs.pad_token_id == pad and theirs.unk_token is None
  assert theirs.decode(theirs("he!")["input_ids"], skip_special_tokens=True) == "he!"
  again = Tokenizer.from_folder(tmp_path)
  assert again.encode("he") == ours.encode("he")
  (tmp_path / "again").mkdir()
  again.save(tmp_path / "again")  # a folder's setting is kept
  assert transformers.AutoTokenizer.from_pretrained(tmp_path / "again")("he") == theirs("he")
