"""The tag automaton: what each token means, in one table for the interpreter on the device and for Python.

Every token sequence has a meaning. A thread is in one of a few states, at first TEXT; a token's class and the
state give the next state, the action, and whether the token is ill-formed there. Each form of a promise
(`lang.forms`) has its table: with a topic,

  state   | ordinary  digits   OPEN   MIDDLE  CLOSE  ASYNC   END      SYNC    EOS
  TEXT    | text      text     TOPIC  !       !      !       end (1)  join    end (2)
  TOPIC   | topic     topic    !      NUMBER  fork   !       ! end    ! join  ! end
  NUMBER  | !         number   !      !       fork   !       ! end    ! join  ! end

and with a head, which is text before OPEN: HEAD says that there is some since the last promise, sync or `<async>`.

  state   | ordinary  digits   OPEN      MIDDLE  CLOSE  ASYNC   END      SYNC    EOS
  TEXT    | HEAD      HEAD     ! NUMBER  !       !      !       end (1)  join    end (2)
  HEAD    | text      text     NUMBER    !       !      !       end (1)  join    end (2)
  NUMBER  | !         number   !         !       fork   !       ! end    ! join  ! end

With lengths that are one token each, LENGTH, such a token closes a promise with a topic; behind a head it is the
whole promise. OPEN behind a head, MIDDLE, CLOSE and the state NUMBER have no use then:

  state   | LENGTH with topics   LENGTH with heads
  TEXT    | !                    ! fork
  TOPIC   | fork
  HEAD    |                      fork

Promises and syncs lead back to TEXT. `!` is ill-formed: the token is written to the pool and otherwise ignored
(an OPEN or LENGTH without a head is carried out); END, SYNC and EOS inside a promise abandon it and act as usual.
(1) In the main thread END is ill-formed: it abandons a promise, but does not end the thread. (2) In a chunk EOS is
ill-formed and ends the chunk as END does. A fork without a number is ill-formed too, except under strategies without
numbers (`PositionRule.gap` says what it reserves).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from pasta_jax.config.sections import NUMBER_FORMS, PROMISE_FORMS

# Token classes.
ORDINARY, DIGITS, OPEN, MIDDLE, CLOSE, ASYNC, END, SYNC, EOS, LENGTH = range(10)
N_CLASSES = 10
# States of a thread.
TEXT, TOPIC, NUMBER, HEAD = range(4)
N_STATES = 4
# What a token does.
NOTHING, FORK, JOIN, FINISH = range(4)
MAX_DECLARED = 999  # a larger number is absurd: ill-formed, and read as this
LENGTHS = tuple(range(10, 641, 10))  # what the LENGTH tokens say


def inside(state):
  """Whether a thread in this state is writing a promise. Integers or arrays."""
  return (state == TOPIC) | (state == NUMBER)


@dataclasses.dataclass(frozen=True, eq=False)
class Automaton:
  """The table of one form of promises; each array is [N_STATES, N_CLASSES]."""

  promise: str
  number: str
  next_state: np.ndarray  # int32
  action: np.ndarray  # int32
  ill_formed: np.ndarray  # bool

  @classmethod
  def build(cls, promise: str, number: str) -> "Automaton":
    state = np.tile(np.arange(N_STATES, dtype=np.int32)[:, None], (1, N_CLASSES))
    action = np.full((N_STATES, N_CLASSES), NOTHING, np.int32)
    ill = np.ones((N_STATES, N_CLASSES), bool)
    texts = [TEXT, HEAD]
    state[:, SYNC] = TEXT
    state[np.ix_([TOPIC, NUMBER], [END, EOS])] = TEXT
    action[:, SYNC] = JOIN
    action[:, [END, EOS]] = FINISH
    ill[np.ix_(texts, [ORDINARY, DIGITS, END, SYNC, EOS])] = False
    ill[TOPIC, [ORDINARY, DIGITS]] = False
    # Where a promise opens, with what, and where it ends.
    opening, closing = (LENGTH if promise == "head" and number == "token" else OPEN), CLOSE
    ends = [TOPIC, NUMBER]
    if number == "token":
      closing, ends = LENGTH, texts if promise == "head" else [TOPIC]
    else:
      state[TOPIC, MIDDLE], ill[TOPIC, MIDDLE] = NUMBER, False
      ill[NUMBER, DIGITS] = False
    ill[texts, opening] = False
    if promise == "topic":
      state[TEXT, OPEN] = TOPIC
    else:
      state[TEXT, [ORDINARY, DIGITS]] = HEAD
      state[texts, opening] = NUMBER
      ill[TEXT, opening] = True
    state[ends, closing], action[ends, closing] = TEXT, FORK
    ill[[s for s in ends if s not in texts], closing] = False
    return cls(promise, number, state, action, ill)


# By the forms of promise and number.
AUTOMATA = {(p, n): Automaton.build(p, n) for p in PROMISE_FORMS for n in NUMBER_FORMS}


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
  automaton: Automaton
  lengths: np.ndarray  # [64] int32, the ids of LENGTHS; [0] where numbers are digits
  classes: np.ndarray  # [V] int32
  value: np.ndarray  # [V] int32
  scale: np.ndarray  # [V] int32, 1 where the token has no digits

  @classmethod
  def build(
    cls,
    vocab_size: int,
    tags: Tags,
    digits: dict[int, tuple[int, int]],
    promise: str = "topic",
    lengths: Sequence[int] = (),
  ) -> "TokenTable":
    """`digits` maps a token id to (value, 10 ** number of digits), `lengths` are the ids of LENGTHS where each is
    one token. Tokens are ordinary unless named."""
    classes = np.full(vocab_size, ORDINARY, np.int32)
    value, scale = np.zeros(vocab_size, np.int32), np.ones(vocab_size, np.int32)
    for token, (v, s) in digits.items():
      # Values past the cap are all absurd alike; capping keeps `append_digits` inside 32 bits.
      classes[token], value[token], scale[token] = DIGITS, min(v, MAX_DECLARED + 1), min(s, 100_000)
    for token, c in zip(tags.ids, (OPEN, MIDDLE, CLOSE, ASYNC, END, SYNC)):
      classes[token] = c
    classes[list(tags.eos)] = EOS
    ids = np.asarray(lengths, np.int32)
    classes[ids], value[ids], scale[ids] = LENGTH, LENGTHS[: len(ids)], 1
    return cls(tags, AUTOMATA[promise, "token" if lengths else "digits"], ids, classes, value, scale)


def append_digits(number, value, scale):
  """The number read so far with one more digit token, kept within MAX_DECLARED + 1.

  Works on Python integers and on arrays; `number` is -1 before the first digit. The cap keeps every
  intermediate product inside 32 bits for tokens of up to five digits.
  """
  so_far = number * (number > 0)
  longer = so_far * scale + value
  over = longer > MAX_DECLARED
  return longer * (1 - over) + (MAX_DECLARED + 1) * over
