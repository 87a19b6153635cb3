"""Atomic writes: a file or folder has its old content or its new one, whenever the process is killed.

The new content is written to a temporary beside the target (same file system, the usual umask), which is then
renamed. A kill may leave the temporary; the next write of the same target replaces it.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pasta_jax.utils.json_io import to_json


def write_atomic(path: Path, content: str | bytes, *, shared: bool = False) -> None:
  """Replaces the content of `path`; text is written as UTF-8, with lone surrogates as their escapes.

  With `shared`, several processes may write the file at the same time: each uses a temporary of its own.
  """
  data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
  with atomic_path(path, shared=shared) as temporary:
    temporary.write_bytes(data)


def write_json_atomic(path: Path, value: Any, *, shared: bool = False) -> None:
  """Replaces the content of `path` with indented JSON; `shared` as in `write_atomic`."""
  write_atomic(path, to_json(value, indent=2) + "\n", shared=shared)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
  """Errors of writing name the file, as those of opening do: a full disk, for one."""
  try:
    yield
  except OSError as error:
    if error.filename is None and error.errno is not None:
      error.filename = str(path)
    raise


@contextlib.contextmanager
def atomic_path(path: Path, *, shared: bool = False) -> Iterator[Path]:
  """A path to write a file to; it replaces `path` when the block ends, or is deleted if that raises."""
  temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp" if shared else f"{path.name}.tmp")
  try:
    with naming(path):
      yield temporary
      temporary.replace(path)
  except BaseException:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    raise


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
  """An empty folder to fill; it replaces `folder` when the block ends, or is deleted if that raises.

  A folder with content cannot be replaced in one step: it is put aside first. Where a kill comes in between,
  the next call puts it back.
  """
  folder = folder.resolve()  # a link to a folder stays one
  temporary, before = (folder.with_name(folder.name + end) for end in (".tmp", ".old"))
  if before.exists() and not folder.exists():
    before.replace(folder)
  shutil.rmtree(before, ignore_errors=True)
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir(parents=True)
  try:
    yield temporary
    if folder.exists() and any(folder.iterdir()):
      folder.replace(before)
    temporary.replace(folder)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    if before.exists() and not folder.exists():
      before.replace(folder)
    raise
  shutil.rmtree(before, ignore_errors=True)
