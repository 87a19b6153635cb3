"""Names and paths in the terminal are text, whatever is in them."""

import io

import rich.console
import rich.progress
import rich.table

from pasta_jax.utils.progress import progress_bar
from pasta_jax.utils.terminal import as_text

HOSTILE = "[/x] [bold] :smile: \x1b]0;title\x07 \u202e"
SHOWN = "[/x] [bold] :smile: \\x1b]0;title\\x07 \\u202e"


def printed(*content) -> str:
  out = io.StringIO()
  rich.console.Console(file=out, width=100, force_terminal=False).print(*content)
  return out.getvalue()


def test_text_is_no_markup():
  assert printed(as_text(HOSTILE)) == SHOWN + "\n"
  table = rich.table.Table(rich.table.Column(as_text(HOSTILE)), title=as_text(HOSTILE))
  table.add_row(as_text(HOSTILE))
  assert printed(table).count(SHOWN) == 3


def test_progress_of_anything():
  bar, task = progress_bar(HOSTILE, 2)
  bar.update(task, note=HOSTILE)
  cells = [column.render(bar.tasks[0]) for column in bar.columns]
  assert [cells[0].plain, cells[-1].plain] == [SHOWN, SHOWN]
