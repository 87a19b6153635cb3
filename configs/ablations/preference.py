"""Stage two's ablations: what speed means in a sample's score, the weight of quality, and the number of
rounds.

    python configs/ablations/preference.py RUNS_FOLDER TRAINING_PROMPTS EVALUATION_PROMPTS [--paper] \\
      [flags for all] | bash -e

Each score trains in a folder of its own; its report shows every weight after every round. The first round's
samples are drawn and judged once and copied. `clock` joins where `--config.preference.cost=FILE` is among the
flags.

`--paper` is figure 8: its four scores, weights 1, 2, 4 and 8, and one round, by the paper's recipe
(`configs/paper/recipe.py`). It starts from the adapters that the recipe leaves; others are `--config.model.adapter`
and `--config.systems.baseline.adapter`.
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a script

from ml_collections import ConfigDict  # noqa: E402

from configs import smollm2_135m  # noqa: E402
from pasta_jax.config.sections import SCORES  # noqa: E402

FIGURE_8 = ("theoretical", "harmonic", "arithmetic", "parallelism")


def get_config(arg: str = "delivered") -> ConfigDict:
  """`arg`: one of the scores; with "paper_" before it, by the paper's recipe."""
  score, paper = arg.removeprefix("paper_"), arg.startswith("paper_")
  if score not in (FIGURE_8 if paper else SCORES):
    raise ValueError(f"preference: {score!r} is none of {', '.join(FIGURE_8 if paper else SCORES)}")
  config = smollm2_135m.get_config("paper" if paper else "")
  config.preference.score = score
  if paper:
    config.preference.update(weights="1,2,4,8", rounds=1)
  return config


def sweep(runs: str, prompts: str, held_out: str, *flags: str) -> list[str]:
  """Commands that optimise each score on `prompts` and evaluate it on `held_out`, under the folder `runs`."""
  paper, flags = "--paper" in flags, tuple(f for f in flags if f != "--paper")
  ours = [s for s in SCORES if s != "clock" or any("preference.cost=" in f for f in flags)]
  first, *others = FIGURE_8 if paper else ours
  run = lambda score: shlex.join(
    [
      "python",
      "main.py",
      f"--config=configs/ablations/preference.py:{'paper_' if paper else ''}{score}",
      "--mode=preference",
      f"--workdir={Path(runs) / score}",
      f"--config.preference.prompts={prompts}",
      f"--config.eval.prompts={held_out}",
      *flags,
    ]
  )
  commands = [run(first)]
  for score in others:
    here, there = (Path(runs) / s for s in (first, score))
    shared = shlex.join(
      map(str, (here / "start", here / "baseline.jsonl", here / "baseline.settings.json", there))
    )
    commands += [f"mkdir -p {shlex.quote(str(there))} && cp -rn {shared}", run(score)]
  return commands


if __name__ == "__main__":
  if len(sys.argv) < 4:
    sys.exit(
      "usage: python configs/ablations/preference.py RUNS_FOLDER TRAINING_PROMPTS EVALUATION_PROMPTS [--paper] "
      "[flags]"
    )
  print("\n".join(sweep(*sys.argv[1:])))
