"""Agreement of two annotations of the same responses."""

import math
from collections.abc import Sequence

from pasta_jax.data.separators import skip_separator
from pasta_jax.utils.jsonl import DataError


def boundaries(row: dict) -> set[tuple[str, int]]:
  """Where chunks start and end, whichever side blanks and a list marker at a boundary belong to."""
  return {
    (row["id"], skip_separator(row["response"], offset))
    for c in row["chunks"]
    for offset in (c["start"], c["end"])
  }


def agreement(rows: Sequence[dict], other: Sequence[dict]) -> dict[str, float]:
  """Precision and recall of the boundaries of `rows` against those of `other`, over the shared responses, and
  the share of these in which both have chunks or neither has. Raises DataError if they share no response."""
  known = {(r["prompt"], r["response"]): r for r in other}
  pairs = [(r, known[key]) for r in rows if (key := (r["prompt"], r["response"])) in known]
  if not pairs:
    raise DataError("the two annotations have no response in common")
  ours = set().union(*(boundaries(r) for r, _ in pairs))
  theirs = set().union(*(boundaries(o | {"id": r["id"]}) for r, o in pairs))
  both = len(ours & theirs)
  return {
    "responses": len(pairs),
    "precision": both / len(ours) if ours else math.nan,
    "recall": both / len(theirs) if theirs else math.nan,
    "same_choice": sum(bool(r["chunks"]) == bool(o["chunks"]) for r, o in pairs) / len(pairs),
  }
