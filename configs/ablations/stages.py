"""Stage two, stage by stage, as the paper's figure 5: SFT, 10 % of round one, round one, 10 % and 60 % of round two,
for the quality weights 1, 2, 4 and 8, by the paper's recipe (`configs/paper/recipe.py`).

    python configs/ablations/stages.py RUNS_FOLDER TRAINING_PROMPTS EVALUATION_PROMPTS [flags for all] | bash -e

The training keeps the adapters of these shares of a round (`preference.keep`); one evaluation answers the prompts
with all of them. The second round runs to its end, and its last adapter is evaluated too (`2_whole`). It starts from
the adapters that the recipe leaves; others are `--config.model.adapter` and `--config.systems.baseline.adapter`.
"""

import dataclasses
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a script

from ml_collections import ConfigDict  # noqa: E402

from configs import smollm2_135m  # noqa: E402
from pasta_jax.config import System, from_flags, to_flags, with_changes  # noqa: E402
from pasta_jax.config.sections import kept_folder  # noqa: E402

WEIGHTS = (1.0, 2.0, 4.0, 8.0)
KEPT = (0.1, 0.6)
# Of a policy: (round, share of its steps; 1: all).
STAGES = ((1, 0.1), (1, 1.0), (2, 0.1), (2, 0.6), (2, 1.0))


def name(weight: float, number: int, share: float) -> str:
  """Of the system that a policy is after a share of round `number`."""
  return f"weight_{weight:g}_round{number}_" + ("whole" if share == 1 else f"at{100 * share:g}")


def get_config(arg: str = "") -> ConfigDict:
  """No `arg`. The systems of evaluations are Pasta-SFT and the policies at each stage."""
  if arg:
    raise ValueError(f"stages: unknown argument {arg!r}; leave it out")
  config = from_flags(smollm2_135m.get_config("paper"))
  names = [name(w, *stage) for w in WEIGHTS for stage in STAGES]
  config = dataclasses.replace(config, systems={**config.systems, **{n: System() for n in names}})
  return to_flags(
    with_changes(
      config,
      {
        "preference.weights": WEIGHTS,
        "preference.keep": KEPT,
        "preference.stages": "sample,judge,train",
        "eval.systems": ("pasta", *names),
      },
    )
  )


def sweep(runs: str, prompts: str, held_out: str, *flags: str) -> list[str]:
  """Commands that optimise on `prompts`, and evaluate every stage on `held_out`, under the folder `runs`."""
  common = ["python", "main.py", "--config=configs/ablations/stages.py", *flags]
  workdir = Path(runs) / "preference"
  held_out_flag = f"--config.eval.prompts={held_out}"
  adapters = []
  for weight in WEIGHTS:
    for number, share in STAGES:
      train = workdir / f"weight_{weight:g}" / f"round{number}" / "train"
      folder = train if share == 1 else train / kept_folder(share)
      adapters.append(
        f"--config.systems.{name(weight, number, share)}.adapter={folder / 'adapter.safetensors'}"
      )
  commands = [
    [
      *common,
      "--mode=preference",
      f"--workdir={workdir}",
      f"--config.preference.prompts={prompts}",
      held_out_flag,
    ],
    [*common, "--mode=eval", f"--workdir={Path(runs) / 'eval'}", held_out_flag, *adapters],
  ]
  return [shlex.join(c) for c in commands]


if __name__ == "__main__":
  if len(sys.argv) < 4:
    sys.exit(
      "usage: python configs/ablations/stages.py RUNS_FOLDER TRAINING_PROMPTS EVALUATION_PROMPTS [flags]"
    )
  print("\n".join(sweep(*sys.argv[1:])))
