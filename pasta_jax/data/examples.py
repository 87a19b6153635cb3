"""Annotated responses: from JSON rows to programs to laid-out examples.

A row has `prompt`, `response`, `chunks` (`start`, `end`, `topic`: character spans in order, possibly nested)
and `syncs` (character offsets; the join precedes that character). Null chunks or syncs are none. A chunk with
`"needs": "siblings"` can be written only by a thread that reads the chunks before it: it is a chunk under the
visibility `live` alone. `annotator` names who marked the chunks, if it is known. `where`, which readers add, names
file and row in messages.
"""

import collections
import dataclasses
import enum
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from pasta_jax.config.sections import ANNOTATIONS
from pasta_jax.data import structure
from pasta_jax.data.annotate.plan import useful_syncs
from pasta_jax.data.heads import with_heads
from pasta_jax.data.pipeline import parallel_map
from pasta_jax.data.separators import bounds
from pasta_jax.lang.cost import cost
from pasta_jax.lang.forms import from_config
from pasta_jax.lang.layout import Layout, layout
from pasta_jax.lang.positions import PositionRule
from pasta_jax.lang.program import Node, Program, Promise, Sync, Text, normalise, reading_order
from pasta_jax.lang.syntax import MAX_DEPTH
from pasta_jax.lang.thread import Thread
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.utils.jsonl import DataError, present, read_jsonl
from pasta_jax.utils.text import is_unicode
from pasta_jax.utils.typed import Parsed, checked


class _Chunk(Parsed):
  start: int
  end: int
  topic: str
  needs: Literal["siblings"] | None = None


class _Fields(Parsed):
  """What a row must have to become a program."""

  response: str
  chunks: list[_Chunk] = []
  syncs: list[int] = []


def row_name(row: dict) -> str:
  """A row in messages."""
  return row.get("where") or f"row {row.get('id')}"


def _fields(row: dict) -> tuple[str, list[_Chunk], list[int]]:
  """Response, chunks (outer ones before those they contain) and syncs of a row, validated. Raises
  DataError."""
  name = row_name(row)
  try:
    found = checked(_Fields, present(row), name)
  except ValueError as error:
    raise DataError(str(error)) from None
  response = found.response
  chunks = sorted(found.chunks, key=lambda c: (c.start, -c.end))
  syncs = sorted(set(found.syncs))
  if not is_unicode(response):
    raise DataError(f"{name}: the response has half of a surrogate pair: it is no text")
  around: list[_Chunk] = []
  for c in chunks:
    if not 0 <= c.start < c.end <= len(response):
      raise DataError(f"{name}: chunk {c.start}..{c.end} is not inside the response")
    if not is_unicode(c.topic):
      raise DataError(f"{name}: the topic of chunk {c.start}..{c.end} is no text")
    while around and around[-1].end <= c.start:
      around.pop()
    if around and around[-1].end < c.end:
      raise DataError(f"{name}: chunk {around[-1].start}..{around[-1].end} overlaps another without nesting")
    around.append(c)
    if len(around) >= MAX_DEPTH:
      raise DataError(f"{name}: chunks nest deeper than {MAX_DEPTH}")
  for s in syncs:
    if not 0 <= s <= len(response):
      raise DataError(f"{name}: sync {s} is not inside the response")
  return response, chunks, syncs


def annotators(rows: Iterable[dict]) -> str:
  """Who annotated the rows, by name, each once, in alphabetical order; "" if no row says so."""
  return ", ".join(sorted({name for row in rows if isinstance(name := row.get("annotator"), str) and name}))


def prompt_of(row: dict) -> str:
  """The prompt of a row. Raises DataError."""
  prompt = row.get("prompt")
  if not isinstance(prompt, str) or not is_unicode(prompt):
    raise DataError(f"{row_name(row)}: no text under prompt (--mode=build reads rows of other forms)")
  return prompt


def program_of(row: dict, visibility: str = "promise") -> Program:
  """The program that an annotated response describes, for a visibility (`lang.forms`).

  Separators and list markers between chunks are the promising thread's (`separators.bounds`), and so is a sync
  before a chunk's first character. A chunk of blanks alone is text of the thread around it. One that needs its
  siblings is, under `promise`, text of the thread around it too, after a sync that joins them. Raises DataError if
  spans overlap without nesting or leave the response.
  """
  response, chunks, syncs = _fields(row)
  if visibility == "promise" and any(c.needs for c in chunks):
    starts = [bounds(response, c.start, c.end, c.end)[0] for c in chunks if c.needs]
    chunks = [c for c in chunks if not c.needs]
    syncs = useful_syncs([c.model_dump() for c in chunks], [*syncs, *starts])
  left = collections.deque(syncs)
  nodes = _nodes(response, 0, len(response), chunks, left)
  program = normalise([*nodes, *(Sync() for _ in left)])  # one at the very end precedes no character
  assert reading_order(program) == response
  return program


