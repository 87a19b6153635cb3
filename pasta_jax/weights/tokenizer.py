"""Text to tokens and back, without loss, and without control tokens from untrusted text.

Two kinds of BPE are supported: byte-level (Llama 3, SmolLM2, Qwen), and SentencePiece with byte fallback
(Gemma, Llama 2). In both, each ordinary token is a sequence of bytes, and the concatenated bytes of a text's
tokens are the text. Llama 2 adds a leading blank to every text: here only texts of conversations get it, not
a text that is encoded alone.
"""

import contextlib
import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from pasta_jax.lang.syntax import TOKEN_TEXTS
from pasta_jax.utils.json_io import to_json
from pasta_jax.weights import chat
from pasta_jax.weights import tokenizer_forms as forms
from pasta_jax.weights.added_tokens import Finder, Found, blanks_of, decoder_of, merged, without_blanks
from pasta_jax.weights.arrays import WeightsError
from pasta_jax.weights.model_files import faults_of_library, read_json, read_text, write_json
from pasta_jax.weights.sentencepiece_file import read_pieces

_MAX_GAPS = 64  # ids for each token: lists by id have this many entries at most
_MAX_CONTROLS, _MAX_CONTROL = 100_000, 4096  # control tokens; characters of one: all are sought at once
_MAX_DIGITS = 4000  # of a token that is a number; Python converts 4300 at most
_PROBE = " A b  cd\n\te1 23, (x)."  # what components of tokenizers split at, drop or change
# Hugging Face's names of tokens, which templates use.
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
  """A BPE vocabulary with its chat template.

  Attributes:
    vocab_size: number of ids, control tokens included. A model may have more (padded) embeddings.
    eos_id: the token that ends an assistant's turn: the one that a file names so, otherwise the control token
      that the chat template writes after an assistant's text, otherwise the one that ends a text.
    end_ids: every token that ends a text, `eos_id` among them, in order.
    bos_id: the token that may begin a text, or None. `encode` never adds it; a chat template may.
    special_ids: the control tokens, which `encode` never returns.
    tag_ids: the entries of PASTA's tags: the tags themselves if the weights were saved with them, otherwise
      the first six reserved entries of the vocabulary; () if it has none.
    knows_tags: whether they are the tags themselves.
    length_ids: likewise the entries of lengths, where each is one token: the next 64 reserved ones, or ().
    chat_template: Jinja source; "" for a base model, except Gemma's (`chat.template_without_one`).
  """

  def __init__(
    self,
    backend: tokenizers.Tokenizer,
    eos_id: int,
    bos_id: int | None,
    chat_template: str,
    *,
    eot_id: int | None = None,
    end_ids: Iterable[int] = (),
    named: Mapping[str, int] | None = None,
    pieces: bool = False,
    prefix: str = "",
    stored: Mapping[str, Any] | None = None,
    blanks: Mapping[str, Mapping[str, bool]] | None = None,
    words: tokenizers.Tokenizer | None = None,
  ):
    """Takes ownership of `backend` and changes its settings.

    Args:
      eos_id: the token that ends a text.
      eot_id: the token that ends an assistant's turn, if known.
      end_ids: further tokens that end a text; ids outside the vocabulary are ignored.
      named: further tokens by Hugging Face's names ("pad_token").
      pieces: whether entries are SentencePiece's, not byte-level.
      prefix: which texts of a conversation get a leading blank (`tokenizer_forms.without_prefix`).
      stored: components of tokenizer.json that `save` writes, so that other engines add the same blanks.
      blanks: flags of added tokens that take blanks in conversations (`added_tokens.without_blanks`).
      words: `backend` without added tokens, if some of them look at what is around them: then all are found
        before the text between them is encoded.

    Raises:
      ValueError: `eos_id`, `eot_id` or `bos_id` is not in the vocabulary.
    """
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # which means: treat their texts as ordinary text
    added = backend.get_added_tokens_decoder()
    vocab = backend.get_vocab(with_added_tokens=True)
    self._backend = backend
    tags, lengths = forms.texts_for_tags_and_lengths(vocab)
    self.tag_ids, self.length_ids = (tuple(vocab[text] for text in texts) for texts in (tags, lengths))
    self.knows_tags = tags == list(TOKEN_TEXTS)
    self._kept_out: re.Pattern[str] | None = None  # texts that become no single token (`keeping_out`)
    self.special_ids = frozenset(index for index, token in added.items() if token.special)
    # Added tokens are literal text, but Gemma's files list runs of blanks as added tokens, written as pieces.
    literal = self.special_ids if pieces else added.keys()
    size = max(vocab.values(), default=-1) + 1
    if size > _MAX_GAPS * (len(vocab) + 1024):
      raise ValueError(f"{len(vocab)} tokens have ids up to {size - 1}")
    self._bytes = [b""] * size
    for token, index in vocab.items():
      self._bytes[index] = (
        token.encode()
        if index in literal
        else (forms.bytes_of_piece if pieces else forms.bytes_of_word)(token)
      )
    # If a text contains the character `BLANK` itself, it is encoded as its bytes.
    self._blank = [vocab.get(f"<0x{byte:02X}>", -1) for byte in forms.BLANK.encode()] if pieces else []
    if min(self._blank, default=0) < 0:
      raise ValueError("the vocabulary of pieces lacks tokens for single bytes")
    self._prefix, self._stored, self._blanks = prefix, dict(stored or {}), dict(blanks or {})
    self.vocab_size = len(self._bytes)
    self.bos_id = bos_id
    self.chat_template = chat_template or chat.template_without_one(vocab)
    for each in (eos_id, eot_id, bos_id):
      if each is not None and not self._is_token(each):
        raise ValueError(f"the token that ends a turn or begins a text, {each}, is not in the vocabulary")
    self._named = {**(named or {}), "eos_token": eos_id, **({} if bos_id is None else {"bos_token": bos_id})}

    self._controls = {added[index].content: index for index in self.special_ids}
    longest_first = sorted(self._controls, key=len, reverse=True)
    if len(longest_first) > _MAX_CONTROLS or len(longest_first[0] if longest_first else "") > _MAX_CONTROL:
      raise ValueError(
        f"{len(longest_first)} control tokens, of up to {len(longest_first[0])} characters, are too many or too long"
      )
    self._any_control = "|".join(map(re.escape, longest_first)) or "(?!)"
    normaliser = json.loads(backend.normalizer.__getstate__()) if backend.normalizer else None
    self._words = words or backend
    sought = {
      index: token
      for index, token in added.items()
      if token.special or words or token.content in self._blanks
    }
    self._find = Finder(sought, self._blanks, self._stored.get("normalizer", normaliser))
    single = {self._bytes[index] for index in range(self.vocab_size) if index not in self.special_ids}
    self._absent = bytes(byte for byte in range(256) if bytes([byte]) not in single)
    if eot_id is None and self.chat_template:
      end = chat.end_of_turn(self.chat_template, self._texts(), self._any_control)
      eot_id = self._controls[end] if end is not None else None
    self.eos_id = eos_id if eot_id is None else eot_id
    self.end_ids = tuple(sorted({self.eos_id, eos_id, *filter(self._is_token, end_ids)}))

  @classmethod
  def from_gguf_fields(
    cls,
    tokens: Sequence[str],
    token_types: Sequence[int],
    eos_id: int | None,
    bos_id: int | None = None,
    chat_template: str = "",
    *,
    eot_id: int | None = None,
    pad_id: int | None = None,
    unk_id: int | None = None,
    add_bos: bool = False,
    prefix: bool = False,
    merges: Sequence[str] = (),
    pre: str = "",
    scores: Sequence[float] | None = None,
  ) -> "Tokenizer":
    """From GGUF metadata. A "gpt2" tokenizer has `merges`, which are pairs such as "h e", best first, and a
    pre-tokenizer `pre`. SentencePiece's ("llama") has the `scores` of its pieces, and `prefix`: whether texts
    of conversations get a leading blank.

    `eos_id` ends a text and `eot_id` a turn; one of them is required. With `add_bos` the saved tokenizer
    tells other engines to add `bos_id` before texts (`save`).

    Raises:
      ValueError: an unknown pre-tokenizer, or lists that do not match.
    """
    if scores is not None and len(scores) != len(tokens):
      raise ValueError(f"{len(tokens)} tokens, but {len(scores)} scores")
    if len(token_types) != len(tokens):
      raise ValueError(f"{len(tokens)} tokens, but {len(token_types)} token types")
    if (ends := eot_id if eos_id is None else eos_id) is None:
      raise ValueError("no end-of-turn token is named")
    kinds = forms.kinds_of(tokens, token_types, {index for index in (ends, eot_id) if index is not None})
    if scores is None:
      backend = forms.backend_of_bytes(tokens, kinds, merges, pre)
    else:
      backend = forms.backend_of_pieces(tokens, kinds, scores)
    if add_bos and bos_id is not None and 0 <= bos_id < len(tokens):
      backend.post_processor = forms.beginning_with(tokens[bos_id], bos_id)
    # Only control tokens: some files name an ordinary token such as "!" for padding, and transformers would
    # turn that into a control token.
    named = {
      name: index
      for name, index in (("pad_token", pad_id), ("unk_token", unk_id))
      if index is not None and 0 <= index < len(kinds) and kinds[index] == forms.CONTROL
    }
    where = "every" if prefix else ""
    return cls(
      backend,
      ends,
      bos_id,
      chat_template,
      eot_id=eot_id,
      named=named,
      pieces=scores is not None,
      prefix=where,
      stored=forms.PREFIXES[where],
    )

  @classmethod
  def from_folder(cls, folder: Path, rows: int | None = None) -> "Tokenizer":
    """From a folder in Hugging Face's format: its tokenizer.json, otherwise SentencePiece's tokenizer.model,
    with the names of tokens in tokenizer_config.json, special_tokens_map.json and generation_config.json. A
    `chat_template.jinja` takes precedence over the template in the config.

    If a byte-level `tokenizer.json` has a normaliser, texts are exact only up to that normaliser.

    Args:
      rows: number of embeddings of the model; added tokens without one are left out.

    Raises:
      WeightsError: a file is missing, damaged or not supported, has more tokens than `rows`, or names no
        token that ends a text.
    """
    config, texts, source = _described(folder)
    ends = [texts[name] for name in ("eos_token", "bos_token") if name in texts]
    path = next(
      (path for name in ("tokenizer.json", "tokenizer.model") if (path := folder / name).exists()), None
    )
    if path is None:
      raise WeightsError(
        f"{folder / 'tokenizer.json'}: cannot be read (there is neither this nor a tokenizer.model)"
      )
    with _faults_in(folder / "tokenizer_config.json"):
      entries = decoder_of(config)
    with _faults_in(path):
      if path.suffix == ".json":
        backend, more = _of_json(merged(read_json(path), entries), rows, ends)
      else:
        backend, more = _of_pieces(folder, config, texts, rows)
        more["blanks"] = blanks_of(entries)
      named = {
        name: index for name, text in texts.items() if (index := backend.token_to_id(text)) is not None
      }
      if "eos_token" not in named:
        raise WeightsError(f"{source}: eos_token {texts.get('eos_token')!r} is not a token of the vocabulary")
    template_file = folder / "chat_template.jinja"
    with _faults_in(folder / "tokenizer_config.json"):
      template = (
        read_text(template_file) if template_file.exists() else chat.template_in(config.get("chat_template"))
      )
    end_ids = _end_ids(folder)
    with _faults_in(path):
      tokenizer = cls(
        backend, named["eos_token"], named.get("bos_token"), template, named=named, end_ids=end_ids, **more
      )
      tokenizer._refuse_loss()
      return tokenizer

  def keeping_out(self, ids: Iterable[int]) -> "Tokenizer":
    """The same tokenizer, whose texts never become one of the tokens `ids`: the entries that lengths take."""
    texts = {text for index in ids if self._is_token(index) and (text := self._literal(index))}
    cuts = [f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in sorted(texts - self._controls.keys())]
    kept = copy.copy(self)
    kept._kept_out = re.compile("|".join(cuts)) if cuts else None
    return kept

  def save(self, folder: Path, tags: Mapping[int, str] | None = None) -> None:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json to an existing folder, for
    `from_folder` and Hugging Face; with these texts of tags (`syntax.token_texts`), by id, as vocabulary entries
    that transformers does not generate."""
    parts = json.loads(self._backend.to_str()) | self._stored
    for entry in parts["added_tokens"]:
      entry |= self._blanks.get(entry["content"], {})
    if tags:
      forms.name_tags(parts, tags, self.vocab_size)
    write_json(folder / "tokenizer.json", parts)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._texts()}
    if "eos_token" not in self.chat_template:  # a template that writes it expects the original one
      config["eos_token"] = self._literal(self.eos_id)
    config |= {"chat_template": self.chat_template} if self.chat_template else {}
    write_json(folder / "tokenizer_config.json", config)
    others = {f"{name}_id": self._named[name] for name in ("bos_token", "pad_token") if name in self._named}
    banned = {"bad_words_ids": [[index] for index in sorted(tags)]} if tags else {}
    write_json(folder / "generation_config.json", {"eos_token_id": self.eos_token_id, **others, **banned})

  @property
  def eos_token_id(self) -> int | list[int]:
    """`end_ids` in the form of Hugging Face's files."""
    return list(self.end_ids) if len(self.end_ids) > 1 else self.eos_id

  def encode(self, text: str) -> list[int]:
    """The ordinary tokens of a text: no control tokens, even if the text contains theirs, and none added
    around it.

    Raises:
      ValueError: the vocabulary cannot encode a character of the text (SmolLM2 lacks six control characters
        and the unassigned planes 4 to 11). Dropping it silently would change the text.
    """
    return self._encode(text, self._backend)

  def _encode(self, text: str, backend: tokenizers.Tokenizer) -> list[int]:
    raw = text.encode()
    if raw.translate(None, self._absent) != raw:
      missing = next(char for char in text if set(char.encode()) & set(self._absent))
      raise ValueError(f"the vocabulary has no token for the character U+{ord(missing):04X}")
    if self._kept_out is not None and len(parts := self._kept_out.split(text)) > 1:
      return [token for part in parts for token in self._encode(part, backend)]
    parts = text.split(forms.BLANK) if self._blank else [text]
    with faults_of_library():
      first, *rest = (backend.encode(part, add_special_tokens=False).ids for part in parts)
    return first + [token for part in rest for token in (*self._blank, *part)]

  def token_bytes(self, index: int) -> bytes:
    """Bytes of one token; for a control token, its literal text. Raises ValueError outside the vocabulary.

    A token may end inside a character: when streaming, decode bytes, not tokens.
    """
    if not 0 <= index < self.vocab_size:
      raise ValueError(f"token {index} is not in the vocabulary of {self.vocab_size}")
    return self._bytes[index]

  def decode(self, ids: Iterable[int]) -> str:
    """Text of tokens, with control tokens as their literal text. Invalid bytes become U+FFFD."""
    return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

  def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Tokens of a conversation, up to the point where the assistant begins to write.

    The same tokens as from Hugging Face's `apply_chat_template(..., add_generation_prompt=True)`, except that
    control tokens come from the template only: their texts in a message's content are encoded as ordinary
    text.

    Args:
      messages: each with "role" (system, user, assistant or tool) and "content" (text). Other keys are
        ignored.

    Raises:
      ValueError: there is no chat template, a message is malformed, or the template refuses the conversation.
    """
    ids: list[int] = []
    if not self.chat_template:
      raise ValueError("this tokenizer has no chat template")
    safe, shield = chat.shielded(messages, self._any_control)
    text = chat.render(self.chat_template, safe, self._texts())
    # Text between two added tokens is encoded as a whole, as in Hugging Face: a token may span the border
    # between template and content.
    at, before = 0, None
    for found in self._find(text):
      if found.token in self.special_ids and text.startswith(shield, found.stop):
        continue  # a control token of one character, in a message
      if self._kept_out is not None and self._kept_out.search(text, found.start, found.stop):
        continue
      ids += self._encode_between(text[at : found.start].replace(shield, ""), before)
      ids.append(found.token)
      at, before = found.stop, found
    return ids + self._encode_between(text[at:].replace(shield, ""), before)

  def _encode_between(self, text: str, before: Found | None) -> list[int]:
    """Tokens of a text behind the added token `before`, with the leading blank that Hugging Face adds."""
    return self._encode(self._with_prefix(text, before), self._words) if text else []

  def _with_prefix(self, text: str, before: Found | None) -> str:
    if not self._prefix or self._prefix == "first" and before is not None:
      return text
    if self._prefix == "every" and before is not None and before.normalized:
      return text  # the blank was added before that token was found
    return text if self._prefix != "every" and text.startswith((" ", forms.BLANK)) else " " + text

  def digit_values(self) -> dict[int, tuple[int, int]]:
    """Token → (value, 10 ** number of digits), for ordinary tokens that consist of ASCII digits.

    To read digit tokens from left to right: number = number * 10 ** digits + value.
    """
    return {
      index: (int(raw[:_MAX_DIGITS]), 10 ** min(len(raw), _MAX_DIGITS))
      for index, raw in enumerate(self._bytes)
      if raw.isdigit() and index not in self.special_ids
    }

  def _refuse_loss(self) -> None:
    """Raises ValueError if the vocabulary's words lose or change characters: components that do are many."""
    changes = self._backend.normalizer is not None and not self._blank  # such as NFC: ASCII stays as it is
    known = (c for c in _PROBE if not set(c.encode()) & set(self._absent))
    probe = "".join(c for c in known if c.isascii() or not changes)
    if self.decode(self.encode(probe)) != probe:
      raise ValueError(f"the text {probe!r} is {self.decode(self.encode(probe))!r:.80} after it was encoded")

  def _is_token(self, index: int) -> bool:
    return 0 <= index < self.vocab_size

  def _literal(self, index: int) -> str:
    return self.token_bytes(index).decode(errors="replace")

  def _texts(self) -> dict[str, str]:
    """Texts of the named tokens, by name."""
    return {name: self._literal(index) for name, index in self._named.items()}


