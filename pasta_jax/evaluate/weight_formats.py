"""What do 8 bits cost? Logits of annotated rows in several formats of the same weights, against float32.

    python -m pasta_jax.evaluate.weight_formats --data=data/seed.jsonl --limit=24 --formats=bfloat16,int8,fp8 \\
      --output=runs/formats

A format is a value of `decode.dtype`. The rows are laid out in the form of `config.model.adapter` and read by it once
in each format, in one forward pass. Tokens that the model predicts count, tags too. By format:

    largest, mean    absolute differences of logits to those of float32, over the vocabulary
    kl               KL(float32 || format) of the next token's distribution, nats a token
    same             share of tokens for which both find the same next token the likeliest
    nats             -log p of the rows' tokens, nats a token
    megabytes        of the model's arrays, an untied head included

Writes OUTPUT.json.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
from absl import app, flags
from flax import nnx

from pasta_jax.config import Config, from_flags
from pasta_jax.decode.generator import Model
from pasta_jax.evaluate.nats import define_flags, laid_out, logits_of, padded, rows_of_flags
from pasta_jax.lang.layout import NO_TARGET
from pasta_jax.utils.files import write_json_atomic
from pasta_jax.utils.progress import progress_bar
from pasta_jax.utils.text import one_line

EXACT = "float32"


@jax.jit
def differences(exact: jax.Array, other: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
  """By figure, [T]: those of each token of a row whose logits [T, V] are `exact` and `other`."""
  error = jnp.abs(other - exact)
  log_p, log_q = jax.nn.log_softmax(exact), jax.nn.log_softmax(other)
  return {
    "largest": error.max(axis=-1),
    "mean": error.mean(axis=-1),
    "kl": jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1),
    "same": exact.argmax(axis=-1) == other.argmax(axis=-1),
    "nats": -jnp.take_along_axis(log_q, jnp.maximum(targets, 0)[:, None], axis=-1)[:, 0],
  }


def compare(config: Config, rows: Sequence[dict], formats: Sequence[str]) -> dict[str, dict[str, float]]:
  """The figures of float32, and of each of `formats`. Raises ValueError, one line, for a format that cannot be used,
  and as `nats.scored` for a row."""
  names = list(dict.fromkeys((EXACT, *formats)))
  models = {name: Model(config, dtype=name) for name in names}
  found: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in names}
  bar, task = progress_bar("reading rows", len(rows))
  with bar:
    for row in rows:
      laid, _ = laid_out(models[EXACT], row)
      tokens, positions, targets, mask = padded(laid, models[EXACT].forms.visibility)
      exact = None
      for name, model in models.items():
        logits = logits_of(*nnx.split(model.model), tokens, positions, mask)
        exact = logits if exact is None else exact
        figures = jax.device_get(differences(exact, logits, targets))
        found[name].append({key: x[targets != NO_TARGET] for key, x in figures.items()})
      bar.advance(task)
  return {name: summary(found[name]) | {"megabytes": megabytes(models[name])} for name in names}


def summary(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
  """Over the tokens of all rows: their number, the largest difference, and means of the other figures."""
  whole = {key: np.concatenate([row[key] for row in rows]).astype(np.float64) for key in rows[0]}
  means = {key: float(x.max() if key == "largest" else x.mean()) for key, x in whole.items()}
  return {"tokens": len(whole["kl"])} | means


def megabytes(model: Model) -> float:
  """Of the model's arrays."""
  return sum(x.nbytes for x in jax.tree.leaves(nnx.state(model.model))) / 1e6


def show(figures: dict[str, dict[str, float]]) -> None:
  """The table in the terminal."""
  table = rich.table.Table(title=f"{figures[EXACT]['tokens']:,} tokens, against {EXACT}")
  table.add_column("")
  for heading in ("largest", "mean", "KL, nats", "same token", "nats", "MB"):
    table.add_column(heading, justify="right", no_wrap=True)
  for name, f in figures.items():
    against = ["", "", "", ""]
    if name != EXACT:
      against = [f"{f['largest']:.3f}", f"{f['mean']:.4f}", f"{f['kl']:.5f}", f"{100 * f['same']:.2f} %"]
    table.add_row(name, *against, f"{f['nats']:.4f}", f"{f['megabytes']:.0f}")
  rich.console.Console().print(table)


def main(argv: list[str]) -> None:
  del argv
  values = flags.FLAGS
  try:
    figures = compare(from_flags(values.config), rows_of_flags(), [f for f in values.formats if f])
    out = Path(values.output)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(out.with_name(out.name + ".json"), figures)
  except (ValueError, OSError) as error:
    sys.exit(f"error: {one_line(str(error))}")
  show(figures)


if __name__ == "__main__":
  define_flags("runs/formats")
  flags.DEFINE_list("formats", ["bfloat16", "int8", "fp8"], "values of decode.dtype")
  app.run(main)
