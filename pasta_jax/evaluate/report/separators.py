"""Promises that are joined without a separator, in rows that were written before records counted them."""

import dataclasses
from collections.abc import Mapping

from pasta_jax.decode.trace import from_json
from pasta_jax.evaluate.report.run_record import Run
from pasta_jax.lang.positions import PositionRule
from pasta_jax.lang.program import unseparated
from pasta_jax.weights.checkpoint import load_checkpoint


def counted(run: Run) -> Run:
  """The run with `unseparated` in each row whose trace tells it.

  The outline and points of Skeleton-of-Thought are no trace of the text that they were made into.
  """
  parts = (run.responses, run.timed)
  if not any(_unknown(row) for part in parts for rows in part.values() for row in rows):
    return run
  vocabulary = load_checkpoint(run.config["model"]["source"], progress=False).vocabulary
  rule = PositionRule(run.config["positions"]["strategy"], run.config["positions"]["fixed"])

  def row_with(row: dict) -> dict:
    if not _unknown(row):
      return row
    trace = from_json(row["trace"], vocabulary, rule)
    return row | {"unseparated": unseparated(trace.program)} if trace.text == row["text"] else row

  of_all = lambda part: {name: [row_with(r) for r in rows] for name, rows in part.items()}
  return dataclasses.replace(run, responses=of_all(run.responses), timed=of_all(run.timed))


def _unknown(row: Mapping) -> bool:
  """Whether the row has chunks, no count, and a trace to count by."""
  return bool(row["promises"] and row.get("unseparated") is None and row.get("trace", {}).get("threads"))
