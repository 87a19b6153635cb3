"""A script for `test_sharding`: one of two processes that train together, with two virtual devices each.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 python tests/on_two_processes.py FOLDER PORT PROCESS

FOLDER is that of `test_training.tiny`. Leaves `two/`; `pairs/`, stage two from the adapter of `two/`;
`stopped/`, whose second process received SIGTERM; and `left/`, a copy of `stopped/` at that time.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]  # as a script
sys.path[:0] = map(
  str, (TESTS.parent, TESTS, *(TESTS / d for d in ("data", "lang", "model", "train", "weights")))
)

import jax  # noqa: E402
import test_training as t  # noqa: E402

from pasta_jax.config import with_changes  # noqa: E402
from pasta_jax.data.pairs import PreferencePair  # noqa: E402
from pasta_jax.lang.forms import Forms  # noqa: E402
from pasta_jax.model.sharding import AXES, local_rows, make_mesh  # noqa: E402
from pasta_jax.train import loop, sft  # noqa: E402
from pasta_jax.train.preference import train_on_pairs  # noqa: E402
from pasta_jax.utils import distributed  # noqa: E402
from pasta_jax.utils.locks import LOCK  # noqa: E402


def config_of(folder: Path, data: int, fsdp: int, **changes):
  config = t.settings(folder, **dict(batch_size=4, lora_rank=2, learning_rate=1e-3) | changes)
  return with_changes(config, {"mesh.data": data, "mesh.fsdp": fsdp})


def train_pairs(config, folder: Path, workdir: Path) -> None:
  """Three steps of stage two on four pairs, from the adapter of `two/`."""
  checkpoint = t.load_checkpoint(folder / "model")
  rows = t.read_jsonl(folder / "data.jsonl")[:8]
  laid = t.examples(rows, checkpoint.vocabulary, t.RULE, annotation="plan", max_length=t.LENGTH).examples
  changes = dict(
    batch_size=4, length=t.LENGTH, steps=3, grad_accum_steps=1, checkpoint_every=2, learning_rate=1e-3,
    lora_rank=2, dtype="float32", remat="none", loss_chunk=256,
  )  # fmt: skip
  config = with_changes(config, {f"preference.{name}": value for name, value in changes.items()})
  train_on_pairs(
    config,
    workdir,
    [PreferencePair(a, b) for a, b in zip(laid[::2], laid[1::2])],
    checkpoint=checkpoint,
    vocabulary=checkpoint.vocabulary,
    form=Forms(t.RULE),
    adapter=folder / "two" / "adapter.safetensors",
    notes={"round": "1"},
  )


def stage_two(folder: Path) -> None:
  """A run; the same command again, which reads the reference; and one whose reference had another dtype."""
  config, workdir, refused = config_of(folder, 2, 2), folder / "pairs", folder / "refused"
  distributed.any_of(False)  # waits until the first process has written the adapter
  train_pairs(config, folder, workdir)
  distributed.any_of(False)
  written = (workdir / "reference.jsonl").read_bytes()
  train_pairs(config, folder, workdir)
  assert (workdir / "reference.jsonl").read_bytes() == written
  if distributed.is_first():
    shutil.copytree(workdir, refused)
    made_with = refused / "reference.settings.json"
    made_with.write_text(made_with.read_text().replace("float32", "bfloat16"))
  distributed.any_of(False)
  try:
    train_pairs(config, folder, refused)
  except ValueError as error:
    assert "was made with dtype='bfloat16', not 'float32'" in str(error), error
  else:
    sys.exit("a reference of another dtype was used")


def one_run(workdir: Path) -> None:
  """Both processes are one run: the first holds the lock, and both are refused where another run does."""
  with distributed.writing_in(workdir):
    distributed.any_of(False)  # waits until both are here
    assert (json.loads((workdir / LOCK).read_text())["process"] == os.getpid()) == distributed.is_first()
    try:
      with distributed.writing_in(workdir):
        sys.exit("two runs write in one folder")
    except ValueError as error:
      assert "is in use by process" in str(error), error


def main(folder: Path, port: str, index: int) -> None:
  distributed.start(f"127.0.0.1:{port}", 2, index)
  assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2 and distributed.is_first() == (index == 0)
  assert distributed.any_of(index == 1) and not distributed.any_of(False)
  for shape in ((2, 2, 1), (1, 4, 1)):
    assert local_rows(make_mesh(dict(zip(AXES, shape))), 8) == list(range(4 * index, 4 * index + 4))
  assert local_rows(make_mesh(dict(data=1, fsdp=1, tensor=4)), 8) == list(range(8))  # only heads are sharded
  one_run(folder / "locked")
  found = sft.train(config_of(folder, 2, 2), folder / "two")
  assert bool(found) == (index == 0)
  stage_two(folder)
  full = config_of(folder, 1, 4, lora_rank=0)
  save = loop.Checkpoints.save

  def and_terminate(self, state, data, *, force=False):
    if int(state.step) == 2 and index == 1:
      os.kill(os.getpid(), signal.SIGTERM)
    save(self, state, data, force=force)

  loop.Checkpoints.save = and_terminate
  try:
    sft.train(full, folder / "stopped")
  except loop.Stopped as stopped:
    print(stopped, flush=True)
  if index == 0:
    shutil.copytree(folder / "stopped", folder / "left")
  loop.Checkpoints.save = save
  sft.train(full, folder / "stopped")
  print("done", flush=True)


if __name__ == "__main__":
  jax.config.update("jax_disable_most_optimizations", True)
  main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
