"""The check of a plan: it removes chunks that depend on what their thread does not see, and adds missing
syncs.

A model judges each piece separately, from what its writer sees (`contexts`) under the visibility `promise`, the
strictest. It judges a chunk that fails once more, as one whose writer reads the parts before it: if it passes, it
is kept with the mark `"needs": "siblings"`, for `live` alone. Otherwise it becomes text of the thread that promised
it. Then it judges each text that a thread writes while it does not see some of
its chunks; a text that needs them gets a sync before it. In ASPD (arXiv 2508.08895) such a check improved the
data most.
"""

import re
from collections.abc import Collection

from pasta_jax.data.annotate.contexts import Context, contexts
from pasta_jax.data.annotate.plan import useful_syncs

FEWEST_LETTERS = 16  # in a text; fewer are a number or a heading, which needs no sync


def of_chunks(row: dict) -> list[Context]:
  """The chunks to check: those whose writer does not see all of the text before them."""
  return [c for c in contexts(row) if c.topic is not None and c.waiting]


def of_texts(row: dict) -> list[Context]:
  """The texts to check: those that are written while chunks of the same thread are unseen."""
  return [
    c for c in contexts(row) if c.topic is None and len(re.findall(r"[^\W\d_]", c.text)) >= FEWEST_LETTERS
  ]


def without_chunks(row: dict, failed: Collection[int], needy: Collection[int] = ()) -> dict:
  """The row without the chunks `failed` (numbered in reading order), and without syncs that then join nothing;
  the chunks `needy` have the mark that they need their siblings."""
  ordered = sorted(row["chunks"], key=lambda c: (c["start"], -c["end"]))
  marked = lambda i, c: c | {"needs": "siblings"} if i in needy else c
  chunks = [marked(i, c) for i, c in enumerate(ordered) if i not in failed]
  return row | {"chunks": chunks, "syncs": useful_syncs(chunks, row["syncs"])}


def with_syncs(row: dict, failed: list[Context]) -> dict:
  """The row with a sync before each text that needs unseen chunks; syncs that join nothing more are
  dropped."""
  blanks = lambda c: len(c.text) - len(c.text.lstrip())
  syncs = sorted({*row["syncs"], *(c.offset + blanks(c) for c in failed)})
  return row | {"syncs": useful_syncs(row["chunks"], syncs)}
