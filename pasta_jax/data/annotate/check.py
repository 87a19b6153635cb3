"""The second pass: chunks that their thread could not have written are given up, and missing syncs are
placed.

Each piece is judged by itself, from what its writer sees (`contexts`). A chunk that fails becomes text of the
thread that promised it. Then each text that a thread writes while chunks are unseen is judged; one that needs
them gets a sync before it. ASPD (arXiv 2508.08895) found such a check to be its data's largest gain.
"""

import re

from pasta_jax.data.annotate.contexts import Context, contexts
from pasta_jax.data.annotate.plan import useful_syncs

FEWEST_LETTERS = 16  # of a thread's own text: less is a number or a heading, which joins nothing


def of_chunks(row: dict) -> list[Context]:
  """What to ask of a plan's chunks. A chunk beside which nothing else is written needs no question."""
  return [c for c in contexts(row) if c.topic is not None and c.waiting]


def of_texts(row: dict) -> list[Context]:
  """What to ask of the threads' own texts."""
  return [
    c for c in contexts(row) if c.topic is None and len(re.findall(r"[^\W\d_]", c.text)) >= FEWEST_LETTERS
  ]


def without_chunks(row: dict, failed: set[int]) -> dict:
  """The row without some chunks (by their number in reading order), and without syncs that then join
  nothing."""
  ordered = sorted(row["chunks"], key=lambda c: (c["start"], -c["end"]))
  chunks = [c for i, c in enumerate(ordered) if i not in failed]
  return row | {"chunks": chunks, "syncs": useful_syncs(chunks, row["syncs"])}


def with_syncs(row: dict, failed: list[Context]) -> dict:
  """The row with a sync before each text that needs what it does not see; the first one of a run of them is
  enough."""
  blanks = lambda c: len(c.text) - len(c.text.lstrip())
  syncs = sorted({*row["syncs"], *(c.offset + blanks(c) for c in failed)})
  return row | {"syncs": useful_syncs(row["chunks"], syncs)}
