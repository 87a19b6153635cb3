"""Kill -9 in every mode that writes, at chosen writes: what is there is whole, and the same command ends as if
nothing had happened. (Training is killed in tests/train and tests/stress.py.)"""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import kills
from helpers.folders import SEED_DATA, trained_config
from safetensors.numpy import load_file

from pasta_jax.utils.jsonl import read_jsonl, write_jsonl


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """(changes of the config for a tiny model and its adapter, the folder)."""
  folder = tmp_path_factory.mktemp("kills")
  config = trained_config(folder)
  write_jsonl(folder / "rows.jsonl", read_jsonl(SEED_DATA)[:12])
  write_jsonl(folder / "prompts.jsonl", [{"id": i, "prompt": f"Name {i} birds."} for i in range(4)])
  decode = {"max_new_tokens": 24, "max_branches": 2, "kv_capacity": 256, "dtype": "float32", "batch_size": 2}
  changes = {
    "model.source": config.model.source,
    "model.adapter": config.model.adapter,
    **{f"decode.{k}": v for k, v in decode.items()},
  }
  return changes, folder


def content(folder: Path) -> dict[str, object]:
  """What is in each file, by its path; tensors by value."""
  found: dict[str, object] = {}
  for path in sorted(p for p in folder.rglob("*") if p.is_file()):
    if path.suffix == ".safetensors":
      found |= {f"{path.relative_to(folder)}/{k}": v.tobytes() for k, v in load_file(path).items()}
    else:
      found[str(path.relative_to(folder))] = path.read_bytes()
  return found


CASES = {
  "build": (kills.build, {"dataset.validation_share": 0.3}),
  "export": (kills.export, {"export.form": "merged"}),
  "export for PEFT": (kills.export, {"export.form": "peft"}),
  "annotate": (kills.annotate, {"annotate.kind": "structure"}),
  "decode": (kills.decode, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_is_finished_by_the_same_command(case: str, made, tmp_path: Path):
  mode, more = CASES[case]
  changes, made_in = made
  rows = {"build": "dataset.train", "annotate": "annotate.data"}.get(case)
  changes = changes | more | ({rows: str(made_in / "rows.jsonl")} if rows else {})

  def start(folder: Path, at: int = 0) -> tuple[int, int]:
    folder.mkdir(exist_ok=True)
    paths = (made_in / "prompts.jsonl", folder / "out.jsonl") if case == "decode" else (folder / "run",)
    return kills.run(mode, changes, *paths, folder=folder, at=at)

  code, writes = start(tmp_path / "whole")
  assert code == 0
  expected = content(tmp_path / "whole")
  points = 3 if case == "decode" else 5  # decoding compiles
  for at in sorted({int(w) for w in np.linspace(1, writes, points)}):
    folder = tmp_path / f"killed-{at}"
    assert start(folder, at)[0] == -9
    for path in folder.rglob("*.jsonl"):  # never half a line where others read
      for line in path.read_text().splitlines():
        json.loads(line)
    assert start(folder)[0] == 0, f"killed before write {at} of {writes}"
    assert content(folder) == expected, f"killed before write {at} of {writes}"
