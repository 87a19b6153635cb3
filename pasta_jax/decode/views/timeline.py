"""A response as a picture, in SVG and HTML without external resources: one lane per thread, time left to
right.

Time is counted in rounds: a token's round is its clock on a machine with unlimited branches, so the picture
does not depend on the width of the steps.
"""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from pasta_jax.decode.trace import ThreadTrace, Trace
from pasta_jax.decode.views.pieces import by_tree, drawable, hue, joins, pieces
from pasta_jax.decode.views.seen import SCRIPT, STYLE, seen_by
from pasta_jax.lang.thread import Reading
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.utils.files import write_atomic

_LIGHT = (
  "#2563d9",
  "#d4500c",
  "#0c8f63",
  "#b92d83",
  "#94700a",
  "#6a4bd0",
  "#0a86a3",
  "#cc3340",
  "#5a8a12",
  "#9a5a2e",
)
_DARK = (
  "#6fa5ff",
  "#ff9050",
  "#3fd39b",
  "#f37dc3",
  "#e3bf4d",
  "#aa97ff",
  "#4bcde6",
  "#ff7d83",
  "#a2d857",
  "#dba679",
)
# card, ink, muted ink, hair lines, the main thread
_LIGHT_BASE = ("#ffffff", "#1c2430", "#66707f", "#dfe3e9", "#465263")
_DARK_BASE = ("#12161d", "#e8ecf2", "#96a0af", "#2b323d", "#aeb9c9")
_FONT = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"

WIDTH = 1200
_LEFT, _RIGHT, _TOP = 212, 34, 118  # the plot's margins
_LANE, _BAR = 40, 16  # height of a lane and of the bar in it
_FOOT = 70  # below the lanes: scale and legend
_CORNER = 14.0


def _colours(base: tuple[str, ...], hues: tuple[str, ...], scope: str) -> str:
  card, ink, muted, line, main = base
  rules = [
    f"{scope} .card {{ fill: {card}; stroke: {line} }}",
    f"{scope} .ink {{ fill: {ink} }}",
    f"{scope} .muted {{ fill: {muted} }}",
    f"{scope} .line {{ stroke: {line} }}",
    f"{scope} .halo {{ fill: {card} }}",
  ]
  for name, colour in [("main", main), *((f"h{i}", h) for i, h in enumerate(hues))]:
    rules.append(f"{scope} .{name} .fill {{ fill: {colour} }} {scope} .{name} .stroke {{ stroke: {colour} }}")
  return "\n".join(rules)


_SVG_STYLE = f"""
.pasta-timeline {{ font-family: {_FONT}; font-size: 13px }}
.pasta-timeline .small {{ font-size: 11px }}
.pasta-timeline .figure {{ font-size: 21px; font-weight: 600; letter-spacing: -.01em }}
.pasta-timeline .topic {{ font-weight: 600 }}
.pasta-timeline text {{ font-variant-numeric: tabular-nums }}
.pasta-timeline .bed {{ opacity: .22 }}
.pasta-timeline .tag {{ opacity: .45 }}
.pasta-timeline .edge {{ fill: none; stroke-width: 1.6; stroke-opacity: .75; stroke-linecap: round }}
.pasta-timeline .trunk {{ stroke-opacity: 1; stroke-width: 2.4 }}
.pasta-timeline .reserved {{ fill: none; stroke-dasharray: 2.5 2.5; stroke-opacity: .8 }}
.pasta-timeline .wait {{ stroke-width: 1.6; stroke-dasharray: 1 4; stroke-linecap: round }}
.pasta-timeline .cell:hover {{ opacity: 1; stroke: currentColor; stroke-width: 1.5 }}
{STYLE}
{_colours(_LIGHT_BASE, _LIGHT, ".pasta-timeline")}
@media (prefers-color-scheme: dark) {{
{_colours(_DARK_BASE, _DARK, ".pasta-timeline")}
}}
"""


def timeline_style() -> str:
  """The style sheet inside each timeline that stands alone."""
  return _SVG_STYLE


