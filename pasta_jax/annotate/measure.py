"""How much an annotation gains, and how far it agrees with another one of the same responses."""

import contextlib
import math
from collections.abc import Sequence

from pasta_jax.data.examples import DataError, program_of
from pasta_jax.lang.cost import cost
from pasta_jax.lang.layout import PositionRule
from pasta_jax.lang.vocabulary import Vocabulary


def figures(rows: Sequence[dict], vocabulary: Vocabulary) -> dict[str, float]:
  """Of annotated rows: how many, the share with chunks and with a sync, chunks each, the share of their text in chunks,
  and theoretical speedups, geometric means over the rows that the vocabulary can express; all but the first two and
  `speedup_of_all` are of rows with chunks."""
  rule = PositionRule("pred_10x")
  chunked = [r for r in rows if r["chunks"]]
  logs: dict[str, float] = {}
  for r in rows:
    with contextlib.suppress(ValueError):  # a character that the vocabulary lacks
      logs[r["id"]] = math.log(cost(vocabulary.encode(program_of(r), rule), vocabulary.table).theoretical_speedup)
  mean = lambda values: sum(values) / len(values) if values else math.nan
  outer = lambda r: [c for c in r["chunks"] if not any(
    d is not c and d["start"] <= c["start"] and c["end"] <= d["end"] for d in r["chunks"])]
  return {
    "rows": len(rows),
    "with_chunks": len(chunked) / max(len(rows), 1),
    "with_syncs": mean([bool(r["syncs"]) for r in chunked]),
    "chunks": mean([len(r["chunks"]) for r in chunked]),
    "covered": mean([sum(c["end"] - c["start"] for c in outer(r)) / len(r["response"]) for r in chunked]),
    "speedup": math.exp(mean([logs[r["id"]] for r in chunked if r["id"] in logs])),
    "speedup_of_all": math.exp(mean(list(logs.values()))),
  }


def boundaries(row: dict) -> set[tuple[str, int]]:
  """Where chunks begin and end, whatever blanks are counted to either side."""
  text = row["response"]
  at = lambda offset: offset + len(text[offset:]) - len(text[offset:].lstrip())
  return {(row["id"], at(offset)) for c in row["chunks"] for offset in (c["start"], c["end"])}


def agreement(rows: Sequence[dict], other: Sequence[dict]) -> dict[str, float]:
  """Precision and recall of the boundaries of `rows` against those of `other`, over the responses that both have; and
  in how many of these both agree on whether there are chunks at all. Raises DataError if they share no response."""
  known = {(r["prompt"], r["response"]): r for r in other}
  pairs = [(r, known[key]) for r in rows if (key := (r["prompt"], r["response"])) in known]
  if not pairs:
    raise DataError("the two annotations have no response in common")
  ours = set().union(*(boundaries(r) for r, _ in pairs))
  theirs = set().union(*(boundaries(o | {"id": r["id"]}) for r, o in pairs))
  both = len(ours & theirs)
  return {"responses": len(pairs), "precision": both / len(ours) if ours else math.nan,
          "recall": both / len(theirs) if theirs else math.nan,
          "same_choice": sum(bool(r["chunks"]) == bool(o["chunks"]) for r, o in pairs) / len(pairs)}
