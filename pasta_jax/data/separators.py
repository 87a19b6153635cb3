"""Where a chunk begins and ends: blanks, line breaks, list markers and numbers between the parts of a response
belong to the thread that promises the parts, which sees all of them before it.

A chunk begins with its first visible character behind its marker and ends with its last one. So the promising
thread decides how a list looks, and no thread has to know how its neighbour ended.
"""

import re

_RULE = r"(?:[-*][ \t]*){3,}$"  # a line across the page, such as "* * *"
_BULLET = rf"(?!{_RULE})[-*+•‣⁃◦▪▫●○■□·–—](?:[ \t]+\[[ xX]\])?(?=\s)"
_ENUMERATOR = r"(?:[a-zA-Z]|[ivxIVX]{2,5})"
_NUMBER = (
  r"(?P<bold>\*\*)?(?:#{{1,6}} )?"
  r"(?:\(?(?:\d{{1,3}}|{enumerator})\)|(?:\d{{1,3}}(?:\.\d{{1,3}})*{or_letter})\.)"
  r"(?(bold)(?:\*\*)?)(?=\s|(?:\*\*)?[^\x00-\x7f])"  # scripts without blanks have none here either
)
_IDEOGRAPHS = "[一二三四五六七八九十]{1,3}"
_WIDE = rf"(?:\d{{1,3}}|{_IDEOGRAPHS})、|（(?:\d{{1,3}}|{_IDEOGRAPHS})）|\d{{1,3}}．|[①-⑳・]"

# At the start of a line. Within a line "A." is rather part of a name, and "三、" of a sentence.
_ITEM = re.compile(
  rf"{_BULLET}|{_NUMBER.format(enumerator=_ENUMERATOR, or_letter=f'|{_ENUMERATOR}')}|{_WIDE}", re.MULTILINE
)
_INLINE = re.compile(rf"{_BULLET}|{_NUMBER.format(enumerator=_ENUMERATOR, or_letter='')}", re.MULTILINE)
_BLANKS = re.compile(r"\s*")


def skip_blanks(text: str, at: int, stop: int | None = None) -> int:
  """The offset of the first visible character of text[at:stop], or `stop`."""
  found = _BLANKS.match(text, at, len(text) if stop is None else stop)
  return found.end() if found else at


def skip_separator(text: str, at: int) -> int:
  """The offset of the first visible character from `at` on that does not belong to a list marker."""
  at = skip_blanks(text, at)
  marker = _marker(text, at)
  return skip_blanks(text, marker.end()) if marker else at


def bounds(text: str, start: int, end: int, inside: int) -> tuple[int, int]:
  """[start, end) of the chunk that an annotation places at text[start:end]; the same offset twice if nothing of
  it is visible.

  A marker stays in the chunk if a chunk inside it begins with that marker (`inside` is where the first one
  begins, `end` if there is none): it is that one's. So does a marker with nothing behind it.
  """
  first, end = skip_blanks(text, start, end), start + len(text[start:end].rstrip())
  if first >= end:
    return end, end
  marker = _marker(text, first)
  behind = skip_blanks(text, marker.end(), end) if marker else first
  whole = behind >= end or skip_blanks(text, inside, end) < behind
  return first if whole else behind, end


def _marker(text: str, at: int) -> re.Match[str] | None:
  """The list marker at a visible character."""
  begins_line = skip_blanks(text, text.rfind("\n", 0, at) + 1) >= at
  return (_ITEM if begins_line else _INLINE).match(text, at)
