"""Loads a model from a name, a file or a folder: architecture, parameters and tokenizer."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from pasta_jax.lang.automaton import LENGTHS
from pasta_jax.lang.forms import Forms, from_metadata
from pasta_jax.lang.syntax import TAG_TEXTS
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.model.config import ModelConfig
from pasta_jax.weights.arrays import WeightsError
from pasta_jax.weights.download import RELEASES, named_weights
from pasta_jax.weights.hf_folder import folder_metadata, load_hf_folder
from pasta_jax.weights.run_folder import is_run, load_run, run_metadata
from pasta_jax.weights.tiny import tiny_model
from pasta_jax.weights.tokenizer import Tokenizer

DEFAULT_MODEL, TINY = "smollm2-135m-instruct", "tiny"


@dataclasses.dataclass
class Checkpoint:
  """A pretrained model on the host.

  `params` has the names and shapes of `arrays.param_shapes(config)`, in float32. Parameters of a file are
  read from it on each access (`arrays.StoredParams`). RoPE follows Hugging Face's convention: dimension i is
  rotated with dimension i + H/2. `pasta` is the metadata of the adapter that was merged into the weights
  (`export`), or empty. `form` is that of its vocabulary's promises, whose rows are `config.tag_ids` (`speaking`).
  """

  name: str
  config: ModelConfig
  params: Mapping[str, np.ndarray]
  tokenizer: Tokenizer
  pasta: dict[str, str] = dataclasses.field(default_factory=dict)
  source: str = ""  # argument of `load_checkpoint` that loads it again, from any working directory
  form: Forms = Forms()

  @property
  def vocabulary(self) -> Vocabulary:
    n, size, ids = len(TAG_TEXTS), self.config.vocab_size, self.config.tag_ids
    lengths = ids[n:] or _length_rows(self.tokenizer, size, ids)
    return Vocabulary(self.tokenizer, size, ids[:n], self.form.promise, self.form.number, lengths)

  def speaking(self, form: Forms) -> "Checkpoint":
    """The same model with the vocabulary rows of another form's promises; the parameters are not touched."""
    vocabulary = self.vocabulary.speaking(form)
    tags, lengths = vocabulary.tag_ids[: len(TAG_TEXTS)], vocabulary.tag_ids[len(TAG_TEXTS) :]
    # Without lengths, () may go on standing for additional rows.
    ids = (*tags, *lengths) if lengths else self.config.tag_ids[: len(TAG_TEXTS)]
    config = dataclasses.replace(self.config, tag_ids=ids)
    return dataclasses.replace(self, config=config, form=form, tokenizer=self.tokenizer.keeping_out(lengths))


def load_checkpoint(source: str | Path = DEFAULT_MODEL, progress: bool = True) -> Checkpoint:
  """Loads a model of one of `model.families`.

  Args:
    source: a key of `download.RELEASES` ("smollm2-135m-instruct", "gemma3-270m"; downloaded once); a .gguf
      file, or any part of a split one; a folder that has one GGUF model, or is in Hugging Face's format, or is a
      training run (`run_folder`); or "tiny", a made-up model (`tiny`).
    progress: show a bar on stderr, if that is a terminal.

  Raises:
    WeightsError: there is no usable model; the message is one line that gives the reason.
  """
  if source == TINY:
    return _checkpoint(TINY, TINY, *tiny_model(), {})
  if source in RELEASES:
    path, again = named_weights(str(source)), str(source)
  else:
    path = Path(source).expanduser()
    again = str(path.resolve())
  if is_run(path):
    base, config, params, pasta = load_run(path, partial(load_checkpoint, progress=progress))
    return _checkpoint(base.name, again, config, params, base.tokenizer, pasta)
  if path.is_dir() and ((path / "config.json").exists() or not any(path.glob("*.gguf"))):
    return _checkpoint(path.resolve().name, again, *load_hf_folder(path, progress))
  if path.exists():
    # Imported here, because the gguf package is slow to import and only its files need it.
    from pasta_jax.weights.gguf_container import model_in, model_name
    from pasta_jax.weights.gguf_file import load_gguf

    name = str(source) if source in RELEASES else model_name(path.resolve())
    if file := path if path.is_file() else model_in(path):
      return _checkpoint(name, again, *load_gguf(file, progress), {})
  raise WeightsError(
    f"{source}: neither a GGUF file, nor the folder of a model or a training run, nor one of "
    f"{', '.join(RELEASES)}"
  )


def metadata_of(source: str | Path) -> dict[str, str]:
  """`Checkpoint.pasta` of a source, without its weights. Raises WeightsError, one line, if it is damaged."""
  path = Path(source).expanduser()
  if source in (TINY, *RELEASES) or not path.is_dir():
    return {}
  return run_metadata(path) if is_run(path) else folder_metadata(path)


def _checkpoint(
  name: str,
  source: str,
  config: ModelConfig,
  params: Mapping[str, np.ndarray],
  tokenizer: Tokenizer,
  pasta: dict[str, str],
) -> Checkpoint:
  """The checkpoint in the form of its metadata. `config.tag_ids` stay where they are known."""
  ids = config.tag_ids or tag_rows_for(tokenizer, config.vocab_size)
  config = dataclasses.replace(config, tag_ids=ids)
  made = Checkpoint(name, config, params, tokenizer, pasta, source)
  return made.speaking(from_metadata(pasta)) if pasta else made


def tag_rows_for(tokenizer: Tokenizer, rows: int) -> tuple[int, ...]:
  """Vocabulary rows of the tags: the tokenizer's own or reserved entries, otherwise unused embedding rows; ()
  if there are too few, which means additional rows."""
  if tokenizer.tag_ids:
    return tokenizer.tag_ids
  return _unused(tokenizer.vocab_size, len(TAG_TEXTS), rows)


def _length_rows(tokenizer: Tokenizer, rows: int, tags: tuple[int, ...]) -> tuple[int, ...]:
  """The same of the 64 lengths, beside those of the tags."""
  return tokenizer.length_ids or _unused(
    max([tokenizer.vocab_size, *(i + 1 for i in tags)]), len(LENGTHS), rows
  )


def _unused(first: int, count: int, rows: int) -> tuple[int, ...]:
  """`count` embedding rows from `first` on; () if there are too few of `rows`."""
  return tuple(range(first, first + count)) if rows - first >= count else ()
