"""Kills a training run at random moments, fifty times, and compares what comes of it with a run that nobody
disturbed.

    python tests/stress.py --kills=50

Kill -9: one in five while the run starts and restores, the others up to two seconds behind a step, with a
checkpoint at every step, so that many fall into the writing of one. At the end losses, the last checkpoint's
arrays and the adapter must be equal bit for bit. The model is `configs/tiny.py`'s, on this machine's CPU.
"""

import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from absl import app, flags, logging  # noqa: E402

from configs import tiny  # noqa: E402
from pasta_jax.config import from_flags  # noqa: E402
from pasta_jax.train import loop, sft  # noqa: E402
from pasta_jax.utils.progress import progress_bar  # noqa: E402

FLAGS = flags.FLAGS
flags.DEFINE_integer("kills", 50, "how often the run is killed")
flags.DEFINE_integer("seed", 0, "of the moments")
NOT_COMPARED = ("tokens_per_second", "data_wait")


def train(workdir: Path, steps: int, done) -> None:
  """The run, which counts its steps in `done`. No JAX array was made before it, so that it may be a fork."""
  from pasta_jax.utils.environment import use_compilation_cache

  use_compilation_cache(workdir.parent / "compiled")
  flags = tiny.get_config()
  flags.train.update(
    steps=steps, length=1024, checkpoint_every=1, data=str(ROOT / "data/seed.jsonl"), lora_rank=0
  )
  write = loop.MetricWriter.write

  def and_count(self, step, scalars):
    write(self, step, scalars)
    done.value += 1

  loop.MetricWriter.write = and_count
  sys.stdout = sys.stderr = open(workdir.parent / "log", "a")  # noqa: SIM115
  sft.train(from_flags(flags), workdir)


def lines(workdir: Path) -> list[dict]:
  """Whole lines of the metrics; the last one may be cut off."""
  path, found = workdir / "metrics.jsonl", []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      found.append({k: v for k, v in json.loads(line).items() if k not in NOT_COMPARED})
    except ValueError:
      pass
  return found


def arrays(workdir: Path) -> dict[str, np.ndarray]:
  """The newest checkpoint's and the adapter's."""
  import orbax.checkpoint as ocp
  from safetensors.numpy import load_file

  newest = max(
    (p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name)
  )
  with ocp.StandardCheckpointer() as checkpointer:
    state = checkpointer.restore(newest.resolve() / "state")
  return {**{k: np.asarray(v) for k, v in state.items()}, **load_file(workdir / "adapter.safetensors")}


def killed_run(workdir: Path, kills: int, steps: int) -> tuple[int, int]:
  """Starts the run anew after each kill, and lets the last one end; (kills in a write, steps that were done
  again)."""
  fork, rng = multiprocessing.get_context("fork"), random.Random(FLAGS.seed)
  in_write = again = 0
  bar, task = progress_bar("kills", kills, 0)
  with bar:
    for kill in range(kills):
      done = fork.Value("i", 0)
      process = fork.Process(target=train, args=(workdir, steps, done))
      process.start()
      if rng.random() < 0.8:
        while process.is_alive() and not done.value:
          time.sleep(0.02)
        time.sleep(rng.uniform(0, 2))
      else:
        time.sleep(rng.uniform(0, 5))
      if not process.is_alive():
        sys.exit(f"the run ended by itself, exit code {process.exitcode}: see {workdir.parent / 'log'}")
      process.kill()
      process.join()
      in_write += any("tmp" in p.name for p in (workdir / "checkpoints").glob("*"))
      again += len(lines(workdir)) - max(
        [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()], default=0
      )
      bar.update(task, completed=kill + 1, note=f"step {len(lines(workdir))}")
  to_its_end(workdir, steps)
  return in_write, again


def to_its_end(workdir: Path, steps: int) -> None:
  fork = multiprocessing.get_context("fork")
  process = fork.Process(target=train, args=(workdir, steps, fork.Value("i", 0)))
  process.start()
  process.join()
  if process.exitcode:
    sys.exit(f"the run failed: see {workdir.parent / 'log'}")


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.ERROR)  # what a kill leaves is told at length
  folder = Path(tempfile.mkdtemp(prefix="stress-"))
  steps = 20 * FLAGS.kills  # more than will be done between the kills
  in_write, again = killed_run(folder / "killed", FLAGS.kills, steps)
  to_its_end(folder / "whole", steps)
  ours, theirs = lines(folder / "killed"), lines(folder / "whole")
  wrong = [a["step"] for a, b in zip(ours, theirs) if a != b]
  if wrong or len(ours) != len(theirs) or len(ours) != steps:
    sys.exit(f"losses differ, first at step {(wrong or ['?'])[0]}: see {folder}")
  one, other = arrays(folder / "killed"), arrays(folder / "whole")
  if different := [k for k in one if not np.array_equal(one[k], other[k])] + sorted(
    one.keys() ^ other.keys()
  ):
    sys.exit(f"{len(different)} arrays differ, {different[0]} first: see {folder}")
  shutil.rmtree(folder)
  print(
    f"{FLAGS.kills} kills, {in_write} of them in the writing of a checkpoint, {again} steps done again: {steps} "
    f"losses and {len(one)} arrays equal those of a run that was not disturbed, bit for bit"
  )


if __name__ == "__main__":
  app.run(main)