# --- files of a folder ---


@contextlib.contextmanager
def _faults_in(path: Path) -> Iterator[None]:
  """Turns every error about a file's content into a WeightsError of one line that names the file."""
  try:
    yield
  except WeightsError:
    raise
  except ValueError as error:
    raise WeightsError(f"{path}: {error}") from error
  except (AttributeError, TypeError, LookupError) as error:  # for example a list instead of an object
    raise WeightsError(f"{path}: damaged ({type(error).__name__}: {error})") from error


def _described(folder: Path) -> tuple[dict[str, Any], dict[str, str], Path]:
  """(content of tokenizer_config.json, texts of the named tokens by name, the file to blame if these are
  wrong).

  Names are in tokenizer_config.json or in special_tokens_map.json; the latter takes precedence if the former
  has no `added_tokens_decoder`, as in transformers. The config may be missing if the map names the end of a
  text.
  """
  path, map_path = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
  names = read_json(map_path) if map_path.exists() else {}
  config = read_json(path) if path.exists() or not names.get("eos_token") else {}
  source = path if path.exists() else map_path
  first, second = (config, names) if "added_tokens_decoder" in config else (names, config)
  texts = {}
  for name in _NAMES:
    entry = second.get(name) if first.get(name) is None else first[name]
    text = entry.get("content") if isinstance(entry, dict) else entry
    if not isinstance(text, str | None):
      raise WeightsError(f"{source}: {name} {entry!r} is not the text of a token")
    if text is not None:
      texts[name] = text
  return config, texts, source