def _n(x: float) -> str:
  """A coordinate, in as few characters as possible."""
  return f"{x:.2f}".rstrip("0").rstrip(".")


def _attribute(text: str) -> str:
  return escape(drawable(text).replace("\n", " "))


def _tooltip(text: str) -> str:
  """One token, with white space at its ends and all line breaks made visible."""
  text = drawable(text).replace("\n", "↵").replace("\t", "⇥")
  body = text.strip(" ")
  blanks = len(text) - len(text.lstrip(" "))
  return escape("␣" * blanks + body + "␣" * (len(text) - blanks - len(body)))


def _shorten(text: str, width: float, size: float) -> str:
  """The text cut to about `width` pixels at font size `size`."""
  most = max(int(width / (0.58 * size)), 1)
  return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def reserve(thread: ThreadTrace) -> tuple[int, int]:
  """(unused positions of the number in its promise, own tokens beyond that number)."""
  if thread.declared is None or not thread.length:
    return 0, 0
  offsets = thread.positions - thread.positions[0]
  beyond = int((offsets >= thread.declared).sum())
  return max(thread.declared - int(offsets[-1]) - 1, 0), beyond


def length_label(thread: ThreadTrace) -> str:
  """Own tokens and the number in the promise, in words."""
  if thread.number == 0 or thread.declared is None:
    return f"{thread.length} tokens"
  return f"{thread.length} tokens, {thread.declared} reserved"


def figures(trace: Trace) -> list[tuple[str, str]]:
  """(name, value) of the figures in the caption."""
  c = trace.cost
  return [
    ("tokens", f"{c.total_tokens}"),
    ("shown to the reader", f"{c.text_tokens}"),
    ("decode steps", f"{trace.steps}"),
    ("longest path", f"{c.longest_path}"),
    ("theoretical parallelism", f"{c.theoretical_parallelism:.2f}×"),
    ("promises", f"{c.n_promises}"),
    ("at once, at most", f"{c.peak_parallelism}"),
    ("finish", trace.finish_reason),
    ("ill-formed tags", f"{trace.ill_formed}"),
  ]


class _Plot:
  """Coordinates of rounds and lanes."""

  def __init__(self, trace: Trace):
    self.lanes = {t.number: i for i, t in enumerate(by_tree(trace))}
    self.end = max((int(t.rounds[-1]) for t in trace.threads if t.length), default=0)
    # Unused reserved positions may extend past the end, but must not compress the rest.
    wanted = max((int(t.rounds[-1]) + reserve(t)[0] for t in trace.threads if t.length), default=0)
    self.rounds = max(min(wanted, int(1.12 * self.end)), self.end, 24)
    self.cell = (WIDTH - _LEFT - _RIGHT) / self.rounds
    self.gap = 1.0 if self.cell >= 4 else 0.5 if self.cell >= 2 else 0.0
    self.bottom = _TOP + _LANE * max(len(self.lanes), 1)

  def x(self, round_: float) -> float:
    """Left edge of a round; rounds count from 1."""
    return _LEFT + (round_ - 1) * self.cell

  def y(self, number: int) -> float:
    """Middle of a thread's lane."""
    return _TOP + (self.lanes[number] + 0.5) * _LANE


def _kind(number: int) -> str:
  return f"h{hue(number)}" if number else "main"


def _fork(plot: _Plot, thread: ThreadTrace, parent: ThreadTrace) -> str:
  """A curve from the promise's end, down, and into the chunk's bar from the left."""
  x0, y0 = plot.x(int(parent.rounds[thread.fork_index]) + 1) - plot.gap, plot.y(parent.number) + _BAR / 2
  x1, y1 = plot.x(int(thread.rounds[0])), plot.y(thread.number)
  bow = min(10 + 0.05 * (y1 - y0), 26)
  path = (
    f"M{_n(x0)},{_n(y0)} C{_n(x0 - bow / 2)},{_n(y0 + bow)} {_n(x1 - 1.4 * bow)},{_n(y1)} {_n(x1)},{_n(y1)}"
  )
  return (
    f'<g class="{_kind(thread.number)}"><path class="edge stroke fork" data-thread="{thread.number}" '
    f'd="{path}"/></g>'
  )


