"""Runs that stop before they are done, and that the same command continues."""

import contextlib
from collections.abc import Iterator

WAITING = 4  # exit code of a run that waits; no launcher restarts it


class Stopped(Exception):
  """SIGTERM was received, and what is finished is kept; the same command continues from there."""


class Waiting(Exception):
  """A run waits until something outside has been done, such as the answers to a file of requests (`batch`). The
  message, one line, says for what, and what to do."""


class Together:
  """Lets the other parts of a work go on where one waits: `with together.part(): …` for each, then `together.end()`."""

  def __init__(self) -> None:
    self._waiting: dict[str, None] = {}  # messages, each once

  @contextlib.contextmanager
  def part(self) -> Iterator[None]:
    try:
      yield
    except Waiting as stop:
      self._waiting[str(stop)] = None

  def end(self) -> None:
    """Raises Waiting if any part did."""
    if self._waiting:
      raise Waiting("; ".join(self._waiting))
