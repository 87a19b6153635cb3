"""How far a promise jumps (docs/language.md section 4): the paper's ablation of positions, and two later ideas.

    python configs/ablations/positions.py RUNS_FOLDER TRAINING_DATA PROMPTS_FILE [--paper] [flags for all] | bash -e

Each strategy trains in a folder of its own, then answers the prompts; `sweep()` gives the commands, which may
run on several machines. The oracles need true lengths, which nobody has while decoding: they are compared by their
validation loss alone (`--config.train.validation=FILE`).

`--paper` is figure 6: its six strategies, `fixed` among them with its constant of 40, by the paper's recipe
(`configs/paper/recipe.py`), and Baseline-SFT on the same rows. Without it all strategies are trained by
`configs/smollm2_135m.py`'s own recipe in the paper's forms.
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a script

from ml_collections import ConfigDict  # noqa: E402

from configs import smollm2_135m  # noqa: E402
from pasta_jax.lang.positions import ORACLES, STRATEGIES  # noqa: E402

FIGURE_6 = ("pred_10x", "pred_1x", *ORACLES, "fixed")


def get_config(arg: str = "pred_10x") -> ConfigDict:
  """`arg`: one of the strategies; with "paper_" before it, by the paper's recipe."""
  strategy, paper = arg.removeprefix("paper_"), arg.startswith("paper_")
  if strategy not in (FIGURE_6 if paper else STRATEGIES):
    raise ValueError(f"positions: {strategy!r} is none of {', '.join(FIGURE_6 if paper else STRATEGIES)}")
  config = smollm2_135m.get_config("paper" if paper else "")
  config.language.update(visibility="promise", promise="topic", number="digits")  # the paper's forms
  config.positions.strategy = strategy
  if paper:
    config.positions.fixed = 40
  return config


def sweep(runs: str, data: str, prompts: str, *flags: str) -> list[str]:
  """Commands that train each strategy on `data` and evaluate it on `prompts`, under the folder `runs`."""
  paper = "--paper" in flags
  more = [f for f in flags if f != "--paper"]
  run = lambda config, mode, folder: [
    *("python", "main.py", f"--config={config}", *more, f"--mode={mode}", f"--workdir={folder}")
  ]
  train = lambda config, folder: [*run(config, "train", folder), f"--config.train.data={data}"]
  commands, baseline = [], Path(runs) / "baseline" / "train"
  if paper:
    commands.append(train("configs/smollm2_135m.py:paper_baseline", baseline))
  for strategy in FIGURE_6 if paper else STRATEGIES:
    config = f"configs/ablations/positions.py:{'paper_' if paper else ''}{strategy}"
    folder = Path(runs) / strategy
    commands.append(train(config, folder / "train"))
    if strategy not in ORACLES:
      adapters = [f"--config.model.adapter={folder / 'train' / 'adapter.safetensors'}"]
      if paper:
        adapters.append(f"--config.systems.baseline.adapter={baseline / 'adapter.safetensors'}")
      evaluate = run(config, "eval", folder / "eval")
      commands.append([*evaluate, f"--config.eval.prompts={prompts}", *adapters])
  return [shlex.join(c) for c in commands]


if __name__ == "__main__":
  if len(sys.argv) < 4:
    sys.exit(
      "usage: python configs/ablations/positions.py RUNS_FOLDER TRAINING_DATA PROMPTS_FILE [--paper] [flags]"
    )
  print("\n".join(sweep(*sys.argv[1:])))
