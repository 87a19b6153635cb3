"""The head of a promise in the form `head`: the text before it that says what its part is about.

`head` is what views, records and figures show. Two heads are the same if `normalised` is. The guard compares them on
the device, where text comes token by token: it keeps a hash of the bytes that `normalised` leaves of the thread's
text since its last boundary (`TokenHashes`), however the text is cut into tokens. There a head has no most words.
"""

import re
from typing import Any, NamedTuple

import numpy as np

MOST_WORDS = 12

_BASE = 1_000_003  # of the hash, a polynomial over bytes modulo 2 ** 32
_DIGITS = b"0123456789"
_LOWER = bytes(range(256)).lower()
_DROPPED = bytes(b for b in range(128) if not chr(b).isalnum())


def head(text: str) -> str:
  """The head of a promise that `text` precedes: its thread's text since the last promise, sync or `<async>`. It begins
  after the last line break, and has the last MOST_WORDS words at most."""
  return " ".join(re.split(r"[\n\r]", text)[-1].split()[-MOST_WORDS:])


def normalised(head: str) -> bytes:
  """What two heads have in common that are the same: their letters and digits from the first letter on, so that
  numbers of items and marks do not count; ASCII letters in lower case. Empty: a head like no other."""
  return _kept(head.encode("utf-8", "replace")).lstrip(_DIGITS)


def _kept(raw: bytes) -> bytes:
  return raw.translate(_LOWER, _DROPPED)


def hash_of(kept: bytes) -> int:
  """The hash of what `normalised` keeps; 0 of nothing."""
  value = 0
  for byte in kept:
    value = (value * _BASE + byte + 1) % 2**32
  return value


class TokenHashes(NamedTuple):
  """What a token does to the hash h of a head: it becomes h · scale + value, or `fresh` if h or the scale is 0. Each
  is [V] uint32, of NumPy or on the device."""

  scale: Any  # 0: it has a line break, and the head begins after it
  value: Any
  fresh: Any

  @classmethod
  def of(cls, tokens: list[bytes]) -> "TokenHashes":
    """Of the bytes of each token."""
    rows = []
    for raw in tokens:
      last = raw.replace(b"\r", b"\n").rpartition(b"\n")[2]
      kept = _kept(last)
      fresh = kept.lstrip(_DIGITS)
      value = hash_of(kept)
      scale = pow(_BASE, len(kept), 2**32) if len(last) == len(raw) else 0
      rows.append((scale, value, value if fresh == kept else hash_of(fresh)))
    return cls(*np.array(rows, np.uint32).T)
