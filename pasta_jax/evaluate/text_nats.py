"""Which form of the language writes the text best? Nats of the same annotated rows by several adapters.

    python -m pasta_jax.evaluate.text_nats --adapters=baseline,pasta,pasta@live,runs/x/adapter.safetensors \\
      --data=rows.jsonl --output=runs/text_nats

Each row is laid out in the adapter's own form, which its metadata say, and read under its own rule of sight, in
float32; an adapter without tags, such as Baseline-SFT, reads the plain response. `@promise`, `@live` or `@full` after
an adapter reads it under another rule (`pasta_jax.evaluate.sight_worth`).

Sums are divided by the tokens of the plain responses in the first adapter's tokenizer, whatever the form: chunk
borders and heads cut the same text into other tokens. The parts add up to the likelihood of the whole response:

    text      what the reader sees
    control   tags, topics and numbers: nothing for an adapter without tags
    end       the end of the turn

Differences to the first adapter are paired by row, with 95 % intervals by bootstrap over rows. Writes OUTPUT.json and
OUTPUT.svg.
"""

from collections.abc import Sequence

import numpy as np
from absl import app, flags

from pasta_jax.config import Config
from pasta_jax.decode.generator import Model, source_of
from pasta_jax.evaluate.nats import RULES, Figures, Scored, define_flags, run, scored, summarise

PARTS = ("text", "control", "end")


def split(name: str) -> tuple[str, str]:
  """(adapter, rule of sight) of an entry of --adapters; "" for the adapter's own rule."""
  adapter, _, rule = name.rpartition("@")
  return (adapter, rule) if adapter and rule in RULES else (name, "")


def sums(row: Scored, rule: str) -> list[float]:
  """Nats of the parts of one row."""
  nats = row.nats[rule]
  return [float(nats[part].sum()) for part in (row.is_text, ~(row.is_text | row.is_end), row.is_end)]


def compare(config: Config, rows: Sequence[dict], names: Sequence[str]) -> Figures:
  """The figures of each entry of --adapters, against the first one. Raises ValueError, one line, for entries that
  cannot be compared, before any reading."""
  if not names or len(set(names)) < len(names):
    raise ValueError("--adapters needs names or files of adapters, separated by commas, none of them twice")
  wanted = {name: split(name) for name in names}
  for adapter, _ in wanted.values():
    source_of(config, adapter)  # can it be read?
  nats: dict[str, np.ndarray] = {}
  tokens: list[int] = []
  for adapter in dict.fromkeys(adapter for adapter, _ in wanted.values()):
    model = Model(config, adapter=adapter, dtype="float32")
    rules = {name: rule or model.forms.visibility for name, (a, rule) in wanted.items() if a == adapter}
    read = list(scored(model, rows, sorted(set(rules.values()))))
    nats |= {name: np.array([sums(row, rule) for row in read]) for name, rule in rules.items()}
    tokens = tokens or [len(model.vocabulary.tokenizer.encode(row["response"])) for row in rows]
  return summarise(
    {n: nats[n] for n in names}, np.repeat(np.array(tokens)[:, None], len(PARTS), axis=1), PARTS
  )


def main(argv: list[str]) -> None:
  del argv
  run(lambda config, rows: compare(config, rows, [n for n in flags.FLAGS.adapters.split(",") if n]))


if __name__ == "__main__":
  define_flags("runs/text_nats")
  flags.DEFINE_string(
    "adapters", "baseline,pasta", "names or files of adapters, separated by commas; NAME@RULE"
  )
  app.run(main)
