"""What is it worth to see the other chunks? Nats a token of annotated rows under three rules of sight.

    python -m pasta_jax.evaluate.sight_worth --config=configs/smollm2_135m.py --data=rows.jsonl --output=runs/sight

The rows are laid out in the form of `config.model.adapter` and read by it once under each rule:

    promise   a chunk sees what stood before its promise, and no other chunk
    live      every token sees the text before it, in reading order, as far as it is written by then
    full      every token sees all text before it in reading order: no decoder that runs chunks in parallel can

The reader's text is counted, without tags, topics and numbers; differences to `promise` are paired by row, with 95 %
intervals by bootstrap over rows. Likelihood says what sight is worth to the model, not what a reader thinks of it.
Writes OUTPUT.json and OUTPUT.svg.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.figure
import numpy as np
import rich.console
import rich.table
from absl import app, flags
from flax import nnx
from ml_collections import config_flags

from pasta_jax.config import from_flags
from pasta_jax.data.examples import encoded, mix, program_of
from pasta_jax.decode.generator import Model
from pasta_jax.decode.settings import padded_length
from pasta_jax.lang.layout import NO_TARGET, Layout, layout
from pasta_jax.lang.thread import read_all
from pasta_jax.lang.visibility import is_visible, is_visible_live
from pasta_jax.model.attention import dense_attention, sliding_window_mask
from pasta_jax.utils.files import atomic_path, write_json_atomic
from pasta_jax.utils.progress import progress_bar
from pasta_jax.utils.text import one_line

RESAMPLES = 2000
PARTS = ("all text", "chunks", "main text")


class Nats(NamedTuple):
  """Sums over the text tokens of one row, by part (`PARTS`)."""

  nats: dict[str, np.ndarray]  # by rule
  tokens: np.ndarray


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


def measure(model: Model, rows: Sequence[dict]) -> list[Nats]:
  """The sums of each row under each rule. Rows without chunks count as main text."""
  graph, params = nnx.split(model.model)
  run = jax.jit(partial(_log_p, graph))
  vocabulary, rule, found = model.vocabulary, model.forms.positions, []
  bar, task = progress_bar("reading rows", len(rows))
  with bar:
    for row in rows:
      thread = encoded(program_of(row), vocabulary, rule)
      laid = layout(thread, rule, vocabulary.table, model.encode(row["prompt"]))
      is_text = [r.is_text for r in read_all(thread, vocabulary.table, numbered=rule.numbered)]
      at, asked = np.arange(len(laid)), np.flatnonzero(laid.targets != NO_TARGET)
      # A query predicts its thread's next token; the prompt's last one the main thread's first.
      following = zip(laid.threads[asked], np.maximum(laid.index[asked] + 1, 0))
      text, chunk = np.array([is_text[t][i] for t, i in following], bool), laid.threads[asked] > 0
      parts = [text, text & chunk, text & ~chunk]
      size = padded_length(len(laid))
      padded = [np.pad(x, (0, size - len(x))) for x in (laid.tokens, laid.positions, laid.targets)]
      nats = {}
      for name, sees in RULES.items():
        mask = np.eye(size, dtype=bool)
        mask[: len(laid), : len(laid)] = sees(laid, at)
        log_p = np.asarray(run(params, *padded, mask), np.float64)
        nats[name] = np.array([-log_p[asked[part]].sum() for part in parts])
      found.append(Nats(nats, np.array([part.sum() for part in parts])))
      bar.advance(task)
  return found


def _log_p(graph, params, tokens, positions, targets, mask) -> jax.Array:
  """[T] log p of each query's target."""
  model = nnx.merge(graph, params)
  window = sliding_window_mask(positions[None], positions[None], model.config.window)
  attend = dense_attention(
    mask[None], model.dtype, window_mask=window, softcap=model.config.attention_softcap
  )
  hidden, _ = model(tokens[None], positions[None], attend)
  logits = model.logits(hidden)[0]
  chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1)[:, 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)


