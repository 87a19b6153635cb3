"""Annotated responses: from JSON rows to programs to laid-out examples.

A row has `prompt`, `response`, `chunks` (`start`, `end`, `topic`: character spans in order, possibly nested)
and `syncs` (character offsets; the join precedes that character).
"""

import dataclasses
import enum
import re
from collections.abc import Sequence
from pathlib import Path

from pasta_jax.config.sections import ANNOTATIONS
from pasta_jax.data import structure
from pasta_jax.data.pipeline import parallel_map
from pasta_jax.lang.cost import cost
from pasta_jax.lang.layout import Layout, layout
from pasta_jax.lang.positions import PositionRule
from pasta_jax.lang.program import Node, Program, Promise, Sync, Text, normalise, reading_order
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.utils.jsonl import DataError, read_jsonl

_NUMBER = re.compile(r"\s*(?:\*\*|#{1,6} )?\(?\d{1,3}[.)]")


def _fields(row: dict) -> tuple[str, list[dict], list[int]]:
  """Response, chunks (outer ones before those they contain) and syncs of a row, validated. Raises
  DataError."""
  name, response = row.get("id"), row.get("response")
  if not isinstance(response, str):
    raise DataError(f"row {name}: no response")
  try:
    chunks = sorted(row.get("chunks", ()), key=lambda c: (c["start"], -c["end"]))
    syncs = sorted(set(row.get("syncs", ())))
    for c in chunks:
      if not 0 <= c["start"] < c["end"] <= len(response):
        raise DataError(f"row {name}: chunk {c['start']}..{c['end']} is not inside the response")
      if not isinstance(c["topic"], str):
        raise DataError(f"row {name}: chunk {c['start']}..{c['end']} has no topic")
    for s in syncs:
      if not 0 <= s <= len(response):
        raise DataError(f"row {name}: sync {s} is not inside the response")
  except (KeyError, TypeError) as error:
    raise DataError(f"row {name}: chunks need start, end and topic, syncs are offsets ({error!r})") from None
  return response, chunks, syncs


def program_of(row: dict) -> Program:
  """The program that an annotated response describes.

  A separator belongs to a thread that can know it. Whitespace at the end of a chunk moves to what follows:
  the start of the next chunk, or the promising thread. The number of a numbered item, with the whitespace
  before it, moves to the promising thread, which counts the items; other markers stay in the chunk. A sync at
  the first character of a chunk belongs to the promising thread. Raises DataError if spans overlap without
  nesting or leave the response.
  """
  response, chunks, syncs = _fields(row)
  nodes = _nodes(response, 0, len(response), chunks, syncs, row.get("id"))
  program = normalise([*nodes, *(Sync() for _ in syncs)])  # one at the very end precedes no character
  assert reading_order(program) == response
  return program


def _nodes(text: str, at: int, stop: int, chunks: Sequence[dict], syncs: list[int], name) -> list[Node]:
  """Nodes of text[at:stop], whose chunks (outer ones before those they contain) are `chunks`.

  Text is read once from left to right: syncs are removed from `syncs` as they are placed.
  """
  nodes: list[Node] = []

  def plain(until: int, last_sync: int):
    """Appends the text up to `until`, with the syncs at offsets up to `last_sync`."""
    nonlocal at
    while syncs and syncs[0] <= last_sync:
      s = syncs.pop(0)
      nodes.extend((Text(text[at:s]), Sync()))
      at = s
    nodes.append(Text(text[at:until]))
    at = until

  last_end = -1
  while chunks:
    c = chunks[0]
    inner = [d for d in chunks[1:] if d["start"] < c["end"]]
    if any(d["end"] > c["end"] for d in inner):
      raise DataError(f"row {name}: chunk {c['start']}..{c['end']} overlaps another without nesting")
    chunks = chunks[1 + len(inner) :]
    start = at if c["start"] == last_end and not (syncs and syncs[0] <= c["start"]) else c["start"]
    number = _NUMBER.match(text, start, c["end"])
    if number and text[number.end() : c["end"]].strip():
      start = number.end()
    if inner:
      start = min(start, inner[0]["start"])
    plain(start, start)
    content_end = c["start"] + len(text[c["start"] : c["end"]].rstrip())
    content_end = max([content_end, start, *(d["end"] for d in inner)])
    nodes.append(Promise(c["topic"], None, tuple(_nodes(text, start, content_end, inner, syncs, name))))
    at, last_end = content_end, c["end"]
  plain(stop, stop - 1)
  return nodes


