"""Answers of models: stored in a file before they are used, whichever way they came."""

from pathlib import Path

from pasta_jax.utils import protocols
from pasta_jax.utils.records import Records


class Answers:
  """Answers (`protocols.read_answer`) by the identity of their call, in the rows of a file."""

  def __init__(self, path: Path):
    self._records = Records(path, {})
    found = ((key, protocols.stored_answer(row)) for key, row in self._records.rows.items())
    self.by_key = {
      key: {name: value for name, value in answer.items() if name != "id"}
      for key, answer in found
      if answer is not None
    }

  def add(self, key: str, answer: dict) -> None:
    self._records.add({"id": key, **answer})
    self.by_key[key] = answer