def _resumed(thread: ThreadTrace, at: int, latest: int) -> int:
  """The round in which the thread of a sync resumes; `latest` is the last round of the chunks that it
  joins."""
  after = int(thread.rounds[at + 1]) if at + 1 < thread.length else int(thread.rounds[at]) + 1
  return max(after, latest + 1)


def _join(plot: _Plot, thread: ThreadTrace, into: int, resumed: int) -> str:
  """A line from the chunk's end along its lane, then around a corner and up to the sync."""
  x0, y0 = plot.x(int(thread.rounds[-1]) + 1), plot.y(thread.number)
  x1, y1 = plot.x(resumed), plot.y(into) + _BAR / 2
  r = min(_CORNER, x1 - x0, y0 - y1)
  path = f"M{_n(x0)},{_n(y0)} H{_n(x1 - r)} Q{_n(x1)},{_n(y0)} {_n(x1)},{_n(y0 - r)} V{_n(y1)}"
  return (
    f'<g class="{_kind(thread.number)}"><path class="edge stroke join" data-thread="{thread.number}" '
    f'd="{path}"/></g>'
  )


def _lane(plot: _Plot, thread: ThreadTrace, reading: Reading, vocabulary: Vocabulary, seen: str) -> str:
  """The label in the margin and the bar of a thread; `seen` are its attributes of `seen_by`."""
  y, n = plot.y(thread.number), thread.length
  top = y - _BAR / 2
  depth = max(len(thread.path) - 1, 0)
  indent = 24 + 16 * min(depth, 4)
  name = drawable(thread.topic) or "untitled" if thread.number else "main thread"
  label = length_label(thread)
  left_over, _ = reserve(thread)
  out = [
    f'<g class="lane {_kind(thread.number)}" data-thread="{thread.number}"{seen}>',
    f"<title>{_attribute(name)}: {label}</title>",
    f'<rect class="fill" x="{indent}" y="{_n(y - 13)}" width="4" height="26" rx="2"/>',
    f'<text class="ink topic" x="{indent + 12}" y="{_n(y - 2)}">'
    f"{escape(_shorten(name, _LEFT - indent - 26, 13.5))}</text>",
    f'<text class="muted small" x="{indent + 12}" y="{_n(y + 12)}">{label}</text>',
  ]
  if not n:
    return "".join([*out, "</g>"])
  rounds = [int(r) for r in thread.rounds]
  bounds = [0, *(i for i in range(1, n) if rounds[i] != rounds[i - 1] + 1), n]
  corner = 'rx="3"' if plot.cell >= 3 else ""
  for start, stop in zip(bounds, bounds[1:]):
    x0, x1 = plot.x(rounds[start]), plot.x(rounds[stop - 1] + 1)
    if start:
      out.append(
        f'<line class="wait stroke" x1="{_n(plot.x(rounds[start - 1] + 1) + 2)}" x2="{_n(x0 - 2)}" '
        f'y1="{_n(y)}" y2="{_n(y)}"/>'
      )
    # An opaque rectangle below the tinted one, so that curves pass behind bars.
    shape = f'x="{_n(x0)}" y="{_n(top)}" width="{_n(x1 - x0)}" height="{_BAR}" {corner}'
    out.append(f'<rect class="halo" {shape}/><rect class="fill bed" {shape}/>')
  if thread.tokens[-1] == vocabulary.tags.sync and rounds[-1] < plot.end:  # waiting, or cut off while waiting
    out.append(
      f'<line class="wait stroke" x1="{_n(plot.x(rounds[-1] + 1) + 2)}" '
      f'x2="{_n(plot.x(plot.end + 1))}" y1="{_n(y)}" y2="{_n(y)}"/>'
    )
  if left_over:
    x0 = plot.x(rounds[-1] + 1) + plot.gap
    x1 = min(plot.x(rounds[-1] + 1 + left_over), WIDTH - _RIGHT + 20)
    out.append(
      f'<rect class="reserved stroke" x="{_n(x0)}" y="{_n(top + 2.5)}" '
      f'width="{_n(max(x1 - x0, 1))}" height="{_BAR - 5}" rx="2">'
      f"<title>{left_over} more reserved</title></rect>"
    )
  first = int(thread.positions[0])
  for i in range(n):
    over = thread.declared is not None and int(thread.positions[i]) - first >= thread.declared
    x, width = plot.x(rounds[i]), max(plot.cell - plot.gap, 0.4)
    kind = "cell fill" if reading.is_text[i] else "cell fill tag"
    tip = f"{_tooltip(vocabulary.label(int(thread.tokens[i])))} — token {i + 1}, round {rounds[i]}"
    out.append(
      f'<rect class="{kind}" x="{_n(x)}" y="{_n(top)}" width="{_n(width)}" height="{_BAR}"'
      f"{' rx=' + chr(34) + '1.5' + chr(34) if plot.cell >= 5 else ''}>"
      f"<title>{tip}{', beyond the reserve' if over else ''}</title></rect>"
    )
    if over:
      out.append(
        f'<rect class="fill over" x="{_n(x)}" y="{_n(top + _BAR + 2)}" width="{_n(width)}" height="2.5"/>'
      )
  return "".join([*out, "</g>"])


