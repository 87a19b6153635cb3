"""Runs a mode in a process that is killed at a chosen moment: before the n-th time that it opens a file for
writing, renames, makes, cuts or removes one below a folder. So every step of writing can be interrupted, and the
same one each time.

Processes are forks of a server that has imported the modes and has not used JAX.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pasta_jax.config import Config, with_changes

FAILED = 17  # exit code of a mode that ended with an error of one line
_CONTEXT = multiprocessing.get_context("forkserver")
_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def prepare() -> None:
  """Starts the server; later calls do nothing."""
  _CONTEXT.set_forkserver_preload([
    "helpers.kills",
    "pasta_jax.data.build",
    "pasta_jax.data.annotate.run",
    "pasta_jax.decode.command",
    "pasta_jax.evaluate.run",
    "pasta_jax.preference.rounds",
    "pasta_jax.weights.export",
  ])  # fmt: skip


def run(
  mode: Callable, changes: Mapping[str, Any], *paths: Path, folder: Path, at: int = 0
) -> tuple[int, int]:
  """(exit code, or FAILED; writes below `folder`) of `mode(config, *paths)`, killed before write number `at`; 0: never.

  `mode` is a function of this module, `changes` are those of the default config.
  """
  prepare()
  writes = _CONTEXT.Value("i", 0)
  process = _CONTEXT.Process(target=_child, args=(mode, dict(changes), paths, folder, at, writes))
  process.start()
  process.join()
  assert process.exitcode is not None
  return process.exitcode, writes.value


def _child(mode: Callable, changes: dict, paths: tuple[Path, ...], folder: Path, at: int, writes) -> None:
  below = str(folder) + os.sep

  def hook(event: str, arguments: tuple) -> None:
    if event == "open":
      counts = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    else:
      counts = event in _EVENTS
    if counts and isinstance(arguments[0], str | os.PathLike) and os.fspath(arguments[0]).startswith(below):
      writes.value += 1
      if writes.value == at:
        os.kill(os.getpid(), signal.SIGKILL)

  sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
  sys.addaudithook(hook)
  try:
    mode(with_changes(Config(), changes), *paths)
  except (ValueError, OSError) as error:
    sys.exit(FAILED if "\n" not in str(error) else 1)


# --- modes ---


def build(config: Config, workdir: Path) -> None:
  from pasta_jax.data.build import build
  from pasta_jax.weights.checkpoint import load_checkpoint

  build(config, workdir, load_checkpoint(config.model.source).vocabulary, [])


def export(config: Config, workdir: Path) -> None:
  from pasta_jax.weights.checkpoint import load_checkpoint
  from pasta_jax.weights.export import export

  checkpoint = load_checkpoint(config.model.source)
  adapter = Path(config.model.adapter) if config.model.adapter else None
  export(workdir, checkpoint, adapter, form=config.export.form, dtype=config.export.dtype)


def annotate(config: Config, workdir: Path) -> None:
  from pasta_jax.data.annotate.run import annotate

  annotate(config, workdir)


def decode(config: Config, prompts: Path, output: Path) -> None:
  from pasta_jax.decode.command import decode_file

  decode_file(config, str(prompts), str(output))


def evaluate(config: Config, workdir: Path) -> None:
  from pasta_jax.evaluate.run import evaluate

  evaluate(config, workdir)


def preference(config: Config, workdir: Path) -> None:
  from pasta_jax.preference.rounds import optimise

  optimise(config, workdir)
