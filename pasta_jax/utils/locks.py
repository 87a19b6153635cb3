"""One process at a time writes in a folder: a lock that ends with its process, however that ends.

    with locked(workdir / LOCK): …

The operating system holds the lock (`flock`), so that of a killed process is gone, and its file is only a
note of who holds it. Readers take none. Between hosts it works as far as the shared file system passes locks
on: NFS does; gcsfuse does not, and there a note that a process of another host left is answered with a warning.
"""

import contextlib
import datetime
import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from pasta_jax.utils.json_io import parse_json, to_json

LOCK = "run.lock"  # in the folder of a run


class LockedError(ValueError):
  """Another process writes there; the message is one line that names it."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
  """Holds the lock of the file `path`, whose folder is made if need be, until the block ends.

  Raises:
    LockedError: another process holds it; names its host, number and start.
    OSError: the file cannot be written.
  """
  is_new = not path.parent.exists()
  path.parent.mkdir(parents=True, exist_ok=True)
  descriptor = _open_locked(path)
  try:
    note = {"host": socket.gethostname(), "process": os.getpid(), "start": _now(), "command": _command()}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (to_json(note) + "\n").encode(), 0)
    yield
  finally:
    path.unlink(missing_ok=True)  # while it is locked: a process that waits for it then opens a new file
    os.close(descriptor)
    if is_new:  # nothing was written
      with contextlib.suppress(OSError):
        path.parent.rmdir()


def _open_locked(path: Path) -> int:
  """The descriptor of the file, locked."""
  while True:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      note = os.pread(descriptor, 4096, 0)
      if _is_at(descriptor, path):  # not the file of a process that has just removed it
        _warn_of_another_host(path, note)
        return descriptor
      os.close(descriptor)
    except OSError as error:
      note = os.pread(descriptor, 4096, 0)
      os.close(descriptor)
      if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
        raise LockedError(
          f"{path.parent} is in use by {_described(note)}: wait for it, stop it, or choose another folder"
        ) from None
      raise OSError(error.errno, f"{path}: cannot be locked ({error.strerror})") from None


def _is_at(descriptor: int, path: Path) -> bool:
  try:
    return os.path.samestat(os.fstat(descriptor), os.stat(path))
  except FileNotFoundError:
    return False


def _read(note: bytes) -> dict:
  try:
    found = parse_json(note)
    return found if isinstance(found, dict) else {}
  except ValueError:  # a file that is being written, or another one
    return {}


def _described(note: bytes) -> str:
  found = _read(note)
  if not found:
    return "another process"
  return (
    f"process {found.get('process')} on {found.get('host')}, started {found.get('start')} "
    f"({found.get('command')})"
  )


def _warn_of_another_host(path: Path, note: bytes) -> None:
  found = _read(note)
  if found and found.get("host") != socket.gethostname():
    print(
      f"{path.parent} was last written by {_described(note)}, which did not end by itself; if it still runs, stop it",
      file=sys.stderr,
    )


def _now() -> str:
  return datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")


def _command() -> str:
  return " ".join([Path(sys.argv[0]).name, *(a for a in sys.argv[1:] if a.startswith("--mode"))])