def _scale(plot: _Plot) -> str:
  """Grid lines, labelled with their rounds."""
  y = plot.bottom + 19
  step = next(s for s in (k * 10**e for e in range(9) for k in (1, 2, 5)) if s * plot.cell >= 64)
  out = []
  for r in range(0, plot.rounds + 1, step):
    x = plot.x(r + 1)
    out.append(f'<line class="line" x1="{_n(x)}" x2="{_n(x)}" y1="{_TOP - 4}" y2="{_n(plot.bottom + 4)}"/>')
    out.append(f'<text class="muted small" text-anchor="middle" x="{_n(x)}" y="{_n(y)}">{r}</text>')
  out.append(f'<text class="muted small" text-anchor="end" x="{_LEFT - 18}" y="{_n(y)}">round</text>')
  return "".join(out)


def _caption(cells: Sequence[tuple[str, str]]) -> str:
  out, x = [], 24.0
  # Column widths by content: values are set in larger type than names.
  widths = [max(len(name) * 6.1, len(value) * 12.5) for name, value in cells]
  between = (WIDTH - 48 - sum(widths)) / max(len(cells) - 1, 1)
  for (name, value), width in zip(cells, widths):
    out.append(
      f'<text class="ink figure" x="{_n(x)}" y="52">{escape(value)}</text>'
      f'<text class="muted small" x="{_n(x)}" y="70">{escape(name)}</text>'
    )
    x += width + between
  out.append(f'<line class="line" x1="24" x2="{WIDTH - 24}" y1="90" y2="90"/>')
  return "".join(out)


def _legend(y: float, *, beyond: bool) -> str:
  w = 26
  marks = [
    ("text", f'<rect class="fill" width="{w}" height="11" rx="2"/>'),
    ("tags, topics, numbers", f'<rect class="fill tag" width="{w}" height="11" rx="2"/>'),
    ("reserved, not used", f'<rect class="reserved stroke" y=".5" width="{w}" height="10" rx="2"/>'),
    ("waits for what it joins", f'<line class="wait stroke" x1="1" x2="{w}" y1="5.5" y2="5.5"/>'),
  ]
  if beyond:
    marks.insert(
      3,
      (
        "longer than reserved",
        f'<rect class="fill" width="{w}" height="11" rx="2" opacity=".5"/>'
        f'<rect class="fill" y="12.5" width="{w}" height="2.5"/>',
      ),
    )
  out, x = ['<g class="main">'], float(_LEFT)
  for name, mark in marks:
    out.append(
      f'<g transform="translate({_n(x)} {_n(y)})">{mark}'
      f'<text class="muted small" x="{w + 7}" y="9.5">{name}</text></g>'
    )
    x += w + 31 + len(name) * 6.0
  return "".join([*out, "</g>"])


