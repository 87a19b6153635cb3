"""Storage formats of tokenizers: Hugging Face's tokenizer.json, and lists of tokens (GGUF, SentencePiece)."""

import functools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from pasta_jax.config.sections import PROMISE_FORMS
from pasta_jax.lang.automaton import LENGTHS
from pasta_jax.lang.syntax import TOKEN_TEXTS, length_texts
from pasta_jax.weights.model_files import faults_of_library

# Kinds of tokens in GGUF and in SentencePiece's files.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
BLANK = "\u2581"  # SentencePiece's character for a blank
# Control tokens that some files list as user-defined, like words that must not be split. "</s>" is not among
# them: in Gemma's vocabulary it is HTML, and where it ends a text, files name it as such.
_TURN_MARKS = (
  "<start_of_turn>",
  "<end_of_turn>",
  "<|im_start|>",
  "<|im_end|>",
  "<|eot_id|>",
  "<|endoftext|>",
)
# Reserved vocabulary entries of Gemma, Llama 3 and Mistral, and the padding entries of Qwen's GGUF files.
_RESERVED = (r"<unused(\d+)>", r"<\|reserved_special_token_(\d+)\|>", r"\[control_(\d+)\]", r"\[PAD(\d+)\]")
# Longest ordinary piece, in characters; SentencePiece's own limit is 16. To find a piece's merges costs the
# square of its length.
_MAX_PIECE = 512
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's tokens for single bytes
# Pre-tokenizers of byte-level vocabularies, by GGUF's names. Llama 3's and Qwen's differ in digits; Mistral's
# (since Nemo) splits by case and has no English contractions.
_CUTS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CUT_AS = {
  "llama-bpe": _CUTS.format(digits=r"\p{N}{1,3}"),
  "qwen2": _CUTS.format(digits=r"\p{N}"),
  "tekken": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
_WHOLE_WORDS = ("llama-bpe", "tekken")  # a word that is a vocabulary entry is one token, whatever the merges


# --- lists of tokens ---


def kinds_of(tokens: Sequence[str], kinds: Sequence[int], named: Collection[int]) -> list[int]:
  """Kinds of tokens, corrected. Always control tokens, whatever the file says: the `named` ids, which end a
  text or a turn; the turn tokens; the unknown token; the entries of PASTA's tags."""
  tags = frozenset(texts_for_tags({token: index for index, token in enumerate(tokens)}))
  return [
    CONTROL
    if (kind == UNKNOWN or index in named or token in tags or kind == USER_DEFINED and token in _TURN_MARKS)
    else kind
    for index, (token, kind) in enumerate(zip(tokens, kinds))
  ]


def backend_of_bytes(
  tokens: Sequence[str], kinds: Sequence[int], merges: Iterable[str], pre: str
) -> tokenizers.Tokenizer:
  """A byte-level BPE. `merges` are pairs such as "h e", best first; `pre` is GGUF's name of the
  pre-tokenizer.

  Raises ValueError for an unknown pre-tokenizer, or for merges that do not fit the tokens.
  """
  cut, whole = _cutter(pre), _ALIASES.get(pre, pre) in _WHOLE_WORDS
  vocab = {token: index for index, token in enumerate(tokens)}
  backend = _backend(vocab, (merge.split(" ") for merge in merges), ignore_merges=whole)
  backend.pre_tokenizer = cut
  backend.decoder = decoders.ByteLevel()
  _add(backend, tokens, kinds)
  return backend


def backend_of_pieces(
  tokens: Sequence[str], kinds: Sequence[int], scores: Sequence[float]
) -> tokenizers.Tokenizer:
  """SentencePiece's BPE, without a leading blank of texts. Raises ValueError if the lists are not a
  vocabulary."""
  # User-defined tokens are searched in the text before its blanks are replaced.
  tokens = [
    token.replace(BLANK, " ") if kind == USER_DEFINED else token for token, kind in zip(tokens, kinds)
  ]
  vocab = {token: index for index, token in enumerate(tokens)}
  backend = _backend(vocab, merges_of_pieces(vocab, scores, kinds), byte_fallback=True, fuse_unk=True)
  backend.normalizer = normalizers.Replace(" ", BLANK)
  backend.decoder = decoders.Sequence(
    [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
  )
  _add(backend, tokens, kinds)
  return backend


def beginning_with(token: str, index: int) -> processors.PostProcessor:
  """A post-processor that adds a token before every text, for other engines: `Tokenizer.encode` does not use
  it."""
  return processors.TemplateProcessing(
    single=f"{token}:0 $A:0", pair=f"{token}:0 $A:0 {token}:1 $B:1", special_tokens=[(token, index)]
  )


def merges_of_pieces(
  vocab: Mapping[str, int], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
  """The pairs that SentencePiece merges, best first: any two pieces whose concatenation is a piece, by its
  score.

  Raises ValueError for a piece that is too long.
  """
  found = []
  for piece, index in vocab.items():
    if kinds[index] == NORMAL:
      if len(piece) > _MAX_PIECE:
        raise ValueError(f"a piece of {len(piece)} characters, more than {_MAX_PIECE}")
      for cut in range(1, len(piece)):
        left, right = piece[:cut], piece[cut:]
        if left in vocab and right in vocab:
          found.append((-scores[index], vocab[left], vocab[right], (left, right)))
  return [pair for *_, pair in sorted(found)]


def _backend(vocab: dict[str, int], merges: Iterable[Sequence[str]], **settings: Any) -> tokenizers.Tokenizer:
  with faults_of_library():
    return tokenizers.Tokenizer(models.BPE(vocab, [(left, right) for left, right in merges], **settings))


def _cutter(pre: str) -> pre_tokenizers.PreTokenizer:
  """The pre-tokenizer that GGUF calls `pre`. Raises ValueError for an unknown name."""
  if pre == "smollm":
    return pre_tokenizers.Sequence(
      [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
  if (name := _ALIASES.get(pre, pre)) not in _CUT_AS:
    raise ValueError(
      f"pre-tokenizer {pre!r} is not supported, only {', '.join(map(repr, ('smollm', *_CUT_AS)))}"
    )
  return pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(_CUT_AS[name]), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )


def _add(backend: tokenizers.Tokenizer, tokens: Sequence[str], kinds: Sequence[int]) -> None:
  """Adds the control tokens, and the user-defined tokens, which must not be split."""
  for wanted, special in ((CONTROL, True), (USER_DEFINED, False)):
    texts = [token for token, kind in zip(tokens, kinds) if kind == wanted]
    backend.add_tokens([tokenizers.AddedToken(text, special=special, normalized=False) for text in texts])


# --- tokenizer.json ---

# Normalisers: SentencePiece's blanks; the same with a leading blank of every text, as in Llama 2.
_BLANKS = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
_PREFIXED = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": BLANK}, _BLANKS]}
# The decoder that removes the leading blank again.
_STRIPPED = {
  "type": "Sequence",
  "decoders": [
    {"type": "Replace", "pattern": {"String": BLANK}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
  ],
}
# The components that add a leading blank, by which texts get one (see `without_prefix`).
PREFIXES: dict[str, dict[str, Any]] = {
  "": {},
  "every": {"normalizer": _PREFIXED, "decoder": _STRIPPED},
  "first": {
    "normalizer": None,
    "decoder": _STRIPPED,
    "pre_tokenizer": {"type": "Metaspace", "replacement": BLANK, "prepend_scheme": "first", "split": False},
  },
}


def without_prefix(parts: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
  """(tokenizer.json of pieces, changed to add no leading blank; which texts between control tokens got one):
  "" none, "every" text, those that do not "begin" with a blank, or only the "first" of those.

  Raises ValueError if its normaliser changes more than blanks.
  """
  normaliser, cutter = parts.get("normalizer"), parts.get("pre_tokenizer") or {}
  if cutter.get("type") == "Metaspace" and cutter.get("replacement") == BLANK and normaliser is None:
    scheme = cutter.get("prepend_scheme") or ("always" if cutter.get("add_prefix_space", True) else "never")
    unprefixed = {
      "type": "Metaspace",
      "replacement": BLANK,
      "prepend_scheme": "never",
      "split": cutter.get("split", True),
    }
    return {**parts, "pre_tokenizer": unprefixed}, {"never": "", "always": "begin", "first": "first"}[scheme]
  if normaliser == _BLANKS:
    return dict(parts), ""
  if normaliser == _PREFIXED:
    return {**parts, "normalizer": _BLANKS}, "every"
  raise ValueError("its normaliser changes more than blanks, which is not supported")


def texts_for_tags(vocab: Mapping[str, int]) -> list[str]:
  """The vocabulary entries that PASTA's tags take (see `Tokenizer.tag_ids`); [] if there are too few."""
  return texts_for_tags_and_lengths(vocab)[0]


def texts_for_tags_and_lengths(vocab: Mapping[str, int]) -> tuple[list[str], list[str]]:
  """The same, and those of the lengths, where each is one token (`Tokenizer.length_ids`)."""
  reserved, n = _reserved(vocab), len(TOKEN_TEXTS)
  tags, left = reserved[:n], reserved[n:]
  if all(text in vocab for text in TOKEN_TEXTS):
    tags, left = list(TOKEN_TEXTS), reserved
  return tags, named_lengths(vocab) or (left[: len(LENGTHS)] if len(left) >= len(LENGTHS) else [])


def named_lengths(vocab: Mapping[str, int]) -> list[str]:
  """The entries that are lengths by their texts, of weights that were saved with them."""
  known = (length_texts(promise) for promise in PROMISE_FORMS)
  return next((list(texts) for texts in known if all(text in vocab for text in texts)), [])


def _reserved(vocab: Mapping[str, int]) -> list[str]:
  """The reserved entries of a vocabulary in the order of their numbers; [] if they are fewer than the tags."""
  candidates = [text for text in vocab if text[:1] in ("<", "[")]
  for pattern in _RESERVED:
    numbered = sorted((int(found[1]), text) for text in candidates if (found := re.fullmatch(pattern, text)))
    if len(numbered) >= len(TOKEN_TEXTS):
      return [text for _, text in numbered]
  return []


def _added(index: int, content: str, special: bool) -> dict[str, Any]:
  """An entry of tokenizer.json's "added_tokens"."""
  return {
    "id": index,
    "content": content,
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": special,
  }


def prepared(
  parts: Mapping[str, Any], rows: int | None, named: Collection[str], *, pieces: bool
) -> dict[str, Any]:
  """tokenizer.json as `Tokenizer` uses it.

  The entries of the tags, and those `named` as begin and end of texts, become control tokens, so that no text
  encodes to them. Added tokens without one of the `rows` embeddings are left out: they are for other inputs
  than text, such as images.

  Raises ValueError if a token without an embedding is an ordinary entry, or `named`.
  """
  vocab: dict[str, int] = parts["model"].get("vocab", {})
  added = {entry["content"]: entry for entry in parts.get("added_tokens") or ()}
  if rows is not None:
    gone = {text for text, entry in added.items() if entry["id"] >= rows}
    size = max((*vocab.values(), *(entry["id"] for entry in added.values())), default=-1) + 1
    vocab = {text: index for text, index in vocab.items() if text not in gone}
    if gone & set(named) or max(vocab.values(), default=-1) >= rows:
      raise too_few(rows, size)
    added = {text: entry for text, entry in added.items() if text not in gone}
  if pieces:  # a text such as "<0x0A>" must not encode to the token of that byte
    added = {
      text: entry
      for text, entry in added.items()
      if entry.get("special") or text not in vocab or not _BYTE.fullmatch(text)
    }
  known = {**vocab, **{text: entry["id"] for text, entry in added.items()}}
  for text in (*texts_for_tags(known), *named_lengths(known), *(text for text in named if text in known)):
    added[text] = {**added.get(text, _added(known[text], text, True)), "special": True}
  return {
    **parts,
    "model": {**parts["model"], "vocab": vocab},
    "added_tokens": sorted(added.values(), key=lambda entry: entry["id"]),
  }


def too_few(rows: int, tokens: int) -> ValueError:
  """The error for more tokens than embeddings."""
  return ValueError(f"{tokens} tokens, but only {rows} embeddings")


def name_tags(parts: dict[str, Any], texts: Mapping[int, str], size: int) -> None:
  """Adds the tags to tokenizer.json, in place. Unused rows before them get names too, because ids must have
  no gaps.

  The tags are not control tokens there: other engines would remove those from a text, but keep the topic and
  the number of a promise.
  """
  added = {entry["id"]: entry for entry in parts["added_tokens"]}
  for index in range(size, max(texts) + 1):
    added[index] = _added(index, f"<spare_{index}>", False)
  before = {index: text for text, index in parts["model"]["vocab"].items() if index in texts}
  for index, text in texts.items():
    if parts["model"]["vocab"].get(text, index) != index:
      raise ValueError(f"the vocabulary has a token {text!r} that is not a tag")
    added[index] = _added(index, text, False)
    if index in before:
      del parts["model"]["vocab"][before[index]]
      parts["model"]["vocab"][text] = index
  gone = set(before.values())
  joined = lambda merge: "".join(merge) if isinstance(merge, list) else merge.replace(" ", "")
  parts["model"]["merges"] = [merge for merge in parts["model"]["merges"] if joined(merge) not in gone]
  parts["added_tokens"] = [added[index] for index in sorted(added)]


def components(part: Any) -> list[dict[str, Any]]:
  """A component of tokenizer.json, and the components in it if it is a sequence."""
  if not isinstance(part, dict):
    return []
  return [part] + [inner for child in part.get("pretokenizers", []) for inner in components(child)]


# --- bytes of tokens ---


def bytes_of_piece(token: str) -> bytes:
  """Bytes of a SentencePiece entry: a single byte such as <0x0A>, or text with `BLANK` for blanks."""
  if found := _BYTE.fullmatch(token):
    return bytes.fromhex(found[1])
  return token.replace(BLANK, " ").encode()


def bytes_of_word(token: str) -> bytes:
  """Bytes of a byte-level entry. An entry outside GPT-2's alphabet, which no merge yields, is literal
  text."""
  try:
    return bytes(map(_byte_of_character().__getitem__, token))
  except KeyError:
    return token.encode()


@functools.cache
def _byte_of_character() -> dict[str, int]:
  """GPT-2's alphabet: a printable character for each byte. Printable Latin-1 characters represent themselves,
  other bytes are numbered from U+0100."""
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  rest = [byte for byte in range(256) if byte not in printable]
  return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}
