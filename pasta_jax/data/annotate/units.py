"""A response as numbered units: the annotator names units, so it cannot change the text.

Units are lines, and within them sentences and the heads of items. Concatenated, they are the response,
character by character.
"""

import bisect
import re

# A new unit starts after each of these: a line break with the whitespace after it, the end of a sentence, the
# head of an item.
_LINE = re.compile(r"\n\s*")
_SENTENCE = re.compile(r"[.!?…][\"'”’)\]*_]*[ \t]+(?=[\"'“‘(\[*_]*[A-Z0-9])")
_HEAD = re.compile(r"(?<=[:;])[ \t]+(?=\S)|(?<=\S)[ \t]+(?=[–—-][ \t])|\*\*:?[ \t]+")
_ABBREVIATION = re.compile(
  r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|No|e\.g|i\.e|etc|[A-Z])\.$|(?:^|\n)[ \t]*\(?\d{1,3}\.$"
)
_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)


def split(response: str) -> list[tuple[int, int]]:
  """[start, end) of each unit, in order and without gaps; whitespace belongs to the end of a unit. A code
  block is one unit."""
  code = [m.span() for m in _CODE.finditer(response)]
  cuts = {
    m.end()
    for pattern in (_LINE, _SENTENCE, _HEAD)
    for m in pattern.finditer(response)
    if not (pattern is _SENTENCE and _ABBREVIATION.search(response[max(0, m.start() - 8) : m.start() + 1]))
  }
  starts = [a for a, _ in code]
  in_code = lambda c: (n := bisect.bisect_left(starts, c)) > 0 and c < code[n - 1][1]
  cuts = {c for c in cuts if not in_code(c)} | set(starts)
  bounds = [0, *sorted(c for c in cuts if 0 < c < len(response)), len(response)]
  units: list[tuple[int, int]] = []
  for start, end in zip(bounds, bounds[1:]):
    if units and (not response[start:end].strip() or not response[units[-1][0] : units[-1][1]].strip()):
      units[-1] = units[-1][0], end  # whitespace alone is not a unit
    elif end > start:
      units.append((start, end))
  return units


def numbered(response: str) -> str:
  """The response with each unit's number before it, as "[3]"."""
  return "".join(f"[{n}]{response[start:end]}" for n, (start, end) in enumerate(split(response), 1))
