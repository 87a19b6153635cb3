"""Forms that tokenizers are stored in: Hugging Face's tokenizer.json, and GGUF's lists."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Regex, normalizers, pre_tokenizers

from pasta_jax.lang.syntax import TOKEN_TEXTS

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # GGUF token types
BLANK = "\u2581"  # what SentencePiece writes for a blank
# Entries that vocabularies hold for others to use: Gemma's, Llama 3's, Mistral's, and what fills Qwen's GGUF files up.
_RESERVED = (r"<unused(\d+)>", r"<\|reserved_special_token_(\d+)\|>", r"\[control_(\d+)\]", r"\[PAD(\d+)\]")
# How byte-level vocabularies cut a text before they merge, by GGUF's names: Llama 3's and Qwen's differ in digits.
_CUTS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
_DIGITS = {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}
WHOLE_WORDS = ("llama-bpe",)  # vocabularies in which a word that is an entry is one token, whatever the merges say


def byte_level(pre: str) -> pre_tokenizers.PreTokenizer:
  """The pre-tokenizer that GGUF calls `pre`. Raises ValueError for one that is not known."""
  if pre == "smollm":
    return pre_tokenizers.Sequence(
      [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
  if pre not in _DIGITS:
    raise ValueError(f"pre-tokenizer {pre!r} is not supported, only {', '.join(map(repr, ('smollm', *_DIGITS)))}")
  return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_CUTS.format(digits=_DIGITS[pre])), "isolated"),
                                  pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def blanks() -> normalizers.Normalizer:
  """SentencePiece's way to write them."""
  return normalizers.Replace(" ", BLANK)


# The same in tokenizer.json, and with one more before every text, as Llama 2 has it.
_BLANKS = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
PREFIXED = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": BLANK}, _BLANKS]}


def without_prefix(parts: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
  """tokenizer.json of pieces, such that it puts no blank before a text, and where it did: "" nowhere, "every" text
  between control tokens has one, or every one that does not "begin" with a blank, or the "first" one of these.

  Raises ValueError if it changes more of a text than its blanks.
  """
  normaliser, cutter = parts.get("normalizer"), parts.get("pre_tokenizer") or {}
  if cutter.get("type") == "Metaspace" and cutter.get("replacement") == BLANK and normaliser is None:
    scheme = cutter.get("prepend_scheme") or ("always" if cutter.get("add_prefix_space", True) else "never")
    whole = {"type": "Metaspace", "replacement": BLANK, "prepend_scheme": "never", "split": cutter.get("split", True)}
    return {**parts, "pre_tokenizer": whole}, {"never": "", "always": "begin", "first": "first"}[scheme]
  if normaliser == _BLANKS:
    return dict(parts), ""
  if normaliser == PREFIXED:
    return {**parts, "normalizer": _BLANKS}, "every"
  raise ValueError("its normaliser changes more of a text than its blanks, which is not supported")


def merges_of_pieces(vocab: Mapping[str, int], scores: Sequence[float],
                      token_types: Sequence[int]) -> list[tuple[str, str]]:
  """The pairs that SentencePiece merges, best first: any two pieces that make up a third, by the third's score."""
  found = []
  for piece, index in vocab.items():
    if token_types[index] == NORMAL:
      for cut in range(1, len(piece)):
        left, right = piece[:cut], piece[cut:]
        if left in vocab and right in vocab:
          found.append((-scores[index], vocab[left], vocab[right], (left, right)))
  return [pair for *_, pair in sorted(found)]


def texts_for_tags(vocab: Mapping[str, int]) -> list[str]:
  """See `Tokenizer.tag_ids`."""
  if all(text in vocab for text in TOKEN_TEXTS):
    return list(TOKEN_TEXTS)
  few = [text for text in vocab if text[:1] in ("<", "[")]
  for pattern in _RESERVED:
    numbered = sorted((int(found[1]), text) for text in few if (found := re.fullmatch(pattern, text)))
    if len(numbered) >= len(TOKEN_TEXTS):
      return [text for _, text in numbered[: len(TOKEN_TEXTS)]]
  return []


def _added(index: int, content: str, special: bool) -> dict[str, Any]:
  """An entry of tokenizer.json's "added_tokens"."""
  return {"id": index, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
          "special": special}


def with_special_tags(parts: Mapping[str, Any]) -> dict[str, Any]:
  """tokenizer.json with the entries of the tags as control tokens, so that no text yields them."""
  added = {entry["content"]: entry for entry in parts.get("added_tokens") or ()}
  vocab = {**parts["model"].get("vocab", {}), **{text: entry["id"] for text, entry in added.items()}}
  for text in texts_for_tags(vocab):
    added[text] = {**added.get(text, _added(vocab[text], text, True)), "special": True}
  return {**parts, "added_tokens": sorted(added.values(), key=lambda entry: entry["id"])}


def name_tags(parts: dict[str, Any], texts: Mapping[int, str], size: int) -> None:
  """Puts the tags into tokenizer.json, in place. Rows between the vocabulary and them get names too: ids have no gaps.

  They are no control tokens there: other engines leave those out of a text, but not a promise's topic and number.
  """
  added = {entry["id"]: entry for entry in parts["added_tokens"]}
  for index in range(size, max(texts) + 1):
    added[index] = _added(index, f"<spare_{index}>", False)
  before = {index: text for text, index in parts["model"]["vocab"].items() if index in texts}
  for index, text in texts.items():
    if parts["model"]["vocab"].get(text, index) != index:
      raise ValueError(f"the vocabulary has a token {text!r} that is no tag")
    added[index] = _added(index, text, False)
    if index in before:
      del parts["model"]["vocab"][before[index]]
      parts["model"]["vocab"][text] = index
  gone = set(before.values())
  joined = lambda merge: "".join(merge) if isinstance(merge, list) else merge.replace(" ", "")
  parts["model"]["merges"] = [merge for merge in parts["model"]["merges"] if joined(merge) not in gone]
  parts["added_tokens"] = [added[index] for index in sorted(added)]


def components(part: Any) -> list[dict[str, Any]]:
  """A component of tokenizer.json and the components inside it, if it is a sequence."""
  if not isinstance(part, dict):
    return []
  return [part] + [inner for child in part.get("pretokenizers", []) for inner in components(child)]
