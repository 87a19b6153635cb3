"""The terminal: branches side by side while they are written, and a table of figures after the answer."""

import re
import time
from collections.abc import Callable
from types import TracebackType
from typing import Literal

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pasta_jax.decode.trace import ThreadTrace, Trace
from pasta_jax.decode.views.pieces import hue, pieces
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.utils.text import printable

# Of middle lightness, so that they can be read on dark and on light terminals.
HUES = (
  "#4d8ef7",
  "#e8752f",
  "#21b07d",
  "#d557a2",
  "#bb982a",
  "#8f79ec",
  "#25aac4",
  "#e2585e",
  "#7cb034",
  "#bd8a5c",
)

Status = Literal["writing", "waiting", "done", "cut off"]
MARKS: dict[Status, str] = {"writing": "▸", "waiting": "◌", "done": "✓", "cut off": "✂"}

_COLUMN = 32  # a chunk's panel is at least this wide, where the terminal is
_TALLEST = 12  # lines of a chunk's panel, with its border
_LOWEST = 3


def colour(number: int) -> str:
  """A chunk's colour in the terminal; the main thread has the terminal's own."""
  return HUES[hue(number)] if number else "default"


def status_of(trace: Trace, number: int, vocabulary: Vocabulary) -> Status:
  """What a thread is doing. It waits for its first turn, or at a sync for chunks."""
  t = trace.threads[number]
  if t.finished:
    return "done"
  if trace.finish_reason != "unfinished":
    return "cut off"
  at_sync = t.length and t.tokens[-1] == vocabulary.tags.sync
  not_started = t.length == 0 or (number > 0 and t.length == 1)
  return "waiting" if at_sync or not_started else "writing"


def _styled(trace: Trace, number: int, vocabulary: Vocabulary, cursor: bool) -> Text:
  """A thread's own text; its promises are placeholders in the colours of their chunks.

  Empty lines are dropped.
  """
  out = Text(overflow="fold")
  parts = pieces(trace, number, vocabulary)
  for k, piece in enumerate(parts):
    if piece.kind == "text":
      # Lines are scarce: empty ones are dropped, and placeholders with only white space between share a line.
      between = not piece.text.strip() and 0 < k < len(parts) - 1
      out.append(" " if between else re.sub(r"\n\s*\n", "\n", printable(piece.text)).replace("\t", "  "))
    elif piece.kind == "sync":
      out.append("⟨sync⟩", style="dim")
    else:
      label = printable(piece.text).replace("\n", " ")
      if piece.declared is not None:
        label += f"{' · ' if label else ''}{piece.declared}"
      style = "dim" if piece.child is None else f"bold {colour(piece.child)}"
      out.append(f"⟨{label}⟩" if piece.closed else f"⟨{label}", style=style)
  while out.plain.endswith("\ufffd"):  # a character whose last bytes are still to come
    out.right_crop(1)
  if cursor:
    out.append("▌", style=colour(number))
  return out


def _tail(text: Text, console: Console, width: int, lines: int) -> tuple[Text, int]:
  """(the last lines of the text, number of lines of the whole text)."""
  wrapped = text.wrap(console, max(width, 1), overflow="fold")
  kept = list(wrapped)[-lines:] if lines > 0 else []
  if kept and len(wrapped) > lines:
    first = kept[0]
    first.rstrip()
    if first.cell_len >= width:
      first.right_crop(1)
    kept[0] = Text.assemble(("…", "dim"), first)
  return Text("\n", overflow="fold").join(kept), len(wrapped)


