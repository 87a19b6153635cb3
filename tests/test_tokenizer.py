"""Tokenizer of the default model: texts are exact, and control tokens cannot be written by a user."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pasta_jax.model.tokenizer import Tokenizer

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
  # Digits are split off one by one, and a space sticks to the word behind it, but not to a digit.
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
