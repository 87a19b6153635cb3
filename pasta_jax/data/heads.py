"""Programs with topics as programs with heads: the promising thread writes the head of each part as text.

    <promise topic="light"/><async>1. **Lighting**: switch to LED lamps</async>
    1. **Lighting**:<promise/><async> switch to LED lamps</async>

Topics are ignored. The head is, after the blanks and the marker of a list with which a chunk begins,

  - a bold text or the beginning of a line up to its colon or dash, of at most 12 words,
  - a line of its own of at most 8 words, such as a heading,
  - else the first four words, or fewer up to a comma or the end of a sentence.

In scripts without blanks between words it goes up to the first of 、，,：: or has 8 characters. Blanks between a head
and its chunk are the chunk's, those after a chunk the promising thread's. A head ends at the latest where a chunk
inside or a sync begins. A chunk of which too little would be left is none: its text is the promising thread's.
"""

import re
import unicodedata
from collections.abc import Sequence

from pasta_jax.lang.program import Node, Program, Promise, Text, normalise, reading_order

LEAST_REST, LEAST_REST_UNSPACED = 25, 12  # characters that a chunk keeps, blanks at its ends apart
_MOST_WORDS, _MOST_WORDS_OF_A_LINE, _FIRST_WORDS, _FIRST_CHARACTERS = 12, 8, 4, 8

_MARKER = re.compile(r"\s*(?:(?:[-*+•‣◦·–—]|\(?(?:\d{1,3}|[A-Za-z])[.)])[ \t]+)*")
_BOLD = re.compile(r"(\*\*|__)(?=\S)(?:(?!\1)[^\n])*\1(?:[ \t]*[:：]|[ \t]+[-–—](?=[ \t]))?")
_UP_TO_COLON = re.compile(r"[^\n:：.!?]*?(?:[:：](?:\*\*|__)?(?=\s)|[ \t][-–—](?=[ \t]))")
_LEADING_VOWEL = re.compile("[\u0e40-\u0e44\u0ec0-\u0ec4]")  # Thai and Lao: it belongs to the letter after
_WORD = re.compile(r"\s*\S+")
_UP_TO_MARK = re.compile(r"[^、，,：:\n]*[、，,：:]")
_LETTER = re.compile(r"[^\W_]")
# Thai, Lao, Burmese, Khmer, Japanese, Chinese.
_UNSPACED = re.compile(
  r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


def with_heads(program: Sequence[Node]) -> Program:
  """The program in the form `head`, for the same reader: the reading order does not change."""
  out: list[Node] = []
  for node in program:
    out += _part(node) if isinstance(node, Promise) else (node,)
  return normalise(out)


def _part(promise: Promise) -> list[Node]:
  """A promise with its head before it; or the nodes of its chunk, for the promising thread."""
  body = list(with_heads(promise.body))
  beginning = promise.body[0].text if promise.body and isinstance(promise.body[0], Text) else ""
  if len(promise.body) == 1:
    beginning = beginning.rstrip()  # nothing stands below its last line
  end = head_end(beginning)
  rest = reading_order(promise.body)[end:].strip()
  if not end or len(rest) < (LEAST_REST_UNSPACED if _is_unspaced(beginning) else LEAST_REST):
    return body
  first, last = body[0], body[-1]
  assert isinstance(first, Text)  # what `beginning` is of
  after = ""
  if isinstance(last, Text):
    kept = max(len(last.text.rstrip()), end if last is first else 0)
    after = last.text[kept:]
    body[-1] = Text(last.text[:kept])
  assert isinstance(body[0], Text)
  body[0] = Text(body[0].text[end:])
  return [Text(first.text[:end]), Promise(None, promise.tokens, normalise(body)), Text(after)]


def head_end(text: str) -> int:
  """The length of the head with which `text` begins, blanks and marker of a list included; 0 if there is none."""
  found = _MARKER.match(text)
  start = found.end() if found else 0
  for rule in (_titled, _line, _unspaced, _first_words):
    end = rule(text, start)
    if end and _LETTER.search(text, start, end):
      return end
  return 0


def _words(text: str) -> int:
  return len(text.split())


def _titled(text: str, start: int) -> int:
  """The end of a bold or plain head with its colon or dash."""
  for pattern in (_BOLD, _UP_TO_COLON):
    found = pattern.match(text, start)
    if found and _words(found[0]) <= _MOST_WORDS and not _too_long(found[0]):
      return found.end()
  return 0


def _too_long(head: str) -> bool:
  """Whether a head without blanks between its words is rather a sentence."""
  return _is_unspaced(head) and len(head) > 2 * _MOST_WORDS


def _line(text: str, start: int) -> int:
  """The end of a short line of its own."""
  end = text.find("\n", start)
  line = text[start : max(end, start)].rstrip()
  return start + len(line) if _words(line) <= _MOST_WORDS_OF_A_LINE and not _too_long(line) else 0


def _unspaced(text: str, start: int) -> int:
  """The end of a head in a script without blanks between words."""
  if not _is_unspaced(text[start:]):
    return 0
  found = _UP_TO_MARK.match(text, start, start + _FIRST_CHARACTERS)
  if found:
    return found.end()
  marks = [unicodedata.category(c).startswith("M") for c in text[start:]]  # they belong to the letter before
  letters = [start + i for i, mark in enumerate(marks) if not mark]
  end = letters[_FIRST_CHARACTERS] if len(letters) > _FIRST_CHARACTERS else len(text)
  return end - 1 if _LEADING_VOWEL.match(text[end - 1]) else end


def _first_words(text: str, start: int) -> int:
  """The end of the first words of the first line that has letters, or of fewer up to a comma or the end of a sentence,
  which has two words at least."""
  end, words = start, 0
  while words < _FIRST_WORDS and (found := _WORD.match(text, end)):
    if words and _LETTER.search(text, start, end) and "\n" in found[0]:
      break
    end, words = found.end(), words + 1
    if found[0].endswith((",", "，")) or words > 1 and found[0].endswith((".", "!", "?")):
      break
  return end


def _is_unspaced(text: str) -> bool:
  """Whether the first letter is of a script that has no blanks between words."""
  letter = re.search(r"[^\W\d_]", text)
  return bool(letter and _UNSPACED.match(letter[0]))
