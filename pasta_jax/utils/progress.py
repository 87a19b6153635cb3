"""A progress bar on stderr, for every long operation; of several processes, the first one shows it."""

from collections.abc import Callable

import rich.console
import rich.progress
import rich.table
from rich.text import Text

from pasta_jax.utils import distributed
from pasta_jax.utils.terminal import as_text


class _Words(rich.progress.ProgressColumn):
  """A text of the task, shown as it is."""

  def __init__(self, words: Callable[[rich.progress.Task], str]):
    super().__init__(rich.table.Column(no_wrap=True))
    self._words = words

  def render(self, task: rich.progress.Task) -> Text:
    return as_text(self._words(task))


def progress_bar(what: str, total: int, done: int = 0) -> tuple[rich.progress.Progress, rich.progress.TaskID]:
  """A bar with count and time left; `update(task, note=…)` shows figures after it."""
  bar = rich.progress.Progress(
    _Words(lambda task: task.description),
    rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TimeRemainingColumn(),
    _Words(lambda task: task.fields["note"]),
    console=rich.console.Console(stderr=True),
    disable=not distributed.is_first(),
  )
  return bar, bar.add_task(what, total=total, completed=done, note="")
