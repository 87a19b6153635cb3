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
_LINE_BREAK = re.compile(rb"[\n\r]")
_DROPPED = re.compile(rb"[^0-9A-Za-z\x80-\xff]")
_BEFORE_LETTERS = re.compile(rb"[^A-Za-z\x80-\xff]*")


def head(text: str) -> str:
  """The head of a promise that `text` precedes: its thread's text since the last promise, sync or `<async>`. It begins
  after the last line break, and has the last MOST_WORDS words at most."""
  return " ".join(re.split(r"[\n\r]", text)[-1].split()[-MOST_WORDS:])


def normalised(head: str) -> bytes:
  """What two heads have in common that are the same: their letters and digits from the first letter on, so that
  numbers of items and marks do not count; ASCII letters in lower case. Empty: a head like no other."""
  return _normalised(head.encode("utf-8", "replace"), fresh=True)


def _normalised(raw: bytes, fresh: bool) -> bytes:
  """`fresh`: no letter came before."""
  return _DROPPED.sub(b"", _BEFORE_LETTERS.sub(b"", raw, count=1) if fresh else raw).lower()


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
    rows = np.zeros((3, len(tokens)), np.uint32)
    for i, raw in enumerate(tokens):
      last = _LINE_BREAK.split(raw)[-1]
      kept = _normalised(last, fresh=False)
      scale = pow(_BASE, len(kept), 2**32) if len(last) == len(raw) else 0
      rows[:, i] = scale, hash_of(kept), hash_of(_normalised(last, fresh=True))
    return cls(*rows)