def _nodes(
  text: str, at: int, stop: int, chunks: Sequence[_Chunk], syncs: collections.deque[int]
) -> list[Node]:
  """Nodes of text[at:stop], whose chunks (outer ones before those they contain) are `chunks`.

  Text is read once from left to right: syncs are removed from `syncs` as they are placed.
  """
  nodes: list[Node] = []

  def plain(until: int, last_sync: int):
    """Appends the text up to `until`, with the syncs at offsets up to `last_sync`."""
    nonlocal at
    while syncs and syncs[0] <= last_sync:
      s = syncs.popleft()
      nodes.extend((Text(text[at:s]), Sync()))
      at = s
    nodes.append(Text(text[at:until]))
    at = until

  number = 0
  while number < len(chunks):
    c = chunks[number]
    after = number + 1
    while after < len(chunks) and chunks[after].start < c.end:
      after += 1
    inner, number = chunks[number + 1 : after], after
    start, end = bounds(text, c.start, c.end, inner[0].start if inner else c.end)
    if start == end:
      continue
    plain(start, start)
    nodes.append(Promise(c.topic, None, tuple(_nodes(text, start, end, inner, syncs))))
    at = end
  plain(stop, stop - 1)
  return nodes


@dataclasses.dataclass
class Selection:
  """Examples chosen for training, and the numbers of rows left out, by cause."""

  examples: list[Layout]
  too_long: int
  too_slow: int  # with chunks, but a theoretical parallelism below `min_speedup`
  too_thin: int  # with more chunks than `max_parts`, or fewer than `min_part` tokens a chunk
  too_plain: int  # without chunks, beyond `plain_share`
  rows: list[int]  # the number of each example's row


class _Left(enum.Enum):
  """Why a row is left out."""

  TOO_LONG = 1
  TOO_SLOW = 2
  TOO_THIN = 3


def encoded(program: Program, vocabulary: Vocabulary, rule: PositionRule) -> Thread:
  """The main thread of a row's program (`program_of`), with promises in the vocabulary's form. Raises ValueError for
  a character that the vocabulary lacks."""
  return vocabulary.encode(with_heads(program) if vocabulary.promise == "head" else program, rule)


@dataclasses.dataclass(frozen=True)
class _LayOut:
  """Maps a row to (whether its plan has chunks, its layout), or to why it is left out, or to an error
  message: workers return results rather than exceptions."""

  vocabulary: Vocabulary
  rule: PositionRule
  annotation: str
  max_length: int
  min_speedup: float
  max_parts: int
  min_part: float
  visibility: str

  def __call__(self, row: dict) -> tuple[bool, Layout] | _Left | str:
    encode = lambda program: encoded(program, self.vocabulary, self.rule)
    try:
      message = {"role": "user", "content": prompt_of(row)}
      thread = encode(program_of(row, self.visibility))
      prompt = self.vocabulary.tokenizer.chat_prompt([message])
    except DataError as error:
      return str(error)
    except ValueError as error:  # a character that the vocabulary lacks
      return f"{row_name(row)}: {error}"
    fits = lambda thread: len(prompt) + thread.total_tokens <= self.max_length
    if not fits(thread):
      return _Left.TOO_LONG
    has_chunks = bool(thread.forks)
    if has_chunks and cost(thread, self.vocabulary.table).theoretical_parallelism < self.min_speedup:
      return _Left.TOO_SLOW
    if has_chunks and not self._full(chunk_lengths(thread)):
      return _Left.TOO_THIN
    if self.annotation == "structure":
      thread = encode(program_of({**row, "chunks": structure.annotate(row["response"]), "syncs": []}))
    if self.annotation == "none" or not fits(thread):
      thread = encode((Text(row["response"]),))
    return has_chunks, layout(thread, self.rule, self.vocabulary.table, prompt)

  def _full(self, chunks: Sequence[int]) -> bool:
    """Whether there are few chunks, and they are worth a thread of their own."""
    few = not self.max_parts or len(chunks) <= self.max_parts
    return few and sum(chunks) >= self.min_part * len(chunks)


def chunk_lengths(thread: Thread) -> list[int]:
  """Tokens of all chunks below a thread, each with those inside it, tags included."""
  return [n for f in thread.forks for n in (f.child.total_tokens, *chunk_lengths(f.child))]