def timeline_svg(
  trace: Trace,
  vocabulary: Vocabulary,
  caption: Sequence[tuple[str, str]] | None = None,
  *,
  alone: bool = True,
) -> str:
  """A response, finished or so far, as a self-contained SVG document; well-formed XML for any text.

  One `<g class="lane" data-thread="…">` per thread, one `<path class="edge … fork">` per promise that was
  kept, and one `<path class="edge … join">` per chunk that a sync joined. Chunks that the end of the response
  joins have no curve. Pointing at a token fades those that it could not see (`seen`). Colours follow the reader's
  light or dark scheme. `caption` replaces `figures(trace)`. Without `alone` the page has `timeline_style` and
  `SCRIPT`, once for all of its timelines.
  """
  plot = _Plot(trace)
  joined = {c: at for c, at in joins(trace, vocabulary).items() if trace.threads[c].finished}
  latest: dict[tuple[int, int], int] = {}
  for c, at in joined.items():
    latest[at] = max(latest.get(at, 0), int(trace.threads[c].rounds[-1]))
  edges, syncs = [], []
  for thread in trace.threads[1:]:
    if thread.length:
      edges.append(_fork(plot, thread, trace.threads[thread.parent]))
  for where, last in latest.items():
    parent, index = where
    resumed = _resumed(trace.threads[parent], index, last)
    x, y = plot.x(resumed), plot.y(parent)
    here = [c for c in joined if joined[c] == where]
    edges += [_join(plot, trace.threads[c], parent, resumed) for c in here]
    names = ", ".join(drawable(trace.threads[c].topic) for c in here)
    # Where curves coincide they have the parent's colour.
    edges.append(
      f'<g class="{_kind(parent)}"><path class="edge stroke trunk" '
      f'd="M{_n(x)},{_n(max(map(plot.y, here)) - _CORNER)} V{_n(y)}"/></g>'
    )
    syncs.append(
      f'<g class="{_kind(parent)}"><rect class="fill sync" x="{_n(x - 2)}" '
      f'y="{_n(y - _BAR / 2 - 4)}" width="4" height="{_BAR + 8}" rx="2">'
      f"<title>sync: joins {_attribute(names)}</title></rect></g>"
    )
  if trace.finish_reason != "unfinished" and plot.end:
    x = plot.x(plot.end + 1)
    syncs.append(
      f'<line class="line" x1="{_n(x)}" x2="{_n(x)}" y1="{_TOP - 4}" y2="{_n(plot.bottom + 4)}" '
      f'stroke-dasharray="4 3" stroke-width="1.5"/>'
      f'<text class="muted small" text-anchor="middle" x="{_n(x)}" y="{_TOP - 9}">end</text>'
    )
  height = plot.bottom + _FOOT
  beyond = any(reserve(t)[1] for t in trace.threads)
  lanes = "\n".join(
    _lane(plot, t, trace.readings[t.number], vocabulary, seen)
    for t, seen in zip(by_tree(trace), seen_by(trace, vocabulary))
  )
  style, script = (f"<style>{_SVG_STYLE}</style>\n", f"<script>{SCRIPT}</script>\n") if alone else ("", "")
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" class="pasta-timeline" '
    f'viewBox="0 0 {WIDTH} {_n(height)}" width="{WIDTH}" height="{_n(height)}" '
    f'role="img" aria-label="Timeline of a response">\n'
    f'{style}<rect class="card" x=".5" y=".5" width="{WIDTH - 1}" height="{_n(height - 1)}" rx="12"/>\n'
    f"{_caption(figures(trace) if caption is None else caption)}\n"
    f"{_scale(plot)}\n{''.join(edges)}\n{lanes}\n{''.join(syncs)}\n"
    f"{_legend(plot.bottom + 38, beyond=beyond)}\n{script}</svg>\n"
  )


# The page.


