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

Promises and syncs lead back to TEXT. `!` is ill-formed: the token is written to the pool and otherwise ignored
(an OPEN without a head is carried out); END, SYNC and EOS inside a promise abandon it and act as usual. (1) In the
main thread END is ill-formed: it abandons a promise, but does not end the thread. (2) In a chunk EOS is ill-formed
and ends the chunk as END does. A fork without a number is ill-formed too, except under strategies without numbers
(`PositionRule.gap` says what it reserves).
"""

import dataclasses

import numpy as np

from pasta_jax.config.sections import PROMISE_FORMS

# Token classes.
ORDINARY, DIGITS, OPEN, MIDDLE, CLOSE, ASYNC, END, SYNC, EOS = range(9)
N_CLASSES = 9
# States of a thread.
TEXT, TOPIC, NUMBER, HEAD = range(4)
N_STATES = 4
# What a token does.
NOTHING, FORK, JOIN, FINISH = range(4)
MAX_DECLARED = 999  # a larger number is absurd: ill-formed, and read as this


def inside(state):
  """Whether a thread in this state is writing a promise. Integers or arrays."""
  return (state == TOPIC) | (state == NUMBER)


@dataclasses.dataclass(frozen=True, eq=False)
class Automaton:
  """The table of one form of promises; each array is [N_STATES, N_CLASSES]."""

  next_state: np.ndarray  # int32
  action: np.ndarray  # int32
  ill_formed: np.ndarray  # bool

  @classmethod
  def build(cls, promise: str) -> "Automaton":
    state = np.tile(np.arange(N_STATES, dtype=np.int32)[:, None], (1, N_CLASSES))
    action = np.full((N_STATES, N_CLASSES), NOTHING, np.int32)
    ill = np.ones((N_STATES, N_CLASSES), bool)
    texts = [TEXT, HEAD]
    state[:, SYNC] = TEXT
    state[np.ix_([TOPIC, NUMBER], [CLOSE, END, EOS])] = TEXT
    action[[TOPIC, NUMBER], CLOSE] = FORK
    action[:, SYNC] = JOIN
    action[:, [END, EOS]] = FINISH
    ill[np.ix_(texts, [ORDINARY, DIGITS, OPEN, END, SYNC, EOS])] = False
    ill[TOPIC, [ORDINARY, DIGITS, MIDDLE, CLOSE]] = False
    ill[NUMBER, [DIGITS, CLOSE]] = False
    if promise == "topic":
      state[TEXT, OPEN], state[TOPIC, MIDDLE] = TOPIC, NUMBER
    else:
      state[TEXT, [ORDINARY, DIGITS]] = HEAD
      state[texts, OPEN] = NUMBER
      ill[TEXT, OPEN] = True
    return cls(state, action, ill)


AUTOMATA = {promise: Automaton.build(promise) for promise in PROMISE_FORMS}


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
  promise: str  # its form
  classes: np.ndarray  # [V] int32
  value: np.ndarray  # [V] int32
  scale: np.ndarray  # [V] int32, 1 where the token has no digits

  @classmethod
  def build(
    cls, vocab_size: int, tags: Tags, digits: dict[int, tuple[int, int]], promise: str = "topic"
  ) -> "TokenTable":
    """`digits` maps a token id to (value, 10 ** number of digits). Tokens are ordinary unless named."""
    classes = np.full(vocab_size, ORDINARY, np.int32)
    value, scale = np.zeros(vocab_size, np.int32), np.ones(vocab_size, np.int32)
    for token, (v, s) in digits.items():
      # Values past the cap are all absurd alike; capping keeps `append_digits` inside 32 bits.
      classes[token], value[token], scale[token] = DIGITS, min(v, MAX_DECLARED + 1), min(s, 100_000)
    for token, c in zip(tags.ids, (OPEN, MIDDLE, CLOSE, ASYNC, END, SYNC)):
      classes[token] = c
    classes[list(tags.eos)] = EOS
    return cls(tags, promise, classes, value, scale)

  @property
  def automaton(self) -> Automaton:
    return AUTOMATA[self.promise]


def append_digits(number, value, scale):
  """The number read so far with one more digit token, kept within MAX_DECLARED + 1.

  Works on Python integers and on arrays; `number` is -1 before the first digit. The cap keeps every
  intermediate product inside 32 bits for tokens of up to five digits.
  """
  so_far = number * (number > 0)
  longer = so_far * scale + value
  over = longer > MAX_DECLARED
  return longer * (1 - over) + (MAX_DECLARED + 1) * over
