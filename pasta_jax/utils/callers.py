"""The two ways to have calls answered: over HTTP (`calls`), and by file (`batch`)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from pasta_jax.utils.batch import BatchCaller
from pasta_jax.utils.endpoint import BATCH, Endpoint
from pasta_jax.utils.protocols import Call


class Asks(Protocol):
  """What has calls answered: over HTTP (`calls.Caller`) or by file (`batch.BatchCaller`)."""

  paid: int  # calls answered now, as opposed to read from the file of stored answers

  def map(self, calls: Sequence[Call], on_answer: Callable[[int, dict], None]) -> None:
    """Calls `on_answer(i, answer)` for each call, in any order."""


def caller_of(endpoint: Endpoint, path: Path) -> Asks:
  """What has calls to `endpoint` answered; answers are stored in `path`."""
  if endpoint.kind == BATCH:
    return BatchCaller(endpoint, path)
  from pasta_jax.utils.calls import Caller  # here: it loads the HTTP client

  return Caller(endpoint, path)
