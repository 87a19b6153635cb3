"""One call that turns a name, a file or a folder into weights, architecture and tokenizer."""

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
from pasta_jax.weights.gguf_container import model_in, model_name
from pasta_jax.weights.gguf_file import load_gguf
from pasta_jax.weights.hf_folder import load_hf_folder
from pasta_jax.weights.run_folder import is_run, load_run
from pasta_jax.weights.tiny import tiny_model
from pasta_jax.weights.tokenizer import Tokenizer

DEFAULT_MODEL, TINY = "smollm2-135m-instruct", "tiny"


@dataclasses.dataclass
class Checkpoint:
  """A pretrained decoder on the host.

  `params` holds the names and shapes of `weights.param_shapes(config)`, float32; those of a file are read
  from it, anew each time, when they are asked for (`weights.StoredParams`). RoPE in Hugging Face's
  convention: dimension i rotates with i + H/2. `pasta` is an adapter's metadata where one was merged into the
  weights (`export`), else empty.
  """

  name: str
  config: ModelConfig
  params: Mapping[str, np.ndarray]
  tokenizer: Tokenizer
  pasta: dict[str, str] = dataclasses.field(default_factory=dict)
  source: str = ""  # what `load_checkpoint` finds it by, from any folder

  @property
  def vocabulary(self) -> Vocabulary:
    return Vocabulary(self.tokenizer, self.config.vocab_size, self.config.tag_ids)


def load_checkpoint(source: str | Path = DEFAULT_MODEL, progress: bool = True) -> Checkpoint:
  """Loads a checkpoint of one of the `families`.

  Args:
    source: one of `download.RELEASES` ("smollm2-135m-instruct", "gemma3-270m"; downloaded once), a .gguf file or
      any part of a split one, a folder with one such model, or in Hugging Face's format, or that of a training run
      (`run_folder`); or "tiny", which is made up (`tiny`).
    progress: show a bar on stderr, if that is a terminal.

  Raises:
    WeightsError: nothing usable is found there; the message is one line that says why.
  """
  if source == TINY:
    return _checkpoint(TINY, TINY, *tiny_model(), {})
  if source in RELEASES:
    name, path, again = str(source), named_weights(str(source)), str(source)
  else:
    path = Path(source).expanduser()
    name, again = model_name(path.resolve()), str(path.resolve())
  if is_run(path):
    base, config, params, pasta = load_run(path, partial(load_checkpoint, progress=progress))
    return Checkpoint(base.name, config, params, base.tokenizer, pasta, again)
  if path.is_dir() and not (path / "config.json").exists() and (gguf := model_in(path)):
    return _checkpoint(name, again, *load_gguf(gguf, progress), {})
  if path.is_dir():
    return _checkpoint(name, again, *load_hf_folder(path, progress))
  if path.is_file():
    return _checkpoint(name, again, *load_gguf(path, progress), {})
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
  """Which of the vocabulary's rows the tags take: those that the tokenizer holds for them, else rows that no
  token has; () where there are too few: the tags are then added."""
  if tokenizer.tag_ids:
    return tokenizer.tag_ids
  first = tokenizer.vocab_size
  return tuple(range(first, first + len(TAG_TEXTS))) if rows - first >= len(TAG_TEXTS) else ()
