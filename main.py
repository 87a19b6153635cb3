"""Entry point: `python main.py --mode=… --config=configs/….py --workdir=…`. See README.md."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from pasta_jax.config import ALIASES, Config, from_flags, user_path, with_changes
from pasta_jax.utils.text import message_of, one_line
from pasta_jax.utils.waiting import WAITING, Stopped, Waiting

RESTART = 75  # exit code of a run that SIGTERM stopped: launchers start the same command again
MISSED = 3  # exit code of a pilot that missed its thresholds
CLOSED = 141  # exit code where the reader of standard output has gone, as of a process that SIGPIPE ends
PATHS = ("workdir", "prompts_file", "output", "timeline")  # flags that name files and folders


# --- modes: functions of the settings and the flags, which import what they need ---


def decode(config: Config, values: flags.FlagValues) -> None:
  from pasta_jax.decode import command

  for one, other in (("prompts_file", "prompt"), ("prompts_file", "timeline"), ("output", "prompt")):
    if values[one].present and values[other].present:
      raise ValueError(f"--{one} and --{other} do not go together")
  if values.prompts_file:
    with _restartable() if values.output else contextlib.nullcontext():
      command.decode_file(config, values.prompts_file, values.output)
    return
  prompt = values.prompt
  if prompt is None and not sys.stdin.isatty():
    prompt = sys.stdin.buffer.read().decode("utf-8-sig", "replace")
  if prompt is None:
    raise ValueError('--mode=decode needs --prompt="…", --prompts_file=FILE, or a prompt on standard input')
  command.decode_prompt(config, prompt, timeline=values.timeline)


def train(config: Config, values: flags.FlagValues) -> None:
  from pasta_jax.train import sft

  with _restartable():
    sft.train(config, Path(values.workdir))


def preference(config: Config, values: flags.FlagValues) -> None:
  from pasta_jax.preference.rounds import optimise

  with _restartable():
    optimise(config, Path(values.workdir))


@contextlib.contextmanager
def _restartable() -> Iterator[None]:
  """Leaves with the exit code RESTART where SIGTERM stopped what the same command continues.

  Training saves a checkpoint first (`train.loop`); whatever else goes on keeps what is finished.
  """

  def stop(*_):
    raise Stopped("stopped by SIGTERM; the same command continues from there")

  signal.signal(signal.SIGTERM, stop)
  try:
    yield
  except Stopped as stopped:
    print(stopped)
    sys.exit(RESTART)


def evaluate(config: Config, values: flags.FlagValues) -> None:
  from pasta_jax.evaluate.run import evaluate

  with _restartable():
    evaluate(config, Path(values.workdir))


def pilot(config: Config, values: flags.FlagValues) -> None:
  from pasta_jax.evaluate.run import pilot

  if values.prompts_file:
    config = with_changes(config, {"eval.prompts": values.prompts_file})
  with _restartable():
    met = pilot(config, Path(values.workdir))
  if not met:
    sys.exit(MISSED)


def report(config: Config, values: flags.FlagValues) -> None:
  from pasta_jax.evaluate.report.write import write_report

  del config  # the run has its own
  write_report(Path(values.workdir))


def annotate(config: Config, values: flags.FlagValues) -> None:
  from pasta_jax.data.annotate.run import annotate

  annotate(config, Path(values.workdir))


def build(config: Config, values: flags.FlagValues) -> None:
  from pasta_jax.data.build import build
  from pasta_jax.data.prompts import read_prompts
  from pasta_jax.weights.checkpoint import load_checkpoint

  avoid = config.dataset.avoid
  build(
    config,
    Path(values.workdir),
    load_checkpoint(config.model.source).vocabulary,
    [r.prompt for r in read_prompts(avoid, part="dataset")] if avoid else [],
  )


def export(config: Config, values: flags.FlagValues) -> None:
  from pasta_jax.decode.generator import adapter_path, source_of
  from pasta_jax.weights.checkpoint import load_checkpoint
  from pasta_jax.weights.export import export

  adapter = config.model.adapter
  checkpoint = load_checkpoint(source_of(config, adapter))
  note = export(
    Path(values.workdir),
    checkpoint,
    adapter_path(adapter),
    form=config.export.form,
    dtype=config.export.dtype,
  )
  print(f"{values.workdir}: {note}")


def compile_ahead(config: Config, values: flags.FlagValues) -> None:
  del values
  import jax

  from pasta_jax.train import ahead

  jax.config.update("jax_platforms", "cpu")
  ahead.compile_ahead(config)


MODES: dict[str, Callable[[Config, flags.FlagValues], None]] = {
  "decode": decode,
  "train": train,
  "preference": preference,
  "eval": evaluate,
  "pilot": pilot,
  "report": report,
  "annotate": annotate,
  "build": build,
  "export": export,
  "compile": compile_ahead,
}
WITHOUT_WORKDIR = ("decode", "compile")
OF_SEVERAL = ("train", "preference", "eval", "pilot", "decode")  # modes that several processes can share

# --- flags ---

FLAGS = flags.FLAGS
flags.DEFINE_enum(
  "mode",
  "decode",
  list(MODES),
  "what to do; pilot: eval with thresholds and an exit code; report: write eval's report again; annotate: "
  "turn responses into training data; build: make a data set of them; export: write the model for other "
  "engines; compile: compile training and decode steps for a TPU slice or a GPU you do not have",
)
config_flags.DEFINE_config_file(
  "config",
  None,
  "experiment: a file, or file.py:argument; default: configs/smollm2_135m.py",
  lock_config=True,
)
flags.DEFINE_string(
  "workdir", None, "folder of the run: checkpoints, metrics, results; every mode but decode and compile"
)
flags.DEFINE_string("prompt", None, "decode: the prompt; default: standard input, if it is piped")
flags.DEFINE_string("prompts_file", None, 'decode, pilot: JSON lines with "prompt"')
flags.DEFINE_integer(
  "limit", None, "eval, pilot: number of prompts, spread evenly over the file", lower_bound=1
)
flags.DEFINE_bool(
  "distributed",
  False,
  "train, preference, eval, pilot, and decode with --prompts_file and --output: this is one of several processes, "
  "one for each host, with --workdir in a folder that all of them see; Cloud TPU and SLURM tell which one, elsewhere "
  "the next three flags do",
)
flags.DEFINE_string("coordinator", "", "host:port of the first process")
flags.DEFINE_integer("processes", 0, "number of processes")
flags.DEFINE_integer("process", -1, "index of this process, from 0")
flags.DEFINE_string(
  "output", None, "decode: file for the answers to --prompts_file; default: standard output"
)
flags.DEFINE_string("timeline", None, "decode: draw the answer's threads in this .html or .svg file")


def run() -> None:
  """Checks flags and settings, prepares JAX, and calls the mode. Errors that a user can correct are
  ValueErrors and OSErrors of one line."""
  mode = FLAGS.mode
  for name in PATHS:
    if FLAGS[name].value is not None:
      FLAGS[name].value = user_path(f"--{name}", FLAGS[name].value)
  config = from_flags(FLAGS.config)
  if FLAGS.distributed and mode not in OF_SEVERAL:
    raise ValueError(f"--distributed is for --mode={', '.join(OF_SEVERAL)}, not {mode}")
  if FLAGS.distributed and mode == "decode" and not (FLAGS.prompts_file and FLAGS.output):
    raise ValueError("--mode=decode --distributed needs --prompts_file and --output")
  if mode not in WITHOUT_WORKDIR and not FLAGS.workdir:
    raise ValueError(f"--mode={mode} needs --workdir=FOLDER")
  if FLAGS.limit:
    config = with_changes(config, {"eval.limit": FLAGS.limit})
  if FLAGS.distributed:  # before JAX is used
    from pasta_jax.utils import distributed

    distributed.start(FLAGS.coordinator, FLAGS.processes, FLAGS.process)
  if config.decode.command_buffers:
    from pasta_jax.utils.environment import offer_loops_to_command_buffers

    offer_loops_to_command_buffers()
  if mode != "compile":
    _prepare()
  MODES[mode](config, FLAGS)


def _prepare() -> None:
  """Keeps compiled programs between runs, and names the devices."""
  import jax

  from pasta_jax.utils.environment import cache_folder, use_compilation_cache

  use_compilation_cache(cache_folder() / "compiled")
  logging.info("devices: %s", jax.devices())


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  logging.set_verbosity(logging.WARNING)  # orbax and jax write much at INFO
  threading.excepthook = _background
  try:
    run()
    sys.stdout.flush()
  except Waiting as waiting:
    print(waiting)
    sys.exit(WAITING)
  except BrokenPipeError:  # such as `| head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes what is left when it ends
    sys.exit(CLOSED)
  except (ValueError, OSError, FloatingPointError) as error:
    _fail(message_of(error))
  except (MemoryError, RuntimeError) as error:
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
      raise
    _fail(
      f"the memory is not enough ({error}): lower decode.kv_capacity, decode.max_threads or the batch_size of "
      "the mode"
    )
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)


def _fail(message: str) -> None:
  """Ends with one line on standard error, or, with PASTA_DEBUG, lets the exception through."""
  if os.environ.get("PASTA_DEBUG"):
    raise
  print(f"error: {one_line(message)}", file=sys.stderr)
  sys.exit(1)


def _background(failed: threading.ExceptHookArgs) -> None:
  """What threads of libraries raise, such as on a full disk: the main thread meets the same, or works on."""
  if os.environ.get("PASTA_DEBUG"):
    threading.__excepthook__(failed)
  print(f"error in the background: {one_line(str(failed.exc_value))}", file=sys.stderr)


def _open_streams() -> None:
  """Closed standard streams become null ones; what an encoding cannot express is written as its escape."""
  for name in ("stdout", "stderr"):
    if getattr(sys, name) is None:
      setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    getattr(sys, name).reconfigure(errors="backslashreplace")
  if sys.stdin is None:
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115


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
    FLAGS.config.keys()  # loads the file: errors in it are raised here
    return rest
  except (AttributeError, KeyError, ValueError, OSError) as error:
    lines = str(error).replace("\\n", "\n").splitlines()
    sys.exit("error: --config: " + one_line(" ".join(line.strip(" '\"\\") for line in lines)))


if __name__ == "__main__":
  _open_streams()
  app.run(main, flags_parser=parse)
