"""Nats of annotated rows: laid out in an adapter's form, read once under each rule of sight, compared by row.

What `sight_worth` (one adapter, several rules), `text_nats` (several adapters, each under its own) and, in parts,
`weight_formats` share.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.figure
import numpy as np
import rich.console
import rich.table
from absl import flags
from flax import nnx
from ml_collections import config_flags
from rich.markup import escape

from pasta_jax.config import Config, from_flags
from pasta_jax.data.examples import encoded, mix, program_of, prompt_of, row_name
from pasta_jax.decode.generator import Model
from pasta_jax.decode.settings import padded_length
from pasta_jax.evaluate.report.plots import colours
from pasta_jax.lang.layout import NO_TARGET, Layout, layout
from pasta_jax.lang.program import Text, reading_order
from pasta_jax.lang.thread import Thread, read_all
from pasta_jax.lang.visibility import is_visible, is_visible_live
from pasta_jax.model.attention import dense_attention, sliding_window_mask
from pasta_jax.utils.files import atomic_path, write_json_atomic
from pasta_jax.utils.jsonl import DataError
from pasta_jax.utils.progress import progress_bar
from pasta_jax.utils.text import one_line

RESAMPLES = 2000
Figures = dict[str, dict[str, dict[str, float]]]  # by part, then by name (`summarise`)


def _by_intervals(laid: Layout, at: np.ndarray) -> np.ndarray:
  return is_visible(at[:, None], at[None], laid.masked_intervals[None])


def _by_rounds(laid: Layout, at: np.ndarray) -> np.ndarray:
  return is_visible_live(at[:, None], at[None], laid.rounds[:, None], laid.rounds[None])


def _by_order(laid: Layout, at: np.ndarray) -> np.ndarray:
  del laid
  return at[None] <= at[:, None]


# [T, T] bool of a row: whether a query sees a key.
RULES: dict[str, Callable[[Layout, np.ndarray], np.ndarray]] = {
  "promise": _by_intervals,
  "live": _by_rounds,
  "full": _by_order,
}


@dataclasses.dataclass(frozen=True)
class Scored:
  """The n tokens that are predicted of one row: all but the prompt's and the interpreter's <async>."""

  nats: dict[str, np.ndarray]  # by rule: [n] -log p
  is_text: np.ndarray  # [n] bool: the reader sees it
  is_end: np.ndarray  # [n] bool: the end of the turn
  in_chunk: np.ndarray  # [n] bool


def scored(model: Model, rows: Sequence[dict], rules: Sequence[str]) -> Iterator[Scored]:
  """Reads each row once under each rule, in the form of the model's adapter; without its tags for one that has none.

  Raises DataError for a row that is unusable, or has a character that the vocabulary lacks.
  """
  graph, params = nnx.split(model.model)
  table, rule = model.vocabulary.table, model.forms.positions
  bar, task = progress_bar("reading rows", len(rows))
  with bar:
    for row in rows:
      laid, thread = laid_out(model, row)
      is_text = [r.is_text for r in read_all(thread, table, numbered=rule.numbered)]
      asked = np.flatnonzero(laid.targets != NO_TARGET)
      # A query predicts its thread's next token; the prompt's last one the main thread's first.
      following = zip(laid.threads[asked], np.maximum(laid.index[asked] + 1, 0))
      nats = {}
      for name in rules:
        nats[name] = -np.asarray(_log_p(graph, params, *padded(laid, name)), np.float64)[asked]
      yield Scored(
        nats,
        np.array([is_text[t][i] for t, i in following], bool),
        np.isin(laid.targets[asked], table.tags.eos),
        laid.threads[asked] > 0,
      )
      bar.advance(task)


def laid_out(model: Model, row: dict) -> tuple[Layout, Thread]:
  """A row in the form of the model's adapter, and the main thread of its response. Raises as `scored`."""
  prompt, thread = _tokens(model, row)
  return layout(thread, model.forms.positions, model.vocabulary.table, prompt), thread


def padded(laid: Layout, rule: str) -> list[np.ndarray]:
  """tokens, positions, targets [T] and the mask [T, T] of a row under a rule of sight, in one of few lengths T."""
  size, at = padded_length(len(laid)), np.arange(len(laid))
  mask = np.eye(size, dtype=bool)
  mask[: len(laid), : len(laid)] = RULES[rule](laid, at)
  pad = lambda x, fill=0: np.pad(x, (0, size - len(x)), constant_values=fill)
  return [pad(laid.tokens), pad(laid.positions), pad(laid.targets, NO_TARGET), mask]


def _tokens(model: Model, row: dict) -> tuple[list[int], Thread]:
  """The prompt's tokens, and the main thread of the response."""
  try:
    program = program_of(row, model.forms.visibility)
    if not model.has_tags:
      program = (Text(reading_order(program)),)
    return model.encode(prompt_of(row)), encoded(program, model.vocabulary, model.forms.positions)
  except DataError:
    raise
  except ValueError as error:
    raise DataError(f"{row_name(row)}: {error}") from None


@partial(jax.jit, static_argnums=0)
def _log_p(graph, params, tokens, positions, targets, mask) -> jax.Array:
  """[T] log p of each query's target."""
  logits = logits_of(graph, params, tokens, positions, mask)
  chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1)[:, 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)