def _hues_css(hues: tuple[str, ...]) -> str:
  return " ".join(f".h{i} {{ --hue: {h} }}" for i, h in enumerate(hues))


_PAGE_STYLE = f"""
:root {{ color-scheme: light dark; --page: #f4f6f8; --card: {_LIGHT_BASE[0]}; --ink: {_LIGHT_BASE[1]};
  --muted: {_LIGHT_BASE[2]}; --line: {_LIGHT_BASE[3]} }}
{_hues_css(_LIGHT)}
@media (prefers-color-scheme: dark) {{
:root {{ --page: #0b0e13; --card: {_DARK_BASE[0]}; --ink: {_DARK_BASE[1]}; --muted: {_DARK_BASE[2]};
  --line: {_DARK_BASE[3]} }}
{_hues_css(_DARK)}
}}
body {{ margin: 0; padding: 32px 24px 64px; background: var(--page); color: var(--ink);
  font: 16px/1.65 {_FONT} }}
main {{ max-width: {WIDTH}px; margin: 0 auto }}
.scroll {{ overflow-x: auto }}
.scroll svg {{ display: block; min-width: 900px; width: 100%; height: auto }}
article {{ margin-top: 24px; padding: 28px max(32px, 100% - 88ch) 28px 32px; background: var(--card);
  border: 1px solid var(--line); border-radius: 12px; white-space: pre-wrap; overflow-wrap: anywhere }}
.chunk {{ padding: .1em .3em; margin: 0 -.1em; border-radius: 5px; box-decoration-break: clone;
  -webkit-box-decoration-break: clone; background: color-mix(in srgb, var(--hue) 15%, var(--card));
  box-shadow: inset 0 -2px 0 color-mix(in srgb, var(--hue) 55%, transparent) }}
.chunk:hover {{ background: color-mix(in srgb, var(--hue) 28%, var(--card)) }}
"""


def _answer(trace: Trace, number: int, vocabulary: Vocabulary) -> str:
  """A thread's text in reading order, chunks in spans of their colour."""
  parts = []
  for piece in pieces(trace, number, vocabulary):
    if piece.kind == "text":
      parts.append(escape(drawable(piece.text)))
    elif piece.child is not None:
      child = trace.threads[piece.child]
      parts.append(
        f'<span class="chunk h{hue(child.number)}" data-thread="{child.number}" '
        f'title="{_attribute(child.topic)}: {length_label(child)}">'
        f"{_answer(trace, child.number, vocabulary)}</span>"
      )
  return "".join(parts)


def timeline_html(
  trace: Trace, vocabulary: Vocabulary, title: str = "A response, written in parallel"
) -> str:
  """A self-contained page: the timeline, and below it the answer in reading order.

  Chunks have the colour of their lanes; pointing at the text of a chunk fades the other lanes.
  """
  fade = "\n".join(
    f'main:has(.chunk[data-thread="{t.number}"]:hover:not(:has(.chunk:hover))) '
    f'svg .lane:not([data-thread="{t.number}"]) {{ opacity: .3 }}'
    for t in trace.threads[1:]
  )
  answer = _answer(trace, 0, vocabulary) if trace.threads else ""
  return (
    f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
    f'<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
    f"<title>{escape(drawable(title))}</title>\n<style>{_PAGE_STYLE}{fade}</style>\n</head>\n"
    f"<body>\n<main>\n"
    f'<div class="scroll">\n{timeline_svg(trace, vocabulary)}</div>\n<article>{answer}</article>\n'
    f"</main>\n</body>\n</html>\n"
  )


def write_timeline(path: str | Path, trace: Trace, vocabulary: Vocabulary) -> None:
  """Writes `timeline_html` or `timeline_svg`, by the suffix of `path`. Raises ValueError for another
  suffix."""
  path = Path(path)
  if path.suffix not in (".html", ".svg"):
    raise ValueError(f"timeline {path}: the name must end in .html or .svg")
  draw: Callable[..., str] = timeline_html if path.suffix == ".html" else timeline_svg
  write_atomic(path, draw(trace, vocabulary))