def summarise(rows: Sequence[Nats], seed: int = 0) -> dict[str, dict[str, dict[str, float]]]:
  """By part and rule: nats a token, and the difference to `promise` with its 95 % interval."""
  nats = {name: np.array([r.nats[name] for r in rows]) for name in RULES}  # [rows, parts]
  tokens = np.array([r.tokens for r in rows])
  drawn = np.random.default_rng(seed).integers(0, len(rows), (RESAMPLES, len(rows)))
  out: dict[str, dict[str, dict[str, float]]] = {}
  for k, part in enumerate(PARTS):
    if not tokens[:, k].sum():
      continue
    out[part] = {}
    for name in RULES:
      less = nats[name][:, k] - nats["promise"][:, k]
      resampled = less[drawn].sum(axis=1) / np.maximum(tokens[:, k][drawn].sum(axis=1), 1)
      low, high = np.quantile(resampled, [0.025, 0.975])
      whole = tokens[:, k].sum()
      out[part][name] = {
        "nats": float(nats[name][:, k].sum() / whole),
        "difference": float(less.sum() / whole),
        "low": float(low),
        "high": float(high),
        "tokens": int(whole),
      }
  return out


def draw(figures: dict[str, dict[str, dict[str, float]]]) -> matplotlib.figure.Figure:
  """Differences to `promise` by part, with intervals; less is better."""
  figure = matplotlib.figure.Figure(figsize=(6.4, 2.6), layout="constrained")
  axes = figure.subplots()
  for k, (name, colour) in enumerate((("live", "#2f7de1"), ("full", "#1f9d6b"))):
    for y, part in enumerate(figures):
      f = figures[part][name]
      axes.plot([f["low"], f["high"]], [y + 0.16 * k] * 2, color=colour, lw=2, label=name if not y else None)
      axes.plot(f["difference"], y + 0.16 * k, "o", color=colour)
  axes.axvline(0, color="#888", lw=1)
  axes.set_yticks(range(len(figures)), list(figures))
  axes.invert_yaxis()
  axes.set_xlabel("nats a token, against promise (95 % interval over rows)")
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(frameon=False)
  return figure


def show(figures: dict[str, dict[str, dict[str, float]]], rows: int) -> None:
  table = rich.table.Table(title=f"nats a token of {rows} rows, and the difference to promise (95 %)")
  for heading in ("", "tokens", *RULES):
    table.add_column(heading, justify="right" if heading else "left")
  for part, by_rule in figures.items():
    against = lambda f: f"\n{f['difference']:+.3f} ({f['low']:+.3f} to {f['high']:+.3f})"
    cells = [f"{f['nats']:.3f}" + ("" if name == "promise" else against(f)) for name, f in by_rule.items()]
    table.add_row(part, f"{by_rule['promise']['tokens']:,}", *cells)
  rich.console.Console().print(table)


def main(argv: list[str]) -> None:
  del argv
  values = flags.FLAGS
  try:
    config = from_flags(values.config)
    rows = mix([f for f in values.data.split(",") if f])
    if values.limit:
      rows = [rows[i * len(rows) // values.limit] for i in range(min(values.limit, len(rows)))]
    if not rows:
      raise ValueError("--data names no rows")
    figures = summarise(measure(Model(config, dtype="float32"), rows))
    out = Path(values.output)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(out.with_name(out.name + ".json"), figures)
    with matplotlib.rc_context({"svg.hashsalt": "pasta", "svg.fonttype": "none"}):
      with atomic_path(out.with_name(out.name + ".svg")) as path:
        draw(figures).savefig(path, format="svg", metadata={"Date": None})
  except (ValueError, OSError) as error:
    sys.exit(f"error: {one_line(str(error))}")
  show(figures, len(rows))


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", "configs/smollm2_135m.py")
  flags.DEFINE_string("data", "data/seed.jsonl", "files of annotated rows, separated by commas")
  flags.DEFINE_string("output", "runs/sight", "files to write, without their endings")
  flags.DEFINE_integer("limit", 0, "rows, spread evenly; 0: all", lower_bound=0)
  app.run(main)