class _Frame:
  """One picture of a trace; the layout is computed when it is drawn, for the terminal's size at that
  moment."""

  def __init__(self, trace: Trace, vocabulary: Vocabulary, seconds: float):
    self.trace, self.vocabulary, self.seconds = trace, vocabulary, seconds

  def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
    width = options.max_width
    height = max((options.height or console.size.height) - 1, 1)  # the cursor's line stays free
    trace = self.trace
    rows: list[Text | Panel | Table] = []
    left = height - 1  # the status line
    statuses = {t.number: status_of(trace, t.number, self.vocabulary) for t in trace.threads}
    if left >= _LOWEST and trace.threads:
      chunks = [t for t in trace.threads if t.number]
      columns = max(min(width // _COLUMN, len(chunks)), 1)
      main_most = left if not chunks else max(min(left // 3, left - _LOWEST), _LOWEST)
      main, used = self._main(console, width, main_most, statuses[0])
      rows.append(main)
      left -= used
      if chunks:
        rows += self._chunks(console, chunks, statuses, width, left, columns)
    rows.append(self._status(statuses, width))
    yield Group(*rows)

  def _main(self, console: Console, width: int, most: int, status: Status) -> tuple[Panel, int]:
    text = _styled(self.trace, 0, self.vocabulary, status == "writing")
    tail, lines = _tail(text, console, width - 4, most - 2)
    height = min(max(lines, 1) + 2, most)
    title = Text.assemble(
      (MARKS[status] + " ", "bold"),
      ("main thread", "bold"),
      ("  waits for its chunks" if status == "waiting" else "", "dim"),
    )
    title.truncate(max(width - 6, 1), overflow="ellipsis")
    return Panel(
      tail,
      box=box.ROUNDED,
      title=title,
      title_align="left",
      width=width,
      height=height,
      border_style="default" if status == "writing" else "dim",
    ), height

  def _chunks(
    self,
    console: Console,
    chunks: list[ThreadTrace],
    statuses: dict[int, Status],
    width: int,
    left: int,
    columns: int,
  ) -> list[Table | Text]:
    """As many panels as fit; finished chunks give up theirs first, and are named on a line of their own."""
    shown, summed_up = chunks, []
    if -(-len(shown) // columns) * (_LOWEST + 1) > left:
      room = max((left - 1) // (_LOWEST + 1), 0) * columns
      # Writing chunks come first, then waiting ones, then those that finished last.
      urgent = sorted(
        chunks,
        key=lambda t: (
          {"writing": 0, "waiting": 1}.get(statuses[t.number], 2),
          -int(t.rounds[-1]) if t.length else 0,
        ),
      )
      chosen = {t.number for t in urgent[:room]}
      shown = [t for t in chunks if t.number in chosen]
      summed_up = [t for t in chunks if t.number not in chosen]
    out: list[Table | Text] = []
    if summed_up and left > 0:
      out.append(self._names(summed_up, statuses, width))
      left -= 1
    if not shown:
      return out
    columns = min(columns, len(shown))
    wide = [width // columns + (i < width % columns) for i in range(columns)]
    most = min(left // -(-len(shown) // columns), _TALLEST)
    texts = {
      t.number: _styled(self.trace, t.number, self.vocabulary, statuses[t.number] == "writing") for t in shown
    }
    needed = max(len(text.wrap(console, max(wide[-1] - 4, 1), overflow="fold")) for text in texts.values())
    height = max(min(needed + 2, most), _LOWEST)
    grid = Table.grid(padding=0)
    for w in wide:
      grid.add_column(width=w)
    for start in range(0, len(shown), columns):
      grid.add_row(
        *(
          self._panel(console, t, texts[t.number], statuses[t.number], w, height)
          for t, w in zip(shown[start : start + columns], wide)
        )
      )
    return [grid, *out]

  def _panel(
    self, console: Console, thread: ThreadTrace, text: Text, status: Status, width: int, height: int
  ) -> Panel:
    tint = colour(thread.number)
    body, _ = _tail(text, console, width - 4, height - 2)
    path = ".".join(str(i + 1) for i in thread.path) if len(thread.path) > 1 else ""
    title = Text.assemble(
      (f"{MARKS[status]} ", tint), (f"{path} " if path else "", "dim"), (_topic(thread), f"bold {tint}")
    )
    title.truncate(max(width - 6, 1), overflow="ellipsis")
    if status != "writing":
      body.stylize("dim")
    return Panel(
      body,
      box=box.ROUNDED,
      title=title,
      title_align="left",
      subtitle=_progress(thread, min(12, width - 20)),
      subtitle_align="right",
      width=width,
      height=height,
      border_style=tint if status == "writing" else f"dim {tint}",
    )

  def _names(self, threads: list[ThreadTrace], statuses: dict[int, Status], width: int) -> Text:
    out = Text(" ", no_wrap=True, overflow="ellipsis")
    for k, t in enumerate(threads):
      entry = Text.assemble(
        (f"{MARKS[statuses[t.number]]} {_topic(t)}", colour(t.number)), (f" {t.length}  ", "dim")
      )
      rest = f"+ {len(threads) - k} more"
      if out.cell_len + entry.cell_len + (len(rest) if k < len(threads) - 1 else 0) > width and k:
        out.append(rest, style="dim")
        break
      out.append_text(entry)
    out.truncate(width, overflow="ellipsis")
    return out

  def _status(self, statuses: dict[int, Status], width: int) -> Text:
    trace = self.trace
    tokens = sum(t.length for t in trace.threads)
    live = sum(m == "writing" for m in statuses.values())
    rate = f"{tokens / self.seconds:.1f}" if self.seconds > 0 else "–"
    out = Text(" ", no_wrap=True, overflow="ellipsis")
    values = [
      (f"{tokens}", "tokens"),
      (f"{trace.steps}", "steps"),
      (f"{live}", "live"),
      (rate, "tokens/s"),
      (f"{self.seconds:.1f}", "s"),
    ]
    for k, (value, unit) in enumerate(values):
      entry = Text.assemble(("  ·  " if k else "", "dim"), (value, "bold"), (f" {unit}", "dim"))
      if out.cell_len + entry.cell_len > width:
        break
      out.append_text(entry)
    return out


def _topic(thread: ThreadTrace) -> str:
  return " ".join(printable(thread.topic).split()) or "untitled"


def _progress(thread: ThreadTrace, width: int) -> Text:
  """A bar of own tokens relative to the number in the promise, and both numbers."""
  tint = colour(thread.number)
  if thread.declared is None:
    return Text(f"{thread.length} tokens", style=tint)
  share = min(thread.length / max(thread.declared, 1), 1.0)
  width = max(width, 0)
  done = round(share * width)
  over = thread.length > thread.declared
  bar = Text.assemble(("━" * done, tint), ("─" * (width - done), f"dim {tint}"), " " if width else "")
  return bar + Text(f"{thread.length}/{thread.declared}", style=f"bold {tint}" if over else tint)


class LiveView:
  """Shows a response in the terminal while it is written; the view is erased when the block ends.

      with LiveView(vocabulary) as view:
        model.generate(prompt, on_step=view.update)

  The main thread is at the top, with placeholders for its promises; the chunks are below, side by side as the
  terminal's width allows. The view never has more lines than the terminal. If the console is not a terminal,
  nothing is printed.
  """

  def __init__(
    self,
    vocabulary: Vocabulary,
    console: Console | None = None,
    *,
    frames_per_second: float = 10,
    clock: Callable[[], float] = time.monotonic,
  ):
    self.vocabulary = vocabulary
    self.console = console or Console()
    self._shortest = 1 / frames_per_second
    self._clock = clock
    self._start = clock()
    self._drawn = float("-inf")
    self._live: Live | None = None

  def __enter__(self) -> "LiveView":
    self._start = self._clock()
    self._drawn = float("-inf")
    if self.console.is_terminal and not self.console.is_dumb_terminal:
      # Drawn when a trace arrives; a thread that refreshes in between would have nothing to draw.
      self._live = Live(
        console=self.console, auto_refresh=False, transient=True, screen=False, vertical_overflow="crop"
      )
      self._live.start()
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
  ) -> None:
    if self._live is not None:
      self._live.stop()
      self._live = None

  def update(self, trace: Trace, elapsed_seconds: float | None = None) -> None:
    """Draws the trace so far, at most `frames_per_second` times a second; a finished trace is always drawn.

    Time counts from the start of the block unless it is given.
    """
    if self._live is None:
      return
    now = self._clock()
    if now - self._drawn < self._shortest and trace.finish_reason == "unfinished":
      return
    self._drawn = now
    seconds = now - self._start if elapsed_seconds is None else elapsed_seconds
    self._live.update(self.frame(trace, seconds), refresh=True)

  def frame(self, trace: Trace, elapsed_seconds: float) -> _Frame:
    """What `update` draws, as a rich renderable."""
    return _Frame(trace, self.vocabulary, elapsed_seconds)


def figures_table(
  trace: Trace,
  seconds: float | None = None,
  speedup: float | None = None,
  programs: tuple[str, str] | None = None,
) -> Table:
  """The figures of a finished response, printed after it.

  `seconds` is the wall clock of the response; `speedup` the time of the same model one token at a time
  divided by it; `programs` the precision and the kernels. The row of what is None is left out.
  """
  c = trace.cost
  table = Table(box=box.HORIZONTALS, border_style="dim", show_header=False, padding=(0, 1))
  table.add_column(no_wrap=True)
  table.add_column(justify="right", no_wrap=True, style="bold")
  table.add_column(style="dim")

  def row(name: str, value: str, note: str = "", style: str = "", last: bool = False) -> None:
    table.add_row(name, Text(value, style=style), note, end_section=last)

  row("Tokens", f"{c.total_tokens}", "tags, topics and numbers included")
  row("Shown to the reader", f"{c.text_tokens}", _share(c.text_tokens, c.total_tokens))
  row("Promises", f"{c.n_promises}", f"{trace.refused} refused" if trace.refused else "")
  row("Peak parallelism", f"{c.peak_parallelism}", "threads that write at once", last=True)
  row("Decode steps", f"{trace.steps}")
  row("Longest path", f"{c.longest_path}", "steps, with unlimited branches")
  row(
    "Theoretical parallelism",
    f"{c.theoretical_parallelism:.2f}×",
    "shown tokens over longest path",
    _verdict(c.theoretical_parallelism),
    last=seconds is None and speedup is None,
  )
  if seconds is not None:
    rate = f"{c.total_tokens / seconds:.1f} tokens/s" if seconds > 0 else ""
    row("Wall clock", f"{seconds:.2f} s", rate, last=speedup is None)
  if speedup is not None:
    row(
      "Same-text speedup",
      f"{speedup:.2f}×",
      "time per token: without promises over with",
      _verdict(speedup),
      last=True,
    )
  if programs is not None:
    row("Precision", programs[0], f"kernels: {programs[1]}")
  row("Finish reason", trace.finish_reason, "", "" if trace.finish_reason == "stop" else "yellow")
  row("Ill-formed tags", f"{trace.ill_formed}", "", "yellow" if trace.ill_formed else "")
  return table


def _verdict(speedup: float) -> str:
  return "green" if speedup > 1 else "yellow"


def _share(part: int, whole: int) -> str:
  return f"{100 * part / whole:.0f} %" if whole else ""
