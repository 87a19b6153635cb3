"""Text that comes from elsewhere, made fit to be shown: in a terminal, in a message of one line.

Files keep a text as it is. A terminal obeys control characters (it moves, clears, asks, sets titles), so
nothing reaches one unescaped.
"""

import re

MESSAGE_LENGTH = 400  # characters; an error message is one line that can be read at a glance

# Control characters but tab and line break, what reorders or hides text, and lone surrogates.
_UNSAFE = re.compile(
  "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def is_unicode(text: str) -> bool:
  """Whether a text can be encoded; JSON's escapes can write halves of surrogate pairs, which cannot."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def printable(text: str) -> str:
  """`text` with everything escaped that a terminal would obey; tabs and line breaks stay."""
  return _UNSAFE.sub(_escaped, text.replace("\r\n", "\n"))


def message_of(error: BaseException) -> str:
  """What a user reads of an error: of a file that cannot be used, its name and why."""
  if isinstance(error, OSError) and error.filename and error.strerror:
    return f"{error.filename}: {error.strerror}"
  return str(error)


def one_line(text: str, limit: int = MESSAGE_LENGTH) -> str:
  """`text` on one line of at most `limit` characters: blanks are merged, control characters escaped, and the
  middle of a longer one is left out."""
  line = printable(" ".join(text.split()))
  kept = (limit - 3) // 2
  return line if len(line) <= limit else f"{line[:kept]} … {line[-kept:]}"


def _escaped(match: re.Match[str]) -> str:
  code = ord(match[0])
  return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