@dataclasses.dataclass
class Selection:
  """Examples chosen for training, and the numbers of rows left out, by cause."""

  examples: list[Layout]
  too_long: int
  too_slow: int  # with chunks, but a theoretical parallelism below `min_speedup`
  too_plain: int  # without chunks, beyond `plain_share`


class _Left(enum.Enum):
  """Why a row is left out."""

  TOO_LONG = 1
  TOO_SLOW = 2


@dataclasses.dataclass(frozen=True)
class _LayOut:
  """Maps a row to (whether its plan has chunks, its layout), or to why it is left out, or to an error
  message: workers return results rather than exceptions."""

  vocabulary: Vocabulary
  rule: PositionRule
  annotation: str
  max_length: int
  min_speedup: float

  def __call__(self, row: dict) -> tuple[bool, Layout] | _Left | str:
    encode = lambda program: self.vocabulary.encode(program, self.rule)
    try:
      thread = encode(program_of(row))
      prompt = self.vocabulary.tokenizer.chat_prompt([{"role": "user", "content": row["prompt"]}])
    except DataError as error:
      return str(error)
    except (ValueError, KeyError) as error:  # a character that the vocabulary lacks; no prompt in the row
      return f"row {row.get('id')}: {error}"
    fits = lambda thread: len(prompt) + thread.total_tokens <= self.max_length
    if not fits(thread):
      return _Left.TOO_LONG
    has_chunks = bool(thread.forks)
    if has_chunks and cost(thread, self.vocabulary.table).theoretical_parallelism < self.min_speedup:
      return _Left.TOO_SLOW
    if self.annotation == "structure":
      thread = encode(program_of({**row, "chunks": structure.annotate(row["response"]), "syncs": []}))
    if self.annotation == "none" or not fits(thread):
      thread = encode((Text(row["response"]),))
    return has_chunks, layout(thread, self.rule, self.vocabulary.table, prompt)


def examples(
  rows: Sequence[dict],
  vocabulary: Vocabulary,
  rule: PositionRule,
  *,
  annotation: str,
  max_length: int,
  min_speedup: float = 0.0,
  plain_share: float = 1.0,
  workers: int = 0,
) -> Selection:
  """Lays out rows for training.

  Args:
    annotation: the chunks to use: those of the row ("plan"), those of its form ("structure",
      `data.structure`), or none ("none").
    max_length: longest example, in tokens.
    min_speedup: smallest theoretical parallelism of a row with chunks.
    plain_share: largest share of rows without chunks; the last ones beyond it are left out.
    workers: processes that share the work, a few milliseconds a row; 0: this one.

  Rows are selected by their plans whatever the `annotation`, so Baseline-SFT ("none") and APAR ("structure")
  train on the same rows; a row whose structure exceeds `max_length` is laid out without chunks. Raises
  DataError for the first unusable row.
  """
  if annotation not in ANNOTATIONS:
    raise DataError(f"annotation must be one of {', '.join(ANNOTATIONS)}, not {annotation!r}")
  chunked: list[Layout] = []
  plain: list[Layout] = []
  too_long = too_slow = 0
  lay_out = _LayOut(vocabulary, rule, annotation, max_length, min_speedup)
  for found in parallel_map(lay_out, rows, workers):
    if isinstance(found, str):
      raise DataError(found)
    too_long += found is _Left.TOO_LONG
    too_slow += found is _Left.TOO_SLOW
    if isinstance(found, tuple):
      has_chunks, laid = found
      (chunked if has_chunks else plain).append(laid)
  room = len(plain) if plain_share >= 1 else int(len(chunked) * plain_share / (1 - plain_share))
  return Selection(chunked + plain[:room], too_long, too_slow, max(len(plain) - room, 0))


def mix(files: Sequence[str]) -> list[dict]:
  """Rows of several files: ["a.jsonl*2", "b.jsonl.gz"] has the rows of the first file twice.

  A folder is a data set of `data.build`: its split "train", or another as "folder:validation". Raises
  DataError.
  """
  rows: list[dict] = []
  for entry in files:
    path, star, times = entry.partition("*")
    if star and not re.fullmatch("[0-9]+", times):
      raise DataError(f"data: {entry!r} is not of the form FILE or FILE*TIMES")
    folder, colon, split = path.rpartition(":")
    if Path(path).is_dir() or colon and Path(folder).is_dir():
      from pasta_jax.data import dataset  # here: importing TFDS takes a second

      found = dataset.read(Path(path)) if Path(path).is_dir() else dataset.read(Path(folder), split)
    else:
      found = read_jsonl(path)
    rows += found * int(times or 1)
  return rows
