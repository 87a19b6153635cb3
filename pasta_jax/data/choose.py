"""The rows that a training would use, as one file of JSON lines.

    python -m pasta_jax.data.choose --config=configs/smollm2_135m.py --output=rows.jsonl \\
      --config.train.data=data/seed.jsonl*2,sft/train.jsonl

Rows are selected in the form of `config.language` by `train.length`, `train.min_speedup` and `train.plain_share`, and
written in the order of training: those with chunks first. Trainings in several forms use the same rows if they read
the file with `train.min_speedup=0` and `train.plain_share=1` (`configs/ablations/forms.py`).
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from pasta_jax.config import from_flags
from pasta_jax.data.examples import Selection, mix, of_training
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.utils.jsonl import write_jsonl
from pasta_jax.utils.text import one_line
from pasta_jax.weights.checkpoint import load_checkpoint


def choose(config, rows: Sequence[dict], vocabulary: Vocabulary) -> Selection:
  """The selection of `config.train`. Raises ValueError, one line, if no row is left, or for an unusable one."""
  found = of_training(config, rows, vocabulary)
  if not found.rows:
    raise ValueError(
      f"no row of train.data={','.join(config.train.data)!r} is left: try another train.min_speedup"
    )
  return found


def write(config, out: Path) -> str:
  """Writes the rows to `out`; returns a line that says how many were left out, and why."""
  rows = mix(config.train.data)
  found = choose(config, rows, load_checkpoint(config.model.source).vocabulary)
  out.parent.mkdir(parents=True, exist_ok=True)
  write_jsonl(out, ({k: v for k, v in rows[i].items() if k != "where"} for i in found.rows))
  return (
    f"{out}: {len(found.rows)} of {len(rows)} rows (left out: {found.too_long} too long, {found.too_slow} too slow, "
    f"{found.too_thin} with more or thinner chunks than wanted, {found.too_plain} beyond the share of plain ones)"
  )


def main(argv: list[str]) -> None:
  del argv
  try:
    print(write(from_flags(flags.FLAGS.config), Path(flags.FLAGS.output).expanduser()))
  except (ValueError, OSError) as error:
    sys.exit(f"error: {one_line(str(error))}")


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", "configs/smollm2_135m.py")
  flags.DEFINE_string("output", None, "file of JSON lines to write", required=True)
  app.run(main)
