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

from collections.abc import Sequence

import numpy as np
from absl import app

from pasta_jax.config import Config
from pasta_jax.decode.generator import Model
from pasta_jax.evaluate.nats import RULES, Figures, define_flags, run, scored, summarise

PARTS = ("all text", "chunks", "main text")


def measure(model: Model, rows: Sequence[dict]) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Sums [rows, parts] over text tokens: nats by rule, and tokens. Rows without chunks count as main text."""
  nats: dict[str, list] = {name: [] for name in RULES}
  tokens = []
  for s in scored(model, rows, list(RULES)):
    parts = [s.is_text, s.is_text & s.in_chunk, s.is_text & ~s.in_chunk]
    tokens.append([part.sum() for part in parts])
    for name in RULES:
      nats[name].append([s.nats[name][part].sum() for part in parts])
  return {name: np.array(sums) for name, sums in nats.items()}, np.array(tokens)


def compare(config: Config, rows: Sequence[dict]) -> Figures:
  """The figures of `config.model.adapter`."""
  return summarise(*measure(Model(config, dtype="float32"), rows), PARTS)


def main(argv: list[str]) -> None:
  del argv
  run(compare)


if __name__ == "__main__":
  define_flags("runs/sight")
  app.run(main)
