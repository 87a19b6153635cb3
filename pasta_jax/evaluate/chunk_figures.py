"""What the promises and chunks of an evaluation are like, by system: beside the figures of its report.

    python -m pasta_jax.evaluate.chunk_figures --workdir=runs/eval

Reads the answers of `--mode=eval` with the tokenizer of `--config`; promises are counted over all answers.
"""

import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import rich.console
import rich.table
from absl import app, flags
from ml_collections import config_flags

from pasta_jax.config import from_flags
from pasta_jax.decode.record import ResponseRecord
from pasta_jax.decode.trace import from_json
from pasta_jax.evaluate.metrics import declared
from pasta_jax.evaluate.report.lengths import cells
from pasta_jax.lang.forms import from_config
from pasta_jax.lang.program import Program, promises, reading_order
from pasta_jax.utils.jsonl import read_jsonl
from pasta_jax.utils.terminal import as_text
from pasta_jax.utils.text import one_line
from pasta_jax.weights.checkpoint import load_checkpoint

_NEXT_ITEM = re.compile(r"\n\s*(?:\d+[.)]|[-*•])\s")  # a line within a chunk that begins an item of a list


def figures(records: Sequence[ResponseRecord], programs: Sequence[Program]) -> dict[str, str]:
  """By name, of the answers of one system; `programs` are what they wrote, in the same order."""
  lengths = [pair for record in records for pair in record.lengths]  # of whole chunks: promised, written
  chunks = [reading_order(p.body) for program in programs for p in promises(program)]
  of = lambda n, total: f"{n} of {total}"
  out = {
    "promises an answer": f"{len(chunks) / len(records):.2f}",
    "chunks that run into a next item": of(sum(map(bool, map(_NEXT_ITEM.search, chunks))), len(chunks)),
    "joins without a separator": of(sum(record.unseparated or 0 for record in records), len(chunks)),
    "text tokens, median": f"{statistics.median(record.text_tokens for record in records):.0f}",
  }
  if lengths:
    out["chunks longer than promised"] = of(sum(n > promised for promised, n in lengths), len(lengths))
  return out | cells(declared.summarise([record.lengths for record in records]))


def show(by_system: Mapping[str, Mapping[str, str]]) -> None:
  table = rich.table.Table("", *(rich.table.Column(as_text(name)) for name in by_system))
  for name in dict.fromkeys(name for found in by_system.values() for name in found):
    table.add_row(name, *(found.get(name, "–") for found in by_system.values()))
  rich.console.Console().print(table)


def main(argv: list[str]) -> None:
  del argv
  try:
    config = from_flags(flags.FLAGS.config)
    files = sorted(Path(flags.FLAGS.workdir).expanduser().glob("responses/*.jsonl"))
    if not files:
      raise ValueError(f"{flags.FLAGS.workdir} has no answers: it is the --workdir of --mode=eval")
    vocabulary, rule = load_checkpoint(config.model.source).vocabulary, from_config(config).positions
    found = {}
    for file in files:
      rows = [row for row in read_jsonl(file) if "trace" in row]  # Skeleton-of-Thought has none
      programs = [from_json(row["trace"], vocabulary, rule).program for row in rows]
      if rows:
        found[file.stem] = figures([ResponseRecord.from_json(row) for row in rows], programs)
  except (ValueError, OSError) as error:
    sys.exit(f"error: {one_line(str(error))}")
  show(found)


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", "configs/smollm2_135m.py")
  flags.DEFINE_string("workdir", None, "folder of an evaluation", required=True)
  app.run(main)
