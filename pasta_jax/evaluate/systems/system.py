"""What every system offers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self

from pasta_jax.decode.generator import DecodeError, Model

Conversation = Sequence[Mapping[str, str]]  # messages with `role` and `content`; the last one is the user's
OnProgress = Callable[[str], None]


class System(Protocol):
  """A way of answering.

  `answer` decodes many conversations in batches, for quality and theoretical figures; `answer_timed` decodes
  one and measures its time. Both give rows: a record's JSON (`decode.record.ResponseRecord`) with `trace`
  (`decode.trace.to_json`).
  """

  promises: ClassVar[bool]  # whether responses may have promises: which settings of decoding matter
  model: Model

  @classmethod
  def from_config(cls, config, entry, model: Model, *, timed: bool) -> Self:
    """The system of an entry of `config.systems`, for `answer` or, with `timed`, for `answer_timed`."""

  @staticmethod
  def settings(config) -> dict[str, Any]:
    """Settings, beside those of the model and of decoding, that its responses depend on."""

  def answer(self, conversations: Sequence[Conversation], on_finish: Callable[[int, dict], None]) -> None:
    """Answers all of them; `on_finish(i, row)` is called when response `i` ends."""

  def answer_timed(self, conversation: Conversation) -> dict:
    """The row of one response, with `seconds` of wall clock: prefill and decoding."""

  def encode(self, conversation: Conversation) -> list[int]:
    """The conversation's tokens in the system's first prompt."""

  def check(self, conversation: Conversation) -> None:
    """Raises DecodeError if the conversation is too long to be answered."""

  def precompile(self, lengths: Sequence[int], on_progress: OnProgress) -> None:
    """Compiles what `answer_timed` needs for prompts of these padded lengths."""


def check_length(model: Model, length: int) -> None:
  """Raises DecodeError unless a prompt of `length` tokens and the longest response fit the key-value pool."""
  limits = model.limits
  if length + limits.max_new_tokens > limits.kv_buckets[-1]:
    raise DecodeError(
      f"the prompt has {length} tokens and its response up to {limits.max_new_tokens}, but the pool has "
      f"{limits.kv_buckets[-1]} entries: shorten the prompt or raise decode.kv_capacity"
    )
