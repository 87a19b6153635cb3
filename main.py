"""Entry point: `python main.py --mode=… --config=configs/….py --workdir=…`. See README.md."""

import os
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

RESTART = 75  # exit code of a training that SIGTERM stopped: launchers start the same command again

FLAGS = flags.FLAGS
MODES = ["decode", "train", "preference", "eval", "pilot", "report", "annotate", "build", "export", "compile"]
flags.DEFINE_enum(
  "mode",
  "decode",
  MODES,
  "what to do; pilot: eval with thresholds and an exit code; report: eval's "
  "report anew; annotate: responses to training data; build: a data set of them; export: the model for "
  "other engines; compile: the training steps for a TPU slice that is not here",
)
config_flags.DEFINE_config_file(
  "config",
  None,
  "experiment: a file, or file.py:argument; configs/smollm2_135m.py if not given",
  lock_config=True,
)
flags.DEFINE_string(
  "workdir", None, "folder of the run (all but decode and compile): checkpoints, metrics, results"
)
flags.DEFINE_string("prompt", None, "decode: the prompt; read from standard input where that is piped")
flags.DEFINE_string("prompts_file", None, 'decode, pilot: JSON lines with "prompt"')
flags.DEFINE_integer(
  "limit", None, "eval, pilot: so many prompts, spread evenly over the file", lower_bound=1
)
flags.DEFINE_bool(
  "distributed",
  False,
  "train: this is one of several processes, one a host; Cloud TPU and SLURM say "
  "which, elsewhere the next three flags do",
)
flags.DEFINE_string("coordinator", "", "host:port of the first process")
flags.DEFINE_integer("processes", 0, "how many there are")
flags.DEFINE_integer("process", -1, "which one this is, from 0")
flags.DEFINE_string(
  "output", None, "decode: where the answers to --prompts_file go; standard output if not given"
)
flags.DEFINE_string("timeline", None, "decode: draw the answer's threads in this .html or .svg file")


