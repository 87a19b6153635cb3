"""A script for `test_processes`: one of two processes that share a run's work, and end as `main.py` does.

    python tests/helpers/on_shared_work.py FOLDER PORT PROCESS [resume]

FOLDER has `changes.json`, the settings of all runs. Leaves `two/`, stage two from its samples to its evaluation;
`two.jsonl`, of --mode=decode; `full/`, whose second process could not write after two answers and three samples;
`stopped/`, whose second process received SIGTERM then; and `killed/`, whose second process was killed then. With
"resume" it finishes `killed/` instead. A line of standard output says how each ended: its name, the exit code and the
last line on standard error.
"""

import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import jax  # noqa: E402

import main  # noqa: E402
from pasta_jax.config import Config, with_changes  # noqa: E402
from pasta_jax.decode import command  # noqa: E402
from pasta_jax.utils import distributed, shared_records  # noqa: E402
from pasta_jax.utils.waiting import Waiting  # noqa: E402

append_row = shared_records.append_row  # of processes after the first


def end(name: str, work: Callable[[], None]) -> None:
  """Has main.py do some work, and prints how it ended."""
  said = io.StringIO()
  code: object = 0
  main.run = work
  with contextlib.redirect_stderr(said):
    try:
      main.main(["main.py"])
    except SystemExit as left:
      code = left.code
  last = (said.getvalue().splitlines() or [""])[-1]
  print(json.dumps([name, code, last]), flush=True)


def after(rows: int, do: Callable[[Path], None]) -> None:
  """Has the second process do something before it writes one row more."""
  written: list[dict] = []

  def append(path: Path, row: dict) -> None:
    if len(written) == rows:
      do(path)
    written.append(row)
    append_row(path, row)

  shared_records.append_row = append


def full(path: Path) -> None:
  raise OSError(28, "No space left on device", str(path))


def wait() -> None:
  with distributed.as_one():
    distributed.from_first(lambda: waiting("2 requests wait in a.jsonl"))


def waiting(what: str) -> None:
  raise Waiting(what)


def run(folder: Path, port: str, index: int, resume: bool) -> None:
  config = with_changes(Config(), json.loads((folder / "changes.json").read_text()))
  sample = with_changes(config, {"preference.stages": "sample"})
  preference = lambda name, how: end(
    name, lambda: main.preference(how, SimpleNamespace(workdir=folder / name))
  )
  distributed.start(f"127.0.0.1:{port}", 2, index)
  if resume:
    preference("killed", sample)
    return
  preference("two", config)
  end("decode", lambda: command.decode_file(config, str(folder / "prompts.jsonl"), str(folder / "two.jsonl")))
  end("waiting", wait)
  after(5, full)
  preference("full", sample)
  after(5, lambda path: os.kill(os.getpid(), signal.SIGTERM))
  preference("stopped", sample)
  after(5, lambda path: os.kill(os.getpid(), signal.SIGKILL))
  preference("killed", sample)


if __name__ == "__main__":
  jax.config.update("jax_disable_most_optimizations", True)
  run(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), "resume" in sys.argv)
