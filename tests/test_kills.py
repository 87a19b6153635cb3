"""Kill -9 in every mode that writes, at chosen writes: what is there is whole, and the same command ends as if
nothing had happened. (Training is killed in tests/train and tests/stress.py.)"""

import json
import subprocess
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


def start(case: str, made, folder: Path, at: int = 0) -> tuple[int, int]:
  """Runs a case in `folder` (`kills.run`)."""
  mode, more = CASES[case]
  changes, made_in = made
  rows = {"build": "dataset.train", "annotate": "annotate.data"}.get(case)
  changes = changes | more | ({rows: str(made_in / "rows.jsonl")} if rows else {})
  folder.mkdir(exist_ok=True)
  paths = (made_in / "prompts.jsonl", folder / "out.jsonl") if case == "decode" else (folder / "run",)
  return kills.run(mode, changes, *paths, folder=folder, at=at)


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
  """By case: (what a run leaves that nothing disturbs, how many writes it makes)."""
  found: dict[str, tuple[dict[str, object], int]] = {}

  def of(case: str) -> tuple[dict[str, object], int]:
    if case not in found:
      folder = tmp_path_factory.mktemp("whole")
      code, writes = start(case, made, folder)
      assert code == 0
      found[case] = content(folder), writes
    return found[case]

  return of


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_is_finished_by_the_same_command(case: str, made, whole, tmp_path: Path):
  expected, writes = whole(case)
  points = 3 if case == "decode" else 5  # decoding compiles
  for at in sorted({int(w) for w in np.linspace(1, writes, points)}):
    folder = tmp_path / f"killed-{at}"
    assert start(case, made, folder, at)[0] == -9
    for path in folder.rglob("*.jsonl"):  # never half a line where others read
      for line in path.read_text().splitlines():
        json.loads(line)
    code, left = start(case, made, folder)[0], content(folder)
    # A data set is not built twice: killed with its lock in hand, all is there.
    assert code == 0 or (code, at, case) == (kills.FAILED, writes, "build"), (
      f"killed before write {at} of {writes}"
    )
    assert left == expected, f"killed before write {at} of {writes}"


@pytest.mark.parametrize("case", CASES)
def test_on_a_full_disk_a_run_ends_in_one_line_and_goes_on_with_more_room(
  case: str, made, whole, tmp_path: Path
):
  expected, _ = whole(case)
  size = sum(len(x) for x in expected.values())
  for share in (0.02, 0.5, 0.9)[1 if case == "decode" else 0 :]:
    folder = tmp_path / f"{share}"
    folder.mkdir()
    mount = lambda how, folder=folder: subprocess.run(
      ["mount", "-t", "tmpfs", "-o", how, "tmpfs", folder], capture_output=True
    )
    if mount(f"size={max(int(share * size), 4096)}").returncode:
      pytest.skip("mounting a small file system is not permitted here")
    try:
      assert start(case, made, folder)[0] == kills.FAILED
      mount("remount,size=100m")
      assert start(case, made, folder)[0] == 0
      assert content(folder) == expected
    finally:
      subprocess.run(["umount", folder], check=True)
