"""A progress bar on stderr, for every long operation."""

import rich.console
import rich.progress

from pasta_jax.utils.text import printable


def progress_bar(
  what: str, total: int, done: int = 0, *, visible: bool = True
) -> tuple[rich.progress.Progress, rich.progress.TaskID]:
  """A bar with count and time left; `update(task, note=…)` shows figures after it."""
  bar = rich.progress.Progress(
    rich.progress.TextColumn("{task.description}", markup=False),
    rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TimeRemainingColumn(),
    rich.progress.TextColumn("{task.fields[note]}", markup=False),
    console=rich.console.Console(stderr=True),
    disable=not visible,
  )
  return bar, bar.add_task(printable(what), total=total, completed=done, note="")
