"""SentencePiece's tokenizer.model, with the tokens that the files beside it add."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pasta_jax.weights import tokenizer_forms as forms
from pasta_jax.weights.arrays import WeightsError, read_json

_BPE = 2  # of the kinds of models that SentencePiece trains


class Pieces(NamedTuple):
  """A vocabulary by id, and where conversations have blanks before their texts
  (`tokenizer_forms.PREFIXES`)."""

  tokens: list[str]
  kinds: list[int]
  scores: list[float]
  prefix: str


def read_pieces(
  folder: Path, config: Mapping[str, Any], named: Collection[str], needed: Collection[str], rows: int | None
) -> Pieces:
  """The vocabulary of a folder's tokenizer.model, and of `added_tokens_decoder` in its tokenizer_config.json
  (`config`) or its added_tokens.json.

  Args:
    named: texts of tokens that have names, and are control tokens.
    needed: those that begin and end texts.
    rows: how many embeddings there are. Added tokens beyond them are left out.

  Raises:
    WeightsError: the file cannot be read.
    ValueError: it is no BPE with tokens for bytes, changes more of a text than its blanks, or has more tokens than
      there are rows.
  """
  model = _read(folder / "tokenizer.model")
  tokens = [piece.piece for piece in model.pieces]
  kinds = [piece.type for piece in model.pieces]
  scores = [piece.score for piece in model.pieces]
  if rows is not None and len(tokens) > rows:
    raise forms.too_few(rows, len(tokens))
  further = _further(folder, config, named)
  for index, (text, special) in sorted(further.items()):
    if rows is not None and index >= rows:
      if text in needed:
        raise forms.too_few(rows, max(further) + 1)
      continue
    while len(tokens) <= index:  # rows that no token has
      tokens.append(f"<spare_{len(tokens)}>")
      kinds.append(forms.UNUSED)
      scores.append(0.0)
    tokens[index] = text
    kinds[index] = forms.CONTROL if special or kinds[index] == forms.CONTROL else forms.USER_DEFINED
  if len(set(tokens)) < len(tokens):
    raise ValueError("two tokens have the same text")
  # As with Hugging Face: files that do not say are legacy.
  before = model.normalizer_spec.add_dummy_prefix and config.get("add_prefix_space") is not False
  return Pieces(
    tokens, kinds, scores, ("first" if config.get("legacy") is False else "every") if before else ""
  )


def _read(path: Path) -> Any:
  # Here, as few need them: most folders have a tokenizer.json.
  from google.protobuf.message import DecodeError
  from sentencepiece import sentencepiece_model_pb2

  model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # generated code
  try:
    model.ParseFromString(path.read_bytes())
  except OSError as error:
    raise WeightsError(f"{path}: cannot be read ({error.strerror})") from error
  except DecodeError as error:
    raise ValueError("not one of SentencePiece's files") from error
  trained, normal = model.trainer_spec, model.normalizer_spec
  if not model.pieces:
    raise ValueError("not one of SentencePiece's files")
  if trained.model_type != _BPE or not trained.byte_fallback:
    raise ValueError("not a BPE tokenizer of pieces with bytes to fall back on")
  if (
    normal.precompiled_charsmap
    or normal.remove_extra_whitespaces
    or not normal.escape_whitespaces
    or (trained.treat_whitespace_as_suffix)
  ):
    raise ValueError("its normaliser changes more of a text than its blanks, which is not supported")
  return model


def _further(folder: Path, config: Mapping[str, Any], named: Collection[str]) -> dict[int, tuple[str, bool]]:
  """Tokens that stand beside the file, by id: (text, whether it is a control token)."""
  if "added_tokens_decoder" in config:
    entries = config["added_tokens_decoder"].items()
    return {int(index): (entry["content"], bool(entry.get("special"))) for index, entry in entries}
  beside = folder / "added_tokens.json"
  entries = read_json(beside).items() if beside.exists() else ()
  return {int(index): (text, text in named) for text, index in entries}
