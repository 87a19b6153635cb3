"""Every mode that writes refuses a folder in which another run writes, before any work; and what may run side by
side does."""

from pathlib import Path

import pytest
from helpers import kills
from helpers.folders import model_config, write_model

from pasta_jax.config import Config, with_changes
from pasta_jax.data.annotate.run import annotate
from pasta_jax.data.build import build
from pasta_jax.decode.command import decode_file
from pasta_jax.evaluate.run import evaluate
from pasta_jax.preference.rounds import optimise
from pasta_jax.train import sft
from pasta_jax.utils.jsonl import write_jsonl
from pasta_jax.utils.locks import LOCK, LockedError, locked

SEED = str(Path(__file__).parent.parent / "data" / "seed.jsonl")
MODES = {
  "train": lambda config, folder: sft.train(config, folder),
  "eval": lambda config, folder: evaluate(config, folder),
  "preference": lambda config, folder: optimise(config, folder),
  "annotate": lambda config, folder: annotate(config, folder),
  "build": lambda config, folder: build(config, folder, None, []),
  "export": lambda config, folder: kills.export(config, folder),
  "decode": lambda config, folder: decode_file(config, config.eval.prompts, str(folder)),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
  folder = tmp_path_factory.mktemp("locks")
  write_jsonl(folder / "prompts.jsonl", [{"prompt": "Why?"}])
  changes = {"eval.prompts": folder / "prompts.jsonl", "preference.prompts": folder / "prompts.jsonl"}
  changes |= {"train.data": SEED, "annotate.data": SEED, "dataset.train": SEED, "annotate.kind": "structure"}
  changes |= {"model.source": write_model(folder / "model", model_config())}
  return with_changes(Config(), {name: str(value) for name, value in changes.items()})


@pytest.mark.parametrize("mode", MODES)
def test_another_run_is_refused_before_any_work(mode: str, config: Config, tmp_path: Path):
  folder = tmp_path / "run"
  lock = tmp_path / "run.lock" if mode in ("decode", "export") else folder / LOCK
  with locked(lock):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(LockedError, match="is in use by process"):
      MODES[mode](config, folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_shares_of_the_samples_run_side_by_side(config: Config, tmp_path: Path):
  """Each share is refused to a second process only; one of another share goes on to its own work."""
  of = lambda share: with_changes(
    config, {"preference.share": share, "preference.stages": "sample", "preference.limit": 1}
  )
  with locked(tmp_path / "share.1-of-2.lock"):
    with pytest.raises(LockedError):
      optimise(of("1/2"), tmp_path)
    optimise(of("2/2"), tmp_path)  # has no prompt to draw, and so needs no model
