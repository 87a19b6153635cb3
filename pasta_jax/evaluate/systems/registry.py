"""What is compared: an adapter and a way of decoding it, each behind the same two methods.

`many` answers conversations side by side, for quality and theoretical figures; `one` answers a single one by
the clock. Systems are named in a config's `systems`; none has code of its own but Skeleton-of-Thought, which
asks twice.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from pasta_jax.decode.generator import DecodeError, Model
from pasta_jax.decode.record import to_record
from pasta_jax.decode.scheduler import Scheduler
from pasta_jax.decode.trace import to_json
from pasta_jax.evaluate.judges.judge import Conversation
from pasta_jax.evaluate.systems.skeleton import Skeleton

Note = Callable[[str], None]


class System(Protocol):
  """A way of answering. Records are those of `decode.record`, with `trace` (`decode.trace.to_json`)."""

  generator: Model

  def many(self, conversations: Sequence[Conversation], done: Callable[[int, dict], None]) -> None:
    """Answers all of them; `done(i, record)` is called as each one ends."""

  def one(self, conversation: Conversation) -> dict:
    """The record of one answer, with `seconds` of wall clock: prefill and decoding."""

  def tokens(self, conversation: Conversation) -> list[int]:
    """The conversation as the system reads it first."""

  def check(self, conversation: Conversation) -> None:
    """Raises DecodeError if the conversation cannot be answered."""

  def precompile(self, lengths: Sequence[int], note: Note) -> None:
    """Compiles what `one` needs for prompts of these padded lengths."""


class Threads:
  """One response, with promises or without: the interpreter alone."""

  def __init__(self, generator: Model, *, parallel: bool, requests: int, width: int, speed: int = -1):
    self.generator, self.parallel, self._speed = generator, parallel, speed
    self._requests, self._width = requests, width if parallel else 1

  def _record(self, trace) -> dict:
    return to_record(trace, self.generator.vocabulary) | {"trace": to_json(trace)}

  def many(self, conversations: Sequence[Conversation], done: Callable[[int, dict], None]) -> None:
    decoder = Scheduler(
      self.generator.interpreter(self.parallel), batch_size=self._requests, branch_width=self._width
    )
    decoder.run(
      [self.tokens(c) for c in conversations],
      self.generator.sampling,
      on_finish=lambda i, trace: done(i, self._record(trace)),
    )

  def one(self, conversation: Conversation) -> dict:
    response = self.generator.generate(conversation, parallel=self.parallel, speed=self._speed)
    return self._record(response.trace) | {"seconds": response.seconds}

  def tokens(self, conversation: Conversation) -> list[int]:
    return self.generator.encode(conversation, self._speed)

  def check(self, conversation: Conversation) -> None:
    _check(self.generator, len(self.tokens(conversation)))

  def precompile(self, lengths: Sequence[int], note: Note) -> None:
    interpreter = self.generator.interpreter(self.parallel)
    for length in lengths:
      tell = partial(_tell, note, length)
      interpreter.precompile(length, self.generator.sampling, on_progress=tell)


def _check(generator: Model, length: int) -> None:
  """Raises DecodeError unless a prompt of so many tokens and the longest response fit the pool."""
  limits = generator.limits
  if length + limits.max_new_tokens > limits.kv_buckets[-1]:
    raise DecodeError(
      f"it has {length} tokens and its answer up to {limits.max_new_tokens}, the pool has room for "
      f"{limits.kv_buckets[-1]}: shorten it, or raise decode.kv_capacity"
    )


def _tell(note: Note, length: int, done: int, total: int) -> None:
  note(f"prompts of {length}: {done} of {total}")


class TwoStage:
  """Skeleton-of-Thought (`evaluate.skeleton`)."""

  def __init__(self, skeleton: Skeleton):
    self.generator, self._skeleton = skeleton.generator, skeleton

  def many(self, conversations: Sequence[Conversation], done: Callable[[int, dict], None]) -> None:
    group = (
      4 * self._skeleton.batch_size
    )  # what a kill may lose; fewer leave places empty at the end of each stage
    for first in range(0, len(conversations), group):
      for i, record in enumerate(self._skeleton.answer(conversations[first : first + group])):
        done(first + i, record)

  def one(self, conversation: Conversation) -> dict:
    while True:
      before = self._skeleton.compiled()
      seconds, [record] = self._skeleton.timed_answer([conversation])
      if (
        self._skeleton.compiled() == before
      ):  # outlines decide which shapes are needed: no compilation is timed
        return record | {"seconds": seconds}

  def tokens(self, conversation: Conversation) -> list[int]:
    return self.generator.encode(conversation)

  def check(self, conversation: Conversation) -> None:
    _check(self.generator, len(self.tokens(conversation)) + self._skeleton.extra_tokens())

  def precompile(self, lengths: Sequence[int], note: Note) -> None:
    self._skeleton.precompile(lengths, note)


def load_system(config, name: str, generators: dict[tuple[str, str], Model], *, timed: bool) -> System:
  """The system that `config.systems` calls `name`, for `many` or, with `timed`, for `one`.

  Models that were loaded before are taken from `generators` and added to it: by adapter and dtype.
  """
  entry = config.systems[name]
  e = config.eval
  dtype = config.decode.dtype if timed else e.dtype
  key = (entry.adapter, dtype)
  if key not in generators:
    generators[key] = Model(config, adapter=entry.adapter, dtype=dtype)
  generator = generators[key]
  if entry.decode == "skeleton":
    return TwoStage(Skeleton(generator, **vars(config.skeleton), batch_size=1 if timed else e.batch_size))
  speed = entry.speed
  if speed is None:
    speed = config.decode.speed if generator.speeds else -1
  return Threads(
    generator, parallel=entry.decode == "parallel", requests=e.batch_size, width=e.branch_width, speed=speed
  )
