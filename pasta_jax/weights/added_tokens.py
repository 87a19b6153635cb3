"""Added tokens: entries that a tokenizer finds in a text before it looks at words, with the blanks around them
that some of them take."""

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import tokenizers
from tokenizers import models

from pasta_jax.utils.typed import Parsed, checked
from pasta_jax.weights.model_files import faults_of_library

_BLANKS = ("lstrip", "rstrip")  # flags of a token that takes the blanks before it, after it


class Entry(Parsed):
  """A value of tokenizer_config.json's "added_tokens_decoder"; defaults as in Hugging Face."""

  content: str
  special: bool = False
  lstrip: bool = False
  rstrip: bool = False
  single_word: bool = False
  normalized: bool | None = None  # None: unless it is special

  def flags(self) -> dict[str, bool]:
    normalized = not self.special if self.normalized is None else self.normalized
    return self.model_dump(exclude={"content"}) | {"normalized": normalized}


def decoder_of(config: Mapping[str, Any]) -> dict[int, Entry]:
  """The "added_tokens_decoder" of a tokenizer_config.json, by id; {} if it has none. Ids may be negative.

  Raises ValueError for an id that is not a number, or a damaged value.
  """
  given = checked(dict[str, Entry], config.get("added_tokens_decoder") or {}, "added_tokens_decoder")
  try:
    return {int(index): entry for index, entry in given.items()}
  except ValueError:
    raise ValueError("added_tokens_decoder has an id that is not a number") from None


def merged(parts: Mapping[str, Any], entries: Mapping[int, Entry]) -> dict[str, Any]:
  """tokenizer.json with the added tokens of tokenizer_config.json, as in transformers: these say how a token
  looks for blanks and words, and a token that is nowhere else gets the next id, whatever its own."""
  given = {entry.content: entry.flags() for _, entry in sorted(entries.items())}
  added = [entry | given.pop(entry["content"], {}) for entry in parts.get("added_tokens") or ()]
  vocab: Mapping[str, int] = parts["model"].get("vocab", {}) if given else {}
  ids = [*vocab.values(), *(entry["id"] for entry in added)]
  following = itertools.count(max(ids, default=-1) + 1)
  for text, flags in given.items():
    added.append({"id": vocab[text] if text in vocab else next(following), "content": text, **flags})
  return {**parts, "added_tokens": added}


def blanks_of(entries: Mapping[int, Entry]) -> dict[str, dict[str, bool]]:
  """Which blanks added tokens take, by text; of those that are found before a text is normalised, so that they
  end it."""
  return {
    entry.content: {flag: getattr(entry, flag) for flag in _BLANKS}
    for entry in entries.values()
    if not entry.flags()["normalized"]
  }


def without_blanks(
  added: Iterable[Mapping[str, Any]],
) -> tuple[list[dict[str, Any]], dict[str, dict[str, bool]]]:
  """(tokenizer.json's "added_tokens", of which ordinary ones take no blanks, so that no text loses any; the
  flags that were changed, by the token's text)."""
  changed = {
    e["content"]: {flag: bool(e.get(flag)) for flag in _BLANKS}
    for e in added
    if not e.get("special") and any(e.get(flag) for flag in _BLANKS)
  }
  return [{**e, **(dict.fromkeys(_BLANKS, False) if e["content"] in changed else {})} for e in added], changed


class Found(NamedTuple):
  """An added token in a text. `start` and `stop`, in characters, include the blanks that it takes.
  `normalized`: it was searched after the text before it had been normalised."""

  token: int
  start: int
  stop: int
  normalized: bool


class Finder:
  """Finds added tokens as Hugging Face's tokenizers do: this is one of them, which knows no other tokens.

  Where no token looks at what is around it, and none waits for normalised text, a regular expression finds the
  same and is faster.
  """

  def __init__(
    self,
    tokens: Mapping[int, tokenizers.AddedToken],
    blanks: Mapping[str, Mapping[str, bool]],
    normalizer: Mapping[str, Any] | None,
  ):
    """`blanks`: flags that differ from those of `tokens` (`without_blanks`); `normalizer` is
    tokenizer.json's."""
    self._plain = None
    if not any(t.normalized or t.lstrip or t.rstrip or t.single_word for t in tokens.values()) and not blanks:
      longest_first = sorted((token.content for token in tokens.values()), key=len, reverse=True)
      self._plain = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
      self._ids = {token.content: index for index, token in tokens.items()}
      return
    exact = [_copy(token, **blanks.get(token.content, {})) for token in tokens.values()]
    self._backend = _backend(exact, normalizer)
    self._known = {
      self._backend.token_to_id(token.content): (index, token.normalized) for index, token in tokens.items()
    }
    # The library panics where a token of blanks takes those before it after another token took them all.
    self._cautious = None
    if any(token.lstrip and token.content.isspace() for token in exact):
      less = [_copy(token, lstrip=token.lstrip and not token.content.isspace()) for token in exact]
      self._cautious = _backend(less, normalizer)

  def __call__(self, text: str) -> list[Found]:
    """In the order of the text."""
    if self._plain is not None:
      return [Found(self._ids[m[0]], m.start(), m.end(), False) for m in self._plain.finditer(text)]
    try:
      with faults_of_library():
        encoded = self._backend.encode(text, add_special_tokens=False)
    except ValueError:
      if self._cautious is None:
        raise
      encoded = self._cautious.encode(text, add_special_tokens=False)
    out = []
    for own, (start, stop) in zip(encoded.ids, encoded.offsets):
      token, normalized = self._known[own]
      out.append(Found(token, start, stop, normalized))
    return out


def _copy(token: tokenizers.AddedToken, **changes: bool) -> tokenizers.AddedToken:
  flags = {
    flag: getattr(token, flag) for flag in ("lstrip", "rstrip", "single_word", "normalized", "special")
  }
  return tokenizers.AddedToken(token.content, **flags | changes)


def _backend(
  tokens: list[tokenizers.AddedToken], normalizer: Mapping[str, Any] | None
) -> tokenizers.Tokenizer:
  backend = tokenizers.Tokenizer(models.BPE())
  if normalizer is not None:
    parts = json.loads(backend.to_str()) | {"normalizer": normalizer}
    backend = tokenizers.Tokenizer.from_str(json.dumps(parts))
  backend.add_tokens(tokens)
  return backend