@partial(jax.jit, static_argnums=0)
def logits_of(graph, params, tokens, positions, mask) -> jax.Array:
  """[T, V] of a row."""
  model = nnx.merge(graph, params)
  window = sliding_window_mask(positions[None], positions[None], model.config.window)
  attend = dense_attention(
    mask[None], model.dtype, window_mask=window, softcap=model.config.attention_softcap
  )
  hidden, _ = model(tokens[None], positions[None], attend)
  return model.logits(hidden)[0]


def summarise(
  nats: Mapping[str, np.ndarray], tokens: np.ndarray, parts: Sequence[str], seed: int = 0
) -> Figures:
  """By part and name: nats a token, and the difference to the first name with its 95 % interval.

  `nats` and `tokens` are sums [rows, parts]; a part without tokens is left out. The interval is a bootstrap over
  rows, paired: each resample has the same rows of every name.
  """
  first, n = next(iter(nats.values())), len(tokens)
  drawn = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
  out: Figures = {}
  for k, part in enumerate(parts):
    if not (total := tokens[:, k].sum()):
      continue
    out[part] = {}
    resampled_tokens = np.maximum(tokens[:, k][drawn].sum(axis=1), 1)
    for name, sums in nats.items():
      less = sums[:, k] - first[:, k]
      low, high = np.quantile(less[drawn].sum(axis=1) / resampled_tokens, [0.025, 0.975])
      out[part][name] = {
        "nats": float(sums[:, k].sum() / total),
        "difference": float(less.sum() / total),
        "low": float(low),
        "high": float(high),
        "tokens": int(total),
      }
  return out


def _label(name: str) -> str:
  """A name in tables and figures: that of a run instead of its adapter's file."""
  return one_line(name.replace("/adapter.safetensors", ""), 60)


def draw(figures: Figures) -> matplotlib.figure.Figure:
  """Differences to the first name, with intervals: a panel for each part, with a scale of its own. Less is better."""
  first, *names = next(iter(figures.values()))
  size = (2.6 * len(figures) + 1.2, 1.4 + 0.3 * len(names))
  figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
  panels = figure.subplots(1, len(figures), sharey=True, squeeze=False)[0]
  for axes, (part, by_name) in zip(panels, figures.items()):
    for y, (name, colour) in enumerate(colours(names).items()):
      f = by_name[name]
      axes.plot([f["low"], f["high"]], [y, y], color=colour, lw=2)
      axes.plot(f["difference"], y, "o", color=colour)
    axes.axvline(0, color="#888", lw=1)
    axes.set_title(part, fontsize=10)
    axes.locator_params(axis="x", nbins=4)
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
  panels[0].set_yticks(range(len(names)), [_label(name) for name in names])
  panels[0].set_ylim(max(len(names), 1) - 0.5, -0.5)
  figure.supxlabel(f"nats a token, against {_label(first)} (95 % interval over rows)", fontsize=10)
  return figure


def show(figures: Figures, title: str) -> None:
  """The table in the terminal."""
  first = next(iter(next(iter(figures.values()))))
  table = rich.table.Table(title=escape(f"{title}, and the difference to {_label(first)}"))
  table.add_column("")
  for heading in ("nats", "difference", "95 %"):
    table.add_column(heading, justify="right", no_wrap=True)
  for part, by_name in figures.items():
    table.add_section()
    table.add_row(f"[bold]{part}[/bold], {by_name[first]['tokens']:,} tokens")
    for name, f in by_name.items():
      against = [] if name == first else [f"{f['difference']:+.4f}", f"{f['low']:+.4f} to {f['high']:+.4f}"]
      table.add_row(f"  {escape(_label(name))}", f"{f['nats']:.4f}", *against)
  rich.console.Console().print(table)


def define_flags(output: str) -> None:
  """The flags of these commands. `output`: the default of --output."""
  config_flags.DEFINE_config_file("config", "configs/smollm2_135m.py")
  flags.DEFINE_string("data", "data/seed.jsonl", "files of annotated rows, separated by commas")
  flags.DEFINE_string("output", output, "files to write, without their endings")
  flags.DEFINE_integer("limit", 0, "rows, spread evenly; 0: all", lower_bound=0)


def rows_of_flags() -> list[dict]:
  """The rows of --data, at most --limit. Raises ValueError for none, and as `mix`."""
  values = flags.FLAGS
  rows = mix([f for f in values.data.split(",") if f])
  if values.limit:
    rows = [rows[i * len(rows) // values.limit] for i in range(min(values.limit, len(rows)))]
  if not rows:
    raise ValueError("--data names no rows")
  return rows


def run(compare: Callable[[Config, list[dict]], Figures]) -> None:
  """A command: the rows of --data, compared, as OUTPUT.json, OUTPUT.svg and a table."""
  values = flags.FLAGS
  try:
    config, rows = from_flags(values.config), rows_of_flags()
    figures = compare(config, rows)
    out = Path(values.output)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(out.with_name(out.name + ".json"), figures)
    with matplotlib.rc_context({"svg.hashsalt": "pasta", "svg.fonttype": "none", "text.parse_math": False}):
      with atomic_path(out.with_name(out.name + ".svg")) as path:
        draw(figures).savefig(path, format="svg", metadata={"Date": None})
  except (ValueError, OSError) as error:
    sys.exit(f"error: {one_line(str(error))}")
  show(figures, f"nats a token of {len(rows)} rows")
