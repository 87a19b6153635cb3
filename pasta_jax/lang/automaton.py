"""The tag automaton: what each token means, in one table for the interpreter on the device and for Python.

Every token sequence has a meaning. A thread is in one of three states; a token's class and the state give
the next state, the action, and whether the token is ill-formed there.

  state   | ordinary  digits   OPEN   MIDDLE  CLOSE  ASYNC   END      SYNC    EOS
  TEXT    | text      text     TOPIC  !       !      !       end (1)  join    end (2)
  TOPIC   | topic     topic    !      NUMBER  fork   !       ! end    ! join  ! end
  NUMBER  | !         number   !      !       fork   !       ! end    ! join  ! end

`!` is ill-formed: the token is written to the pool and otherwise ignored; END, SYNC and EOS inside a promise
abandon it and act as usual. (1) In the main thread END is ill-formed: it abandons a promise, but does not end
the thread. (2) In a chunk EOS is ill-formed and ends the chunk as END does. A fork without a number is
ill-formed too, except under strategies without numbers (`PositionRule.gap` says what it reserves).
"""

import dataclasses

import numpy as np

# Token classes.
ORDINARY, DIGITS, OPEN, MIDDLE, CLOSE, ASYNC, END, SYNC, EOS = range(9)
N_CLASSES = 9
# States of a thread.
TEXT, TOPIC, NUMBER = range(3)
# What a token does.
NOTHING, FORK, JOIN, FINISH = range(4)
MAX_DECLARED = 999  # a larger number is absurd: ill-formed, and read as this


def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  state = np.tile(np.arange(3, dtype=np.int32)[:, None], (1, N_CLASSES))
  action = np.full((3, N_CLASSES), NOTHING, np.int32)
  ill = np.ones((3, N_CLASSES), bool)
  state[TEXT, OPEN], state[TOPIC, MIDDLE] = TOPIC, NUMBER
  state[:, [CLOSE, END, SYNC, EOS]] = TEXT
  action[[TOPIC, NUMBER], CLOSE] = FORK
  action[:, SYNC] = JOIN
  action[:, [END, EOS]] = FINISH
  ill[TEXT, [ORDINARY, DIGITS, OPEN, END, SYNC, EOS]] = False
  ill[TOPIC, [ORDINARY, DIGITS, MIDDLE, CLOSE]] = False
  ill[NUMBER, [DIGITS, CLOSE]] = False
  return state, action, ill


NEXT_STATE, ACTION, ILL_FORMED = _tables()  # each [3, N_CLASSES]

# What a guarded decoder may write. `decode.guard` adds whether END and EOS fit the thread and whether a
# number has digits.
WELL_FORMED = ~ILL_FORMED


@dataclasses.dataclass(frozen=True)
class Tags:
  """Ids of the tags' special tokens, and of the tokens that end a response."""

  open: int
  middle: int
  close: int
  async_: int
  end: int
  sync: int
  eos: tuple[int, ...]  # the first one is written in training data

  @property
  def ids(self) -> tuple[int, int, int, int, int, int]:
    """The six tag ids, in the order of `syntax.TAG_TEXTS`."""
    return (self.open, self.middle, self.close, self.async_, self.end, self.sync)


@dataclasses.dataclass(frozen=True, eq=False)
class TokenTable:
  """Per token id: its class, and value and scale where it consists of digits ("42" -> 42, 100)."""

  tags: Tags
  classes: np.ndarray  # [V] int32
  value: np.ndarray  # [V] int32
  scale: np.ndarray  # [V] int32, 1 where the token has no digits

  @classmethod
  def build(cls, vocab_size: int, tags: Tags, digits: dict[int, tuple[int, int]]) -> "TokenTable":
    """`digits` maps a token id to (value, 10 ** number of digits). Tokens are ordinary unless named."""
    classes = np.full(vocab_size, ORDINARY, np.int32)
    value, scale = np.zeros(vocab_size, np.int32), np.ones(vocab_size, np.int32)
    for token, (v, s) in digits.items():
      # Values past the cap are all absurd alike; capping keeps `append_digits` inside 32 bits.
      classes[token], value[token], scale[token] = DIGITS, min(v, MAX_DECLARED + 1), min(s, 100_000)
    for token, c in zip(tags.ids, (OPEN, MIDDLE, CLOSE, ASYNC, END, SYNC)):
      classes[token] = c
    classes[list(tags.eos)] = EOS
    return cls(tags, classes, value, scale)


def append_digits(number, value, scale):
  """The number read so far with one more digit token, kept within MAX_DECLARED + 1.

  Works on Python integers and on arrays; `number` is -1 before the first digit. The cap keeps every
  intermediate product inside 32 bits for tokens of up to five digits.
  """
  so_far = number * (number > 0)
  longer = so_far * scale + value
  over = longer > MAX_DECLARED
  return longer * (1 - over) + (MAX_DECLARED + 1) * over
