"""Entry point: `python main.py --mode=train|decode|eval --config=configs/….py`. See README.md."""

import os
import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

FLAGS = flags.FLAGS
flags.DEFINE_enum("mode", "decode", ["train", "decode", "eval"], "what to do")
flags.DEFINE_string("workdir", None, "folder of the run: checkpoints, metrics, results")
config_flags.DEFINE_config_file("config", "configs/smollm2_135m.py", "experiment, e.g. configs/x.py:argument",
                                lock_config=True)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  if FLAGS.mode == "train":
    from pasta_jax.train import sft
    sft.train(FLAGS.config, Path(FLAGS.workdir))


if __name__ == "__main__":
  app.run(main)
