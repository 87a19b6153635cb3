"""The script for accelerators, in its tiny form on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tiny_form_measures_everything_and_prints_one_table(tmp_path):
  script = str(ROOT / "launch" / "accelerator.sh")
  environment = os.environ | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [script, str(tmp_path), "--tiny"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
  )
  assert done.returncode == 0, done.stderr
  plain, buffers, training = (
    json.loads((tmp_path / f"{name}.json").read_text())
    for name in ("steps", "steps_in_command_buffers", "training")
  )
  assert not plain["command_buffers"] and buffers["command_buffers"]
  for run in (plain, buffers):
    assert {row["dtype"] for row in run["steps"]} == {"bfloat16", "int8"}
    assert {row["branches"] for row in run["steps"]} == {0, 8}
    assert {row["steps_per_look"] for row in run["steps"]} == {1, 8}
    assert all(row["seconds"] > 0 and row["bytes"] > 0 for row in run["steps"])
  eight = {
    row["dtype"]: row["bytes"] for row in plain["steps"] if row["branches"] == 8 and row["pool"] == 256
  }
  assert 0.4 < eight["int8"] / eight["bfloat16"] < 1
  assert training["attention"] and training["steps"][0]["seconds"] > 0
  for text in (
    "one thread, 8 rows, int8",
    "8 of 8 branches, bfloat16",
    "command buffers",
    "training step, lora bfloat16",
  ):
    assert text in done.stdout


def test_a_failing_part_is_said_and_the_others_go_on(tmp_path):
  """A Python that cannot measure: no table, and exit code 1."""
  fake = tmp_path / "python"
  fake.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
  fake.chmod(0o755)
  done = subprocess.run(
    [str(ROOT / "launch" / "accelerator.sh"), str(tmp_path / "out"), "--tiny"],
    cwd=ROOT, env=os.environ | {"PYTHON": str(fake)}, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 1 and done.stderr.count("failed") == 3 and "broken" in done.stderr