def _of_json(
  parts: Mapping[str, Any], rows: int | None, ends: Sequence[str]
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
  """(backend, further arguments of `Tokenizer`) of a tokenizer.json. Raises ValueError if it is not
  supported."""
  model, prefix = parts.get("model") or {}, ""
  stored = {key: parts.get(key) for key in ("normalizer", "pre_tokenizer")}
  byte_level = [
    part for part in forms.components(parts.get("pre_tokenizer")) if part.get("type") == "ByteLevel"
  ]
  pieces = bool(not byte_level and model.get("byte_fallback"))
  if model.get("type") != "BPE" or not (byte_level or pieces):
    raise ValueError("not a BPE tokenizer, byte-level or with byte fallback")
  if not isinstance(parts.get("normalizer"), dict | None):  # the library takes lists, for something else
    raise ValueError("its normaliser is not an object")
  if any(part.get("add_prefix_space") for part in byte_level):
    raise ValueError("add_prefix_space changes the text, and is not supported")
  if pieces:
    parts, prefix = forms.without_prefix(parts)
  parts = forms.prepared(parts, rows, ends, pieces=pieces)
  looking = any(e.get(flag) for e in parts["added_tokens"] for flag in ("lstrip", "rstrip", "single_word"))
  parts["added_tokens"], blanks = without_blanks(parts["added_tokens"])
  with faults_of_library():
    backend = tokenizers.Tokenizer.from_str(to_json(parts))
    words = tokenizers.Tokenizer.from_str(to_json({**parts, "added_tokens": []})) if looking else None
  return backend, {"pieces": pieces, "prefix": prefix, "stored": stored, "blanks": blanks, "words": words}


def _of_pieces(
  folder: Path, config: Mapping[str, Any], texts: Mapping[str, str], rows: int | None
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
  """(backend, further arguments of `Tokenizer`) of a tokenizer.model. Raises ValueError if it is not
  supported."""
  bos, eos = texts.get("bos_token"), texts.get("eos_token")
  ends = [text for text in (bos, eos) if text is not None]
  tokens, kinds, scores, prefix = read_pieces(folder, config, texts.values(), ends, rows)
  kinds = forms.kinds_of(tokens, kinds, [index for index, token in enumerate(tokens) if token in ends])
  backend = forms.backend_of_pieces(tokens, kinds, scores)
  if bos in tokens and config.get("add_bos_token", True):
    backend.post_processor = forms.beginning_with(bos, tokens.index(bos))
  return backend, {"pieces": True, "prefix": prefix, "stored": forms.PREFIXES[prefix]}


def _end_ids(folder: Path) -> list[int]:
  """The tokens that end a text according to generation_config.json; if that is missing or names none, to
  config.json, or to that of its text part."""
  for path in (folder / "generation_config.json", folder / "config.json"):
    described = read_json(path) if path.exists() else {}
    text_part = described.get("text_config")
    for part in (described, text_part if isinstance(text_part, dict) else {}):
      if (given := part.get("eos_token_id")) not in (None, []):
        ids = given if isinstance(given, list) else [given]
        if not all(type(index) is int for index in ids):
          raise WeightsError(f"{path}: eos_token_id {given!r:.80} is neither a token nor a list of tokens")
        return ids
  return []