def examples(
  rows: Sequence[dict],
  vocabulary: Vocabulary,
  rule: PositionRule,
  *,
  annotation: str,
  max_length: int,
  min_speedup: float = 0.0,
  max_parts: int = 0,
  min_part: float = 0.0,
  plain_share: float = 1.0,
  workers: int = 0,
  visibility: str = "promise",
) -> Selection:
  """Lays out rows for training.

  Args:
    annotation: the chunks to use: those of the row ("plan"), those of its form ("structure",
      `data.structure`), or none ("none").
    max_length: longest example, in tokens.
    min_speedup: smallest theoretical parallelism of a row with chunks.
    max_parts: largest number of chunks; 0: no limit.
    min_part: smallest mean number of tokens of a row's chunks.
    plain_share: largest share of rows without chunks; the last ones beyond it are left out.
    workers: processes that share the work, a few milliseconds a row; 0: this one.
    visibility: for which rows may have other chunks (`program_of`).

  Rows are selected by their plans whatever the `annotation`, so Baseline-SFT ("none") and APAR ("structure")
  train on the same rows; a row whose structure exceeds `max_length` is laid out without chunks. Raises
  DataError for the first unusable row.
  """
  if annotation not in ANNOTATIONS:
    raise DataError(f"annotation must be one of {', '.join(ANNOTATIONS)}, not {annotation!r}")
  chunked: list[tuple[int, Layout]] = []
  plain: list[tuple[int, Layout]] = []
  left_out = collections.Counter[_Left]()
  lay_out = _LayOut(vocabulary, rule, annotation, max_length, min_speedup, max_parts, min_part, visibility)
  for number, found in enumerate(parallel_map(lay_out, rows, workers)):
    if isinstance(found, str):
      raise DataError(found)
    if isinstance(found, _Left):
      left_out[found] += 1
    else:
      has_chunks, laid = found
      (chunked if has_chunks else plain).append((number, laid))
  room = len(plain) if plain_share >= 1 else int(len(chunked) * plain_share / (1 - plain_share))
  kept = chunked + plain[:room]
  too_plain = len(plain) + len(chunked) - len(kept)
  return Selection(
    [laid for _, laid in kept],
    left_out[_Left.TOO_LONG],
    left_out[_Left.TOO_SLOW],
    left_out[_Left.TOO_THIN],
    too_plain,
    [number for number, _ in kept],
  )


def of_training(config, rows: Sequence[dict], vocabulary: Vocabulary, *, all_rows: bool = False) -> Selection:
  """`examples` of `config.train`, in the form that `config` teaches; with `all_rows` also those that it would leave
  out as slow or plain, as for validation."""
  c, form = config.train, from_config(config)
  names = () if all_rows else ("min_speedup", "max_parts", "min_part", "plain_share")
  return examples(
    rows,
    vocabulary.speaking(form),
    form.positions,
    annotation=c.annotation,
    max_length=c.length,
    workers=c.workers,
    visibility=form.visibility,
    **{name: getattr(c, name) for name in names},
  )


def read_annotated(path: str) -> list[dict]:
  """The rows of a file of annotated responses, with `where`, and with `chunks` and `syncs` in each.

  Raises DataError if a row has no prompt, or no response that its chunks and syncs fit.
  """
  rows = [row | {key: row.get(key) or [] for key in ("chunks", "syncs")} for row in _located(path)]
  for row in rows:
    prompt_of(row)
    program_of(row)
  return rows


def mix(files: Sequence[str]) -> list[dict]:
  """Rows of several files, with `where`: ["a.jsonl*2", "b.jsonl.gz"] has the rows of the first file twice.

  A folder is a data set of `data.build`: its split "train", or another as "folder:validation". Raises
  DataError.
  """
  rows: list[dict] = []
  for entry in files:
    times = None if Path(entry).exists() else re.search(r"\*([0-9]{1,4})$", entry)
    path = entry[: times.start()] if times else entry
    if "*" in entry and not (Path(path).exists() or _built(path)):
      raise DataError(f"data: {entry!r} is not of the form FILE or FILE*TIMES, with a file that exists")
    rows += _located(path) * int(times[1] if times else 1)
  return rows


def _built(path: str) -> tuple[Path, str] | None:
  """(folder, split) of a data set; None for a file."""
  folder, colon, split = path.rpartition(":")
  if Path(path).is_dir():
    return Path(path), "train"
  return (Path(folder), split) if colon and Path(folder).is_dir() else None


def _located(path: str) -> list[dict]:
  """The rows of a file, or of a split of a data set, with `where`."""
  if built := _built(path):
    from pasta_jax.data import dataset  # here: importing TFDS takes a second

    found = dataset.read(*built)
  else:
    found = read_jsonl(path)
  for number, row in enumerate(found, 1):
    name = row.get("id")
    row["where"] = f"{path}, row {number if name is None else name}"
  return found
