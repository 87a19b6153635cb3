"""SentencePiece's tokenizer.model, with the tokens that other files of its folder add."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pasta_jax.utils.typed import checked
from pasta_jax.weights import tokenizer_forms as forms
from pasta_jax.weights.added_tokens import decoder_of
from pasta_jax.weights.arrays import WeightsError
from pasta_jax.weights.model_files import read_json, regular

_BPE, _BYTE = 2, 6  # model_type of BPE, and type of single bytes, in SentencePiece's files


class Pieces(NamedTuple):
  """A vocabulary by id, and which texts of a conversation get a leading blank (a key of
  `tokenizer_forms.PREFIXES`)."""

  tokens: list[str]
  kinds: list[int]
  scores: list[float]
  prefix: str


def read_pieces(
  folder: Path, config: Mapping[str, Any], named: Collection[str], needed: Collection[str], rows: int | None
) -> Pieces:
  """The vocabulary of a folder's tokenizer.model, with the tokens of `added_tokens_decoder` in its
  tokenizer_config.json (`config`) or of its added_tokens.json.

  Args:
    named: texts of the named tokens ("bos_token" and so on), which are control tokens.
    needed: texts of the tokens that begin and end texts.
    rows: number of embeddings. Added tokens without an embedding are left out.

  Raises:
    WeightsError: the file cannot be read.
    ValueError: it is not a BPE with byte fallback, its normaliser changes more than blanks, or it has more
      tokens than `rows`.
  """
  model = _read(folder / "tokenizer.model")
  tokens = [piece.piece for piece in model.pieces]
  kinds = [piece.type for piece in model.pieces]
  scores = [piece.score for piece in model.pieces]
  if rows is not None and len(tokens) > rows:
    raise forms.too_few(rows, len(tokens))
  added = _added_tokens(folder, config, named)
  for index, (text, special) in sorted(added.items()):
    if rows is not None and index >= rows:
      if text in needed:
        raise forms.too_few(rows, max(added) + 1)
      continue
    while len(tokens) <= index:  # unused rows
      tokens.append(f"<spare_{len(tokens)}>")
      kinds.append(forms.UNUSED)
      scores.append(0.0)
    if kinds[index] in (forms.NORMAL, _BYTE) and tokens[index] != text:
      raise ValueError(f"the added token {text!r:.40} has the id of {tokens[index]!r:.40}")
    tokens[index] = text
    kinds[index] = forms.CONTROL if special or kinds[index] == forms.CONTROL else forms.USER_DEFINED
  if len(set(tokens)) < len(tokens):
    raise ValueError("two tokens have the same text")
  # As in Hugging Face, "legacy" is true by default.
  leading_blank = model.normalizer_spec.add_dummy_prefix and config.get("add_prefix_space") is not False
  return Pieces(
    tokens, kinds, scores, ("first" if config.get("legacy") is False else "every") if leading_blank else ""
  )


def _read(path: Path) -> Any:
  # Imported here, because most folders have a tokenizer.json and do not need them.
  from google.protobuf.message import DecodeError
  from sentencepiece import sentencepiece_model_pb2

  model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # generated code
  try:
    model.ParseFromString(regular(path).read_bytes())
  except OSError as error:
    raise WeightsError(f"{path}: cannot be read ({error.strerror})") from error
  except DecodeError as error:
    raise ValueError("not a SentencePiece file") from error
  trained, normal = model.trainer_spec, model.normalizer_spec
  if not model.pieces:
    raise ValueError("not a SentencePiece file")
  if trained.model_type != _BPE or not trained.byte_fallback:
    raise ValueError("not a BPE tokenizer with byte fallback")
  if (
    normal.precompiled_charsmap
    or normal.remove_extra_whitespaces
    or not normal.escape_whitespaces
    or (trained.treat_whitespace_as_suffix)
  ):
    raise ValueError("its normaliser changes more than blanks, which is not supported")
  return model


def _added_tokens(
  folder: Path, config: Mapping[str, Any], named: Collection[str]
) -> dict[int, tuple[str, bool]]:
  """Tokens that other files add, by id: (text, whether it is a control token)."""
  path = folder / "added_tokens.json"
  if "added_tokens_decoder" in config:
    added = {index: (entry.content, entry.special) for index, entry in decoder_of(config).items()}
  else:
    given = checked(dict[str, int], read_json(path), path.name) if path.exists() else {}
    added = {index: (text, text in named) for text, index in given.items()}
  if min(added, default=0) < 0:
    raise ValueError(f"an added token has the id {min(added)}")
  return added
