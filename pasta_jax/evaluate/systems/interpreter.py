"""One response of the interpreter: PASTA with promises, or ordinary decoding without."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

from pasta_jax.decode.generator import Model
from pasta_jax.decode.record import to_record
from pasta_jax.decode.scheduler import Scheduler, precompile
from pasta_jax.decode.trace import Trace, to_json
from pasta_jax.evaluate.systems.system import Conversation, OnProgress, check_length


class InterpreterSystem:
  """Decodes with promises or without, by the class attribute `promises`. `speed` -1: none is asked for."""

  promises: ClassVar[bool]

  def __init__(self, model: Model, *, batch_size: int, branch_width: int, speed: int = -1):
    self.model, self._speed = model, speed
    self._batch_size, self._branch_width = batch_size, branch_width if self.promises else 1

  @classmethod
  def from_config(cls, config, entry, model: Model, *, timed: bool) -> Self:
    del timed
    speed = entry.speed
    if speed is None:
      speed = config.decode.speed if model.speeds else -1
    e = config.eval
    return cls(model, batch_size=e.batch_size, branch_width=e.branch_width, speed=speed)

  @staticmethod
  def settings(config) -> dict[str, Any]:
    del config
    return {}

  def answer(self, conversations: Sequence[Conversation], on_finish: Callable[[int, dict], None]) -> None:
    scheduler = Scheduler(
      self.model.interpreter(self.promises), batch_size=self._batch_size, branch_width=self._branch_width
    )
    scheduler.run(
      [self.encode(c) for c in conversations],
      self.model.sampling,
      on_finish=lambda i, trace: on_finish(i, self._row(trace)),
    )

  def answer_timed(self, conversation: Conversation) -> dict:
    response = self.model.generate(conversation, parallel=self.promises, speed=self._speed)
    return self._row(response.trace) | {"seconds": response.seconds}

  def encode(self, conversation: Conversation) -> list[int]:
    return self.model.encode(conversation, self._speed)

  def check(self, conversation: Conversation) -> None:
    check_length(self.model, len(self.encode(conversation)))

  def precompile(self, lengths: Sequence[int], on_progress: OnProgress) -> None:
    interpreter = self.model.interpreter(self.promises)
    for length in lengths:

      def tell(done: int, total: int, length=length) -> None:
        on_progress(f"prompts of {length}: {done} of {total}")

      precompile(interpreter, length, self.model.sampling, on_progress=tell)

  def _row(self, trace: Trace) -> dict:
    return to_record(trace, self.model.vocabulary).to_json() | {"trace": to_json(trace)}


class ParallelSystem(InterpreterSystem):
  """PASTA: responses with promises."""

  promises = True


class SequentialSystem(InterpreterSystem):
  """One token at a time: Baseline-SFT, or any model without its promises."""

  promises = False
