"""Annotation by form alone: sections, list items and paragraphs become chunks. No model, no sync.

These are the rules of APAR (Liu et al. 2024, arXiv 2401.06761) in PASTA's terms: the promising thread writes
the head of an item (a heading, the words before a colon, the first sentence of a paragraph), and the rest of
the item is a chunk. Sections may contain lists, which makes a tree of threads. It is the APAR baseline, and a
substitute if no annotating model is available. Unlike a model, it does not recognise items that depend on
each other and places no sync.
"""

import re
from collections.abc import Iterator

_UNFIT = re.compile(
  r"```|\$\$|\\\[|^[^\S\n]*\||^---|https?://", re.MULTILINE
)  # code, mathematics, tables, links
_MARKER = re.compile(r"(?P<indent>[ \t]*)(?:\(?\d{1,3}[.)]|[-*•+])[ \t]+(?=\S)")
_HEAD = re.compile(r"\*\*[^*\n]{2,60}\*\*[:.]?(?: [-–—])?(?=\s|$)|[^:.!?\n]{2,60}?(?::| [-–—])(?=\s)")
_HEADING = re.compile(r"#{1,6} +(?P<a>\S.*)|\*\*(?P<b>[^*\n]+)\*\*:?|(?P<c>[A-Z][^.!?:\n]{2,60}):")
_SENTENCE = re.compile(r"(?<!\bMr)(?<!\bMs)(?<!\bDr)(?<!\bMrs)(?<!\be\.g)(?<!\bi\.e)[.!?](?=\s+\S)")
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_FILLERS = frozenset(
  "a an and are as at be by for from in into is it its of on or so that the their them these this those to "
  "was with you your".split()
)
TOPIC_WORDS = 3


def annotate(response: str, *, fewest: int = 3, shortest: int = 24) -> list[dict]:
  """Chunks of a response: `start`, `end` and `topic`, outer ones before those they contain; [] if its form
  has none.

  A response needs at least `fewest` sibling chunks (two are enough for sections), each of at least `shortest`
  characters; shorter items stay with the promising thread. Responses with code, formulae, tables or links get
  no chunks.
  """
  if _UNFIT.search(response):
    return []
  sections = [
    c for start, end, topic in _sections(response) if (c := _chunk(response, start, end, topic, shortest))
  ]
  if len(sections) >= 2:
    lists = [list(_lists(response, c["start"], c["end"], shortest)) for c in sections]
    return [
      c
      for section, inner in zip(sections, lists)
      for c in (section, *(inner if len(inner) >= fewest else ()))
    ]
  for rule in (_lists, _paragraphs):
    chunks = list(rule(response, 0, len(response), shortest))
    if len(chunks) >= fewest:
      return chunks
  return []


def _chunk(text: str, start: int, end: int, topic: str, shortest: int) -> dict | None:
  """The chunk of text[start:end] without whitespace at its end; None if it is too short or has no topic."""
  end = start + len(text[start:end].rstrip())
  words = _WORD.findall(topic)
  words = [w for w in words if w.lower() not in _FILLERS][:TOPIC_WORDS] or words[:TOPIC_WORDS]
  if not words or len(text[start:end].strip()) < shortest:
    return None
  return {"start": start, "end": end, "topic": " ".join(words)}


def _lines(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
  """Bounds of each line of text[start:end], without its line break."""
  while start < end:
    stop = text.find("\n", start, end)
    stop = end if stop < 0 else stop
    yield start, stop
    start = stop + 1


def _sections(text: str) -> Iterator[tuple[int, int, str]]:
  """(start, end, heading) of the body of each section, which follows the line of its heading."""
  heads = [(a, b, m) for a, b in _lines(text, 0, len(text)) if (m := _HEADING.fullmatch(text[a:b].rstrip()))]
  for (_, stop, match), following in zip(heads, [*(a for a, _, _ in heads[1:]), len(text)]):
    yield stop, following, next(filter(None, match.group("a", "b", "c")))


def _lists(text: str, start: int, end: int, shortest: int) -> Iterator[dict]:
  """A chunk for each item of the lists in text[start:end]: what follows its head, otherwise its marker.

  Items that are indented further than the first one belong to the item above. An item ends before the next
  one, or at a blank line that is followed by text without indentation.
  """
  items: list[list[int]] = []  # (after the marker, end)
  margin: int | None = None
  blank, inside = False, False  # after a blank line; in an item
  for a, b in _lines(text, start, end):
    marker = _MARKER.match(text, a, b)
    depth = len(marker["indent"]) if marker else 0
    margin = depth if marker and margin is None else margin
    if marker and depth <= (margin or 0):
      items.append([marker.end(), b])
      blank, inside = False, True
    elif not text[a:b].strip():
      blank = True
    elif inside and blank and not text[a].isspace():
      inside = False
    elif inside:
      items[-1][1] = b
  for a, b in items:
    line_end = text.find("\n", a, b)
    head = _HEAD.match(text, a, b if line_end < 0 else line_end)
    rest = head.end() if head and text[head.end() : b].strip() else a
    if chunk := _chunk(text, rest, b, text[a : head.end()] if head else text[a:b], shortest):
      yield chunk


def _paragraphs(text: str, start: int, end: int, shortest: int) -> Iterator[dict]:
  """A chunk for each paragraph of several sentences: what follows its first one."""
  for match in re.compile(r"\S.*?(?=\n\s*\n|\Z)", re.DOTALL).finditer(text, start, end):
    sentence = _SENTENCE.search(text, match.start(), match.end())
    if sentence and (
      chunk := _chunk(text, sentence.end(), match.end(), text[match.start() : sentence.end()], shortest)
    ):
      yield chunk
