"""Loads a model from a name, a file or a folder: architecture, parameters and tokenizer."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from pasta_jax.lang.syntax import TAG_TEXTS
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.model.config import ModelConfig
from pasta_jax.weights.arrays import WeightsError
from pasta_jax.weights.download import RELEASES, named_weights
from pasta_jax.weights.hf_folder import load_hf_folder
from pasta_jax.weights.run_folder import is_run, load_run
from pasta_jax.weights.tiny import tiny_model
from pasta_jax.weights.tokenizer import Tokenizer

DEFAULT_MODEL, TINY = "smollm2-135m-instruct", "tiny"


@dataclasses.dataclass
class Checkpoint:
  """A pretrained model on the host.

  `params` has the names and shapes of `arrays.param_shapes(config)`, in float32. Parameters of a file are
  read from it on each access (`arrays.StoredParams`). RoPE follows Hugging Face's convention: dimension i is
  rotated with dimension i + H/2. `pasta` is the metadata of the adapter that was merged into the weights
  (`export`), or empty.
  """

  name: str
  config: ModelConfig
  params: Mapping[str, np.ndarray]
  tokenizer: Tokenizer
  pasta: dict[str, str] = dataclasses.field(default_factory=dict)
  source: str = ""  # argument of `load_checkpoint` that loads it again, from any working directory

  @property
  def vocabulary(self) -> Vocabulary:
    return Vocabulary(self.tokenizer, self.config.vocab_size, self.config.tag_ids)


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
    return Checkpoint(base.name, config, params, base.tokenizer, pasta, again)
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


def _checkpoint(
  name: str,
  source: str,
  config: ModelConfig,
  params: Mapping[str, np.ndarray],
  tokenizer: Tokenizer,
  pasta: dict[str, str],
) -> Checkpoint:
  config = dataclasses.replace(config, tag_ids=tag_rows_for(tokenizer, config.vocab_size))
  return Checkpoint(name, config, params, tokenizer, pasta, source)


def tag_rows_for(tokenizer: Tokenizer, rows: int) -> tuple[int, ...]:
  """Vocabulary rows of the tags: the tokenizer's own or reserved entries, otherwise unused embedding rows; ()
  if there are too few, which means additional rows."""
  if tokenizer.tag_ids:
    return tokenizer.tag_ids
  first = tokenizer.vocab_size
  return tuple(range(first, first + len(TAG_TEXTS))) if rows - first >= len(TAG_TEXTS) else ()
