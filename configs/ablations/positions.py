"""The paper's ablation of positions, and two later ideas: how far a promise jumps (docs/language.md section
4).

    python configs/ablations/positions.py RUNS_FOLDER TRAINING_DATA PROMPTS_FILE [flags for all] | bash -e

Each strategy trains in a folder of its own, then answers the prompts; `sweep()` gives the commands, which may
run on several machines. `oracle` needs true lengths, which nobody has while decoding: it is compared by its
validation loss alone (`--config.train.validation=FILE`).
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a script

from ml_collections import ConfigDict  # noqa: E402

from configs import smollm2_135m  # noqa: E402
from pasta_jax.lang.positions import STRATEGIES  # noqa: E402


def get_config(arg: str = "pred_10x") -> ConfigDict:
  """`arg`: one of the strategies."""
  if arg not in STRATEGIES:
    raise ValueError(f"positions: {arg!r} is none of {', '.join(STRATEGIES)}")
  config = smollm2_135m.get_config()
  config.language.update(visibility="promise", promise="topic", number="digits")  # the paper's forms
  config.positions.strategy = arg
  return config


def sweep(runs: str, data: str, prompts: str, *flags: str) -> list[str]:
  """Commands that train each strategy on `data` and evaluate it on `prompts`, under the folder `runs`."""
  commands = []
  for strategy in STRATEGIES:
    folder = Path(runs) / strategy
    common = ["python", "main.py", f"--config=configs/ablations/positions.py:{strategy}", *flags]
    commands.append([*common, "--mode=train", f"--workdir={folder / 'train'}", f"--config.train.data={data}"])
    if strategy != "oracle":
      commands.append(
        [
          *common,
          "--mode=eval",
          f"--workdir={folder / 'eval'}",
          f"--config.eval.prompts={prompts}",
          f"--config.model.adapter={folder / 'train' / 'adapter.safetensors'}",
        ]
      )
  return [shlex.join(c) for c in commands]


if __name__ == "__main__":
  if len(sys.argv) < 4:
    sys.exit("usage: python configs/ablations/positions.py RUNS_FOLDER TRAINING_DATA PROMPTS_FILE [flags]")
  print("\n".join(sweep(*sys.argv[1:])))