def run() -> None:
  """One call a mode. Errors that a user can mend are ValueErrors and OSErrors of one line."""
  import jax

  from pasta_jax.train import distributed
  from pasta_jax.utils.environment import cache_folder, use_compilation_cache

  if FLAGS.distributed:
    if FLAGS.mode != "train":
      raise ValueError(f"--distributed is for --mode=train, not {FLAGS.mode}")
    distributed.start(FLAGS.coordinator, FLAGS.processes, FLAGS.process)
  if FLAGS.mode == "compile":
    from pasta_jax.train.ahead import compile_steps

    jax.config.update("jax_platforms", "cpu")
    compile_steps(FLAGS.config)
    return
  use_compilation_cache(cache_folder() / "compiled")
  logging.info("devices: %s", jax.devices())
  if FLAGS.mode != "decode" and not FLAGS.workdir:
    raise ValueError(f"--mode={FLAGS.mode} needs --workdir=FOLDER")
  if FLAGS.limit:
    FLAGS.config.eval.limit = FLAGS.limit
  if FLAGS.mode == "train":
    from pasta_jax.train import sft

    sft.train(FLAGS.config, Path(FLAGS.workdir))
  elif FLAGS.mode == "preference":
    from pasta_jax.preference.rounds import optimise

    optimise(FLAGS.config, Path(FLAGS.workdir))
  elif FLAGS.mode == "eval":
    from pasta_jax.evaluate.run import evaluate

    evaluate(FLAGS.config, Path(FLAGS.workdir))
  elif FLAGS.mode == "report":
    from pasta_jax.evaluate.report import report

    report.write(Path(FLAGS.workdir))
  elif FLAGS.mode == "annotate":
    from pasta_jax.data.annotate.run import annotate

    annotate(FLAGS.config, Path(FLAGS.workdir))
  elif FLAGS.mode == "build":
    from pasta_jax.data.build import build
    from pasta_jax.data.prompts import read_prompts
    from pasta_jax.weights.checkpoint import load_checkpoint

    avoid = FLAGS.config.dataset.avoid
    build(
      FLAGS.config,
      Path(FLAGS.workdir),
      load_checkpoint(FLAGS.config.model.source).vocabulary,
      [r.prompt for r in read_prompts(avoid, part="dataset")] if avoid else [],
    )
  elif FLAGS.mode == "export":
    from pasta_jax.decode.generator import adapter_path, source_of
    from pasta_jax.weights.checkpoint import load_checkpoint
    from pasta_jax.weights.export import export

    adapter = FLAGS.config.model.adapter
    said = export(
      Path(FLAGS.workdir),
      load_checkpoint(source_of(FLAGS.config, adapter)),
      adapter_path(adapter),
      **FLAGS.config.export,
    )
    print(f"{FLAGS.workdir}: {said}")
  elif FLAGS.mode == "pilot":
    from pasta_jax.evaluate.run import pilot

    if FLAGS.prompts_file:
      FLAGS.config.eval.prompts = FLAGS.prompts_file
    if not pilot(FLAGS.config, Path(FLAGS.workdir)):
      sys.exit(3)
  else:
    from pasta_jax.decode import command

    for one, other in (("prompts_file", "prompt"), ("prompts_file", "timeline"), ("output", "prompt")):
      if FLAGS[one].present and FLAGS[other].present:
        raise ValueError(f"--{one} and --{other} do not go together")
    if FLAGS.prompts_file:
      command.decode_file(FLAGS.config, FLAGS.prompts_file, FLAGS.output)
      return
    prompt = FLAGS.prompt
    if prompt is None and not sys.stdin.isatty():
      prompt = sys.stdin.read()
    if prompt is None:
      raise ValueError('--mode=decode needs --prompt="…", --prompts_file=FILE, or a prompt on standard input')
    command.decode_prompt(FLAGS.config, prompt, timeline=FLAGS.timeline)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  from pasta_jax.train.loop import Stopped

  logging.set_verbosity(logging.WARNING)  # orbax and jax tell a lot at INFO
  try:
    run()
  except (ValueError, OSError, FloatingPointError) as error:
    if os.environ.get("PASTA_DEBUG"):
      raise
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)
  except Stopped as stopped:
    print(stopped)
    sys.exit(RESTART)
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)


# Settings under the names that they had before.
ALIASES = {
  "decode.slots": "decode.max_branches",
  "decode.capacity": "decode.kv_capacity",
  "decode.requests": "decode.batch_size",
  "eval.requests": "eval.batch_size",
  "eval.width": "eval.branch_width",
  "preference.requests": "preference.decode_batch_size",
  "preference.width": "preference.branch_width",
  "preference.accumulate": "preference.grad_accum_steps",
  "preference.clip": "preference.max_grad_norm",
  "train.accumulate": "train.grad_accum_steps",
  "train.clip": "train.max_grad_norm",
}


def current_name(argument: str) -> str:
  """A command-line argument with the name that its setting has today."""
  flag, equals, value = argument.partition("=")
  dashes, dot, name = flag.partition("config.")
  return (
    f"{dashes}{dot}{ALIASES[name]}{equals}{value}" if dashes in ("-", "--") and name in ALIASES else argument
  )


def parse(argv: list[str]) -> list[str]:
  """absl's parsing; an unknown field or file of --config is one line too."""
  argv = [argv[0], *map(current_name, argv[1:])]
  if not any(a.lstrip("-").startswith("config=") or a.lstrip("-") == "config" for a in argv):
    argv.insert(1, f"--config={Path(__file__).parent / 'configs/smollm2_135m.py'}")
  sys.argv[:] = argv  # where ml_collections looks for the fields that are set
  try:
    rest = app.parse_flags_with_usage(argv)
    FLAGS.config.keys()  # a file that could not be loaded speaks up here
    return rest
  except (AttributeError, KeyError, ValueError, OSError) as error:
    lines = str(error).replace("\\n", "\n").splitlines()
    sys.exit("error: --config: " + " ".join(line.strip(" '\"\\") for line in lines))


if __name__ == "__main__":
  app.run(main, flags_parser=parse)
