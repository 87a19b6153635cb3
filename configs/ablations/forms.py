"""Forms of the language side by side (docs/language.md sections 2.5 and 3.1), and Baseline-SFT, on the same rows.

    python configs/ablations/forms.py RUNS_FOLDER TRAINING_DATA VALIDATION_DATA PROMPTS_FILE [flags for all] | bash -e

    topic      a promise names its topic; a chunk sees what stood before its promise (the paper's)
    head       the promising thread writes the head of a part, and a promise is one token
    live       the same, and chunks read along
    baseline   no tags

The form `topic` selects the rows, and the form `head` orders them, so that all trainings read one file of the same
examples in the same order. `sweep()` gives the commands: rows, trainings, one evaluation of all, and nats of the
text on the validation data. The trainings may run on several machines.
"""

import dataclasses
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a script

from ml_collections import ConfigDict  # noqa: E402

from pasta_jax.config import Config, System, to_flags, with_changes  # noqa: E402

FORMS = {
  "topic": {},
  "head": {"language.promise": "head", "language.number": "token"},
  "live": {"language.promise": "head", "language.number": "token", "language.visibility": "live"},
  "baseline": {"train.annotation": "none"},
}
SAME_ROWS = ["--config.train.min_speedup=0", "--config.train.plain_share=1"]


def get_config(arg: str = "topic") -> ConfigDict:
  """`arg`: one of the forms. The systems of evaluations have the forms' names."""
  if arg not in FORMS:
    raise ValueError(f"forms: {arg!r} is none of {', '.join(FORMS)}")
  config = Config()
  config = dataclasses.replace(
    config, systems={"topic": System(), "head": System(), "live": System(), **config.systems}
  )
  common = {"train.steps": 275, "eval.systems": tuple(f for f in FORMS if f != "baseline")}
  return to_flags(with_changes(config, common | FORMS[arg]))


def sweep(runs: str, data: str, validation: str, prompts: str, *flags: str) -> list[str]:
  """Commands that choose rows of `data`, train each form on them, answer `prompts` with all, and read `validation`,
  under the folder `runs`."""
  folder = Path(runs)
  by_topic, rows = folder / "rows_topic.jsonl", folder / "rows.jsonl"
  adapters = {form: folder / form / "train" / "adapter.safetensors" for form in FORMS}
  config = lambda form: f"--config=configs/ablations/forms.py:{form}"
  settings = [f for f in flags if f.startswith("--config.")]
  choose = lambda form, *more: ["python", "-m", "pasta_jax.data.choose", config(form), *settings, *more]
  commands = [
    choose("topic", f"--config.train.data={data}", f"--output={by_topic}"),
    choose("head", *SAME_ROWS, f"--config.train.data={by_topic}", f"--output={rows}"),
  ]
  for form in FORMS:
    mode = ["--mode=train", f"--workdir={adapters[form].parent}"]
    files = [f"--config.train.data={rows}", f"--config.train.validation={validation}"]
    commands.append(["python", "main.py", config(form), *flags, *mode, *SAME_ROWS, *files])
  systems = [f"--config.systems.{form}.adapter={adapter}" for form, adapter in adapters.items()]
  mode = ["--mode=eval", f"--workdir={folder / 'eval'}", f"--config.eval.prompts={prompts}"]
  commands.append(["python", "main.py", config("topic"), *flags, *mode, *systems])
  compared = ",".join(str(adapters[form]) for form in ("baseline", "topic", "head", "live"))
  commands.append(
    [
      *("python", "-m", "pasta_jax.evaluate.text_nats", config("topic"), *settings),
      *(f"--adapters={compared}", f"--data={validation}", f"--output={folder / 'text_nats'}"),
    ]
  )
  return [shlex.join(c) for c in commands]


if __name__ == "__main__":
  if len(sys.argv) < 5:
    sys.exit(
      "usage: python configs/ablations/forms.py RUNS_FOLDER TRAINING_DATA VALIDATION_DATA PROMPTS_FILE [flags]"
    )
  print("\n".join(sweep(*sys.argv[1:])))
