"""Text to tokens and back, exactly, with control tokens kept out of the hands of whoever wrote the text.

Two kinds of BPE are supported: byte-level (Llama 3, SmolLM2, Qwen), and SentencePiece's with bytes to fall back on
(Gemma, Llama 2). In both each ordinary token is a run of bytes, so the bytes of a text's tokens, put together, are the
text. Llama 2 puts a blank before every text: here conversations have these blanks, and a text encoded by itself not.
"""

import datetime
import functools
import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import decoders, models

from pasta_jax.lang.syntax import TOKEN_TEXTS
from pasta_jax.model import tokenizer_forms as forms
from pasta_jax.model.weights import WeightsError, read_json, read_text

_ROLES = ("system", "user", "assistant", "tool")
# Gemma's base models have the turn marks of the tuned ones, but no template.
_GEMMA_TURNS = ("<start_of_turn>", "<end_of_turn>")
_GEMMA_TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}"
  "{% if m.role == 'system' %}{{ raise_exception('there is no system role') }}{% endif %}"
  "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
  "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


class Tokenizer:
  """A BPE vocabulary with its chat template.

  Attributes:
    vocab_size: number of ids, control tokens included. A model may have more (padded) embeddings.
    eos_id: the token that ends an assistant's turn.
    bos_id: the token that may begin a text, or None. `encode` never adds it; a chat template may.
    special_ids: the control tokens: `encode` never yields them.
    tag_ids: the entries that PASTA's tags take: their own, where weights were saved with them, else the first six that
      the vocabulary holds for others to use; () where it has none.
    knows_tags: whether they are the tags' own.
    chat_template: Jinja source, "" for a base model (but Gemma's, whose turn marks say enough).
  """

  def __init__(self, backend: tokenizers.Tokenizer, eos_id: int, bos_id: int | None, chat_template: str, *,
               pieces: bool = False, prefix: str = "", stored: Mapping[str, Any] | None = None):
    """Takes over `backend` and changes its settings. `pieces`: entries are SentencePiece's, not byte-level ones;
    `prefix`: where conversations get blanks (`tokenizer_forms.without_prefix`), and the parts of tokenizer.json that
    `save` writes so that others put them there too.

    ValueError if `eos_id` or `bos_id` is no token.
    """
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # in the words of `tokenizers`: treat them as ordinary text
    added = backend.get_added_tokens_decoder()
    vocab = backend.get_vocab(with_added_tokens=True)
    self._backend = backend
    texts = forms.texts_for_tags(vocab)
    self.tag_ids, self.knows_tags = tuple(vocab[text] for text in texts), texts == list(TOKEN_TEXTS)
    self._bytes = [b""] * (max(vocab.values(), default=-1) + 1)
    for token, index in vocab.items():
      self._bytes[index] = token.encode() if index in added else (_piece_bytes if pieces else _ordinary_bytes)(token)
    # A text may hold the very character that pieces write for a blank: it is spelled out in bytes.
    self._blank = [vocab.get(f"<0x{byte:02X}>", -1) for byte in forms.BLANK.encode()] if pieces else []
    if min(self._blank, default=0) < 0:
      raise ValueError("the vocabulary of pieces lacks tokens for single bytes")
    self._prefix, self._stored = prefix, dict(stored or {})
    self.vocab_size = len(self._bytes)
    self.special_ids = frozenset(index for index, token in added.items() if token.special)
    self.eos_id = eos_id
    self.bos_id = bos_id
    self.chat_template = chat_template or (_GEMMA_TEMPLATE if vocab.keys() >= set(_GEMMA_TURNS) else "")
    for named in (eos_id, bos_id):
      if named is not None and not 0 <= named < self.vocab_size:
        raise ValueError(f"the token that ends a turn or begins a text, {named}, is not in the vocabulary")

    self._controls = {added[index].content: index for index in self.special_ids}
    longest_first = sorted(self._controls, key=len, reverse=True)
    self._any_control = "|".join(map(re.escape, longest_first)) or "(?!)"
    single = {self._bytes[index] for index in range(self.vocab_size) if index not in self.special_ids}
    self._absent = bytes(byte for byte in range(256) if bytes([byte]) not in single)

  @classmethod
  def from_gguf_fields(
    cls,
    tokens: Sequence[str],
    token_types: Sequence[int],
    eos_id: int | None,
    bos_id: int | None = None,
    chat_template: str = "",
    *,
    prefix: bool = False,
    merges: Sequence[str] = (),
    pre: str = "",
    scores: Sequence[float] | None = None,
  ) -> "Tokenizer":
    """From GGUF metadata: of a "gpt2" tokenizer `merges`, pairs such as "h e", best first, and its pre-tokenizer;
    of SentencePiece's ("llama") the pieces' `scores`, and whether conversations have blanks before their texts.

    Raises:
      ValueError: an unknown pre-tokenizer, or lists that contradict each other.
    """
    cut = forms.byte_level(pre) if scores is None else None
    if scores is not None and len(scores) != len(tokens):
      raise ValueError(f"{len(tokens)} tokens, but {len(scores)} scores")
    if len(token_types) != len(tokens):
      raise ValueError(f"{len(tokens)} tokens, but {len(token_types)} token types")
    if eos_id is None:
      raise ValueError("no end-of-turn token is named")
    vocab = {token: index for index, token in enumerate(tokens)}
    try:
      if scores is None:
        bpe = models.BPE(vocab, [(left, right) for left, right in (merge.split(" ") for merge in merges)],
                         ignore_merges=pre in forms.WHOLE_WORDS)
      else:
        bpe = models.BPE(vocab, forms.merges_of_pieces(vocab, scores, token_types), byte_fallback=True, fuse_unk=True)
    except Exception as error:  # `tokenizers` raises bare Exception
      raise ValueError(f"unusable vocabulary: {error}") from error
    backend = tokenizers.Tokenizer(bpe)
    if cut is not None:
      backend.pre_tokenizer = cut
      backend.decoder = decoders.ByteLevel()
    else:
      backend.normalizer = forms.blanks()
      whole = [decoders.Replace(forms.BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
      backend.decoder = decoders.Sequence(whole)
    kinds = dict(zip(tokens, token_types)) | dict.fromkeys(forms.texts_for_tags(vocab), forms.CONTROL)
    for kind, special in ((forms.CONTROL, True), (forms.USER_DEFINED, False)):
      texts = [token for token, its_kind in kinds.items() if its_kind == kind]
      backend.add_tokens([tokenizers.AddedToken(text, special=special, normalized=False) for text in texts])
    return cls(backend, eos_id, bos_id, chat_template, pieces=scores is not None, prefix="every" if prefix else "",
               stored={"normalizer": forms.PREFIXED} if prefix else None)

  @classmethod
  def from_file(cls, tokenizer_json: Path, tokenizer_config: Path) -> "Tokenizer":
    """From Hugging Face's two files; a `chat_template.jinja` beside them takes precedence over the config's.

    If a byte-level `tokenizer.json` has a normaliser, texts are exact up to that normaliser only.

    Raises:
      WeightsError: a file is missing or damaged, of another kind, or names no end-of-turn token.
    """
    parts, config = read_json(tokenizer_json), read_json(tokenizer_config)
    model, prefix = parts.get("model") or {}, ""
    stored = {key: parts.get(key) for key in ("normalizer", "pre_tokenizer")}
    byte_level = [part for part in forms.components(parts.get("pre_tokenizer")) if part.get("type") == "ByteLevel"]
    pieces = bool(not byte_level and model.get("byte_fallback"))
    if model.get("type") != "BPE" or not (byte_level or pieces):
      raise WeightsError(f"{tokenizer_json}: not a BPE tokenizer of bytes, or of pieces with bytes to fall back on")
    if any(part.get("add_prefix_space") for part in byte_level):
      raise WeightsError(f"{tokenizer_json}: add_prefix_space changes the text, and is not supported")
    try:
      if pieces:
        parts, prefix = forms.without_prefix(parts)
      backend = tokenizers.Tokenizer.from_str(json.dumps(forms.with_special_tags(parts)))
    except Exception as error:  # `tokenizers` raises bare Exception
      raise WeightsError(f"{tokenizer_json}: {error}") from error

    eos, bos = (_token_text(config.get(key)) for key in ("eos_token", "bos_token"))
    eos_id = backend.token_to_id(eos) if eos else None
    if eos_id is None:
      raise WeightsError(f"{tokenizer_config}: eos_token {eos!r} is not a token of the vocabulary")
    beside = tokenizer_config.with_name("chat_template.jinja")
    template = read_text(beside) if beside.exists() else _default_template(config.get("chat_template"))
    try:
      return cls(backend, eos_id, backend.token_to_id(bos) if bos else None, template, pieces=pieces, prefix=prefix,
                 stored=stored)
    except ValueError as error:
      raise WeightsError(f"{tokenizer_json}: {error}") from error

  def save(self, folder: Path, tag_ids: Sequence[int] = ()) -> None:
    """Writes the two files that `from_file` and Hugging Face read into an existing folder; with the tags, if their
    ids are given, as entries of the vocabulary (`pasta_jax.lang.syntax.TOKEN_TEXTS`)."""
    parts = json.loads(self._backend.to_str()) | self._stored
    if tag_ids:
      forms.name_tags(parts, dict(zip(tag_ids, TOKEN_TEXTS)), self.vocab_size)
    (folder / "tokenizer.json").write_text(json.dumps(parts, indent=2, ensure_ascii=False) + "\n", "utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self._literal(self.eos_id)}
    config |= {"bos_token": self._literal(self.bos_id)} if self.bos_id is not None else {}
    config |= {"chat_template": self.chat_template} if self.chat_template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")

  def encode(self, text: str) -> list[int]:
    """Ordinary tokens of a text: no control token, whatever the text looks like, and none added around it.

    Raises:
      ValueError: the text has a character that this vocabulary cannot express (SmolLM2 lacks six control
        characters and the unassigned planes 4 to 11). Dropping it silently would change the text.
    """
    raw = text.encode()
    if raw.translate(None, self._absent) != raw:
      lost = next(char for char in text if set(char.encode()) & set(self._absent))
      raise ValueError(f"the vocabulary has no token for the character U+{ord(lost):04X}")
    if self._blank and forms.BLANK in text:
      first, *rest = (self._backend.encode(part, add_special_tokens=False).ids for part in text.split(forms.BLANK))
      return first + [token for part in rest for token in (*self._blank, *part)]
    return self._backend.encode(text, add_special_tokens=False).ids

  def token_bytes(self, index: int) -> bytes:
    """Bytes of one token; for a control token, its literal text. Raises ValueError outside the vocabulary.

    A token may end in the middle of a character: decode bytes, not tokens, when streaming.
    """
    if not 0 <= index < self.vocab_size:
      raise ValueError(f"token {index} is not in the vocabulary of {self.vocab_size}")
    return self._bytes[index]

  def decode(self, ids: Iterable[int]) -> str:
    """Text of tokens, control tokens as their literal text. Bytes that form no character become U+FFFD."""
    return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

  def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Tokens of a conversation up to where the assistant begins to write.

    The same tokens as Hugging Face's `apply_chat_template(..., add_generation_prompt=True)`, except
    that control tokens come from the template alone: their look-alikes in a content stay text.

    Args:
      messages: each with "role" (system, user, assistant or tool) and "content" (text); no other
        key reaches the template.

    Raises:
      ValueError: no chat template, a message of another form, or one that the template refuses.
    """
    ids: list[int] = []
    text, shield = self._render(messages)
    # Text between two control tokens is encoded in one piece, as Hugging Face does: where template and
    # content meet, characters of both may belong to one token.
    for i, piece in enumerate(re.split(f"({self._any_control})", text)):
      if piece in self._controls:
        ids.append(self._controls[piece])
      else:
        ids += self.encode(self._with_prefix(piece.replace(shield, ""), is_first=i == 0))
    return ids

  def _with_prefix(self, text: str, *, is_first: bool) -> str:
    """A text of a conversation with the blank that Hugging Face puts before it."""
    if not text or not self._prefix or self._prefix == "first" and not is_first:
      return text
    return text if self._prefix != "every" and text.startswith((" ", forms.BLANK)) else " " + text

  def digit_values(self) -> dict[int, tuple[int, int]]:
    """Token → (value, 10 ** number of digits) for ordinary tokens made of ASCII digits and nothing else.

    Reading digit tokens left to right: number = number * 10 ** digits + value.
    """
    return {
      index: (int(raw), 10 ** len(raw))
      for index, raw in enumerate(self._bytes)
      if raw.isdigit() and index not in self.special_ids
    }

  def _render(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, str]:
    """The conversation as text, and the mark that breaks up control tokens' look-alikes in contents.

    The mark goes behind the first character of each look-alike, overlapping ones too. Contents otherwise
    stay as they are, so a template may trim or search them. The mark cannot be guessed, hence not forged.
    """
    if not self.chat_template:
      raise ValueError("this tokenizer has no chat template")
    shield = f"\ue000{secrets.token_hex(16)}\ue000"
    shielded = []
    for message in messages:
      role, content = message.get("role"), message.get("content")
      if role not in _ROLES or not isinstance(content, str):
        given = f"{role!r} and {type(content).__name__}"
        raise ValueError(f"a message is a role ({', '.join(_ROLES)}) and a text as content, not {given}")
      content = re.sub(f"(?s)(?={self._any_control})(.)", lambda found: found[1] + shield, content)
      shielded.append({"role": role, "content": content})
    try:
      text = _compile(self.chat_template).render(
        messages=shielded,
        add_generation_prompt=True,
        eos_token=self._literal(self.eos_id),
        bos_token=self._literal(self.bos_id),
      )
    except (jinja2.TemplateError, TypeError) as error:
      raise ValueError(f"chat template: {error}") from error
    return text, shield

  def _literal(self, index: int | None) -> str:
    return "" if index is None else self.token_bytes(index).decode(errors="replace")


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
  """A chat template in the environment that Hugging Face gives it: templates come with weights, so they
  are foreign code and run in a sandbox. Cached here, because a compiled template cannot be pickled and a
  `Tokenizer` must be (data workers)."""

  def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

  def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)  # Jinja's own escapes HTML

  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
  )
  environment.filters["tojson"] = tojson
  environment.globals["raise_exception"] = raise_exception
  environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
  return environment.from_string(template)


@functools.cache
def _byte_of_character() -> dict[str, int]:
  """GPT-2's alphabet: a printable character for each byte. Printable Latin-1 stands for itself, the rest
  are numbered from U+0100."""
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  rest = [byte for byte in range(256) if byte not in printable]
  return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def _ordinary_bytes(token: str) -> bytes:
  """Bytes of a vocabulary entry; an entry outside GPT-2's alphabet (never merged to) is its own text."""
  alphabet = _byte_of_character()
  if any(char not in alphabet for char in token):
    return token.encode()
  return bytes(alphabet[char] for char in token)


def _piece_bytes(token: str) -> bytes:
  """Bytes of a SentencePiece entry: a single byte written as <0x0A>, or text with its blanks marked."""
  if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
    return bytes([int(token[3:5], 16)])
  return token.replace(forms.BLANK, " ").encode()


def _token_text(entry: Any) -> str | None:
  """tokenizer_config.json writes a token as a string or as a record with its "content"."""
  return entry.get("content") if isinstance(entry, dict) else entry


def _default_template(entry: Any) -> str:
  """tokenizer_config.json writes one template as a string, several as records with "name"."""
  if isinstance(entry, list):
    return next((each["template"] for each in entry if each.get("name") == "default"), "")
  return entry or ""
