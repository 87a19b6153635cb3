"""Added tokens that take blanks, or want to be whole words: conversations are those of transformers, and no
text loses a character."""

import json
import random
from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

from pasta_jax.weights.tokenizer import Tokenizer

SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
ORDINARY = ["tool", "<t>", "\n\n", "  "]
PIECES = [
  "a",
  " ",
  "  ",
  "\n",
  "\n\n",
  "\t",
  "_",
  "é",
  "\u3000",
  "\x1c",
  "²",
  "\u0301",
  *ORDINARY,
  "x<t>y",
  " tool ",
  ".",
  "中",
]
TEMPLATES = [
  "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
  "{% for m in messages %} <|{{ m.role }}|> {{ m.content }} <|end|> {{ eos_token }} {% endfor %}<|assistant|>",
  "{% for m in messages %}w<|{{ m.role }}|>w{{ m.content|trim }}<|end|>{{ m.content }}{% endfor %}",
]


def write(folder: Path, rng: random.Random, **everywhere: bool) -> Path:
  """A folder with a tokenizer of bytes, and added tokens with random flags, or those of `everywhere`."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  for text in SPECIAL + rng.sample(ORDINARY, 2 if everywhere else rng.randrange(5)):
    flags = {name: rng.random() < 0.4 for name in ("lstrip", "rstrip", "single_word", "normalized")}
    if text.isspace():
      flags["lstrip"] = False  # which the library may panic on
    token = tokenizers.AddedToken(text, special=text in SPECIAL, **(everywhere or flags))
    backend.add_tokens([token])
  backend.save(str(folder / "tokenizer.json"))
  names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
  (folder / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": rng.choice(TEMPLATES)}))
  return folder


def same(folder: Path, rng: random.Random, times: int) -> Tokenizer:
  """Compares random conversations."""
  ours, theirs = Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)
  for _ in range(times):
    texts = ["".join(rng.choices(PIECES, k=rng.randrange(8))) for _ in range(3)]
    messages = [{"role": r, "content": t} for r, t in zip(("user", "assistant", "user"), texts)]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.chat_prompt(messages) == expected, messages
    assert all(ours.decode(ours.encode(text)) == text for text in texts)
  return ours


@pytest.mark.parametrize("seed", range(12))
def test_conversations_are_those_of_transformers(seed: int, tmp_path: Path):
  rng = random.Random(seed)
  everywhere = [dict(lstrip=True, rstrip=False), dict(rstrip=True, lstrip=False), dict(single_word=True)]
  same(write(tmp_path, rng, **(everywhere[seed] if seed < 3 else {})), rng, 20)


def test_flags_of_the_config_come_first(tmp_path: Path):
  rng = random.Random(0)
  write(tmp_path, rng, lstrip=False)
  entry = {"content": "<|end|>", "special": True, "rstrip": True, "lstrip": True, "normalized": False}
  path = tmp_path / "tokenizer_config.json"
  index = str(256 + SPECIAL.index("<|end|>"))
  path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": {index: entry}}))
  same(tmp_path, rng, 20)


def test_flags_are_written(tmp_path: Path):
  rng = random.Random(1)
  (tmp_path / "again").mkdir()
  ours = same(write(tmp_path, rng, rstrip=True), rng, 5)
  ours.save(tmp_path / "again")
  same(tmp_path / "again", rng, 20)
  text = "  a tool \n\n <t> "
  assert Tokenizer.from_folder(tmp_path / "again").encode(text) == ours.encode(text)


def test_a_control_token_of_one_character_in_a_message(tmp_path: Path):
  backend = json.loads((write(tmp_path, random.Random(2), lstrip=False) / "tokenizer.json").read_text())
  backend["added_tokens"][4]["content"] = "中"
  (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
  (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}中{% endfor %}")
  ours = Tokenizer.from_folder(tmp_path)
  end = ours.encode("中")
  ids = ours.chat_prompt([{"role": "user", "content": "a中b"}])
  assert ids == [*ours.encode("a"), *end, *ours.encode("b"), 260] and 260 not in end
