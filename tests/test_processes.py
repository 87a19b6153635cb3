"""Two processes that share a run's work against one: the same records, and no work lost or done twice."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.devices import start_two
from helpers.folders import SEED_DATA, model_config, write_model
from safetensors.numpy import load_file

from pasta_jax.config import Config, with_changes
from pasta_jax.decode import command
from pasta_jax.preference.rounds import optimise
from pasta_jax.train import sft
from pasta_jax.utils.jsonl import read_finished_lines, read_jsonl, write_jsonl
from pasta_jax.utils.locks import LOCK
from pasta_jax.utils.records import part_of

ROOT = Path(__file__).parents[1]
PROMPTS = ["Plan a trip.", "Why?", "Name three birds.", "Sing."]
TRAIN = {
  "length": 768, "batch_size": 1, "steps": 1, "lora_rank": 2, "dtype": "float32", "min_speedup": 0.0,
  "learning_rate": 1e-3,
}  # fmt: skip
DECODE = {
  "max_new_tokens": 40, "max_branches": 2, "kv_capacity": 256, "dtype": "float32", "promise_bias": 5.0,
  "no_repeat": 0, "repetition_penalty": 1.0, "temperature": 1.0,
}  # fmt: skip
PREFERENCE = {
  "samples": 3, "temperature": 1.0, "decode_batch_size": 4, "weights": "2", "guards": False, "length": 320,
  "batch_size": 2, "grad_accum_steps": 1, "steps": 2, "rounds": 1, "learning_rate": 1e-2, "dtype": "float32",
  "sample_dtype": "float32", "remat": "none", "attention": "auto", "loss_chunk": 256, "checkpoint_every": 1,
  "audit": 0,
}  # fmt: skip
EVAL = {"batch_size": 2, "branch_width": 2, "dtype": "float32", "judge_dtype": "float32", "timed": 0}


def begin(folder: Path, *more: str) -> list[subprocess.Popen[str]]:
  return start_two("on_shared_work.py", folder, *more, PASTA_CACHE=str(folder / "cache"))


def ends(process: subprocess.Popen[str]) -> dict[str, tuple[int, str]]:
  """By run: (exit code, last line on standard error), as the script prints it. Waits for the process."""
  out, errors = process.communicate(timeout=600)
  sys.stderr.write(errors[-3000:])
  rows = [json.loads(line) for line in out.splitlines() if line.startswith('["')]
  return {name: (code, line) for name, code, line in rows}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """(the config of all runs; their folder, with `one/` of one process and what two processes left; how their runs
  ended, in each process)."""
  folder = tmp_path_factory.mktemp("processes")
  source = str(write_model(folder / "model", model_config()))
  write_jsonl(folder / "rows.jsonl", read_jsonl(SEED_DATA)[:12])
  changes = {f"train.{k}": v for k, v in TRAIN.items()}
  changes |= {"model.source": source, "train.data": str(folder / "rows.jsonl")}
  sft.train(with_changes(Config(), changes), folder / "run")
  adapter = str(folder / "run" / "adapter.safetensors")
  write_jsonl(folder / "prompts.jsonl", [{"id": f"p{i}", "prompt": p} for i, p in enumerate(PROMPTS)])
  turns = [{"id": "a", "turns": ["Name three birds.", "Which of them sings?"]}, {"id": "b", "prompt": "Why?"}]
  write_jsonl(folder / "held_out.jsonl", turns)
  changes = {f"decode.{k}": v for k, v in DECODE.items()}
  changes |= {f"preference.{k}": v for k, v in PREFERENCE.items()}
  changes |= {f"eval.{k}": v for k, v in EVAL.items()}
  changes |= {name: adapter for name in ("model.adapter", "systems.baseline.adapter")}
  changes |= {"model.source": source, "mesh.fsdp": -1}
  changes |= {
    "preference.prompts": str(folder / "prompts.jsonl"),
    "eval.prompts": str(folder / "held_out.jsonl"),
  }
  (folder / "changes.json").write_text(json.dumps(changes))
  config = with_changes(Config(), changes)
  optimise(config, folder / "one")  # first, since one process compiles what all will run
  both = begin(folder)
  second = ends(both[1])
  both[0].kill()  # JAX takes 100 s to miss the other
  found = ends(both[0]), second
  assert both[1].returncode == -signal.SIGKILL
  return config, folder, found


def rows_of(path: Path) -> dict[str, dict]:
  """By id, each once."""
  rows = {row["id"]: row for row in read_jsonl(path)}
  assert len(rows) == len(read_jsonl(path)) > 0, path
  return rows


def assert_same(found, wanted) -> None:
  """Equal JSON values; numbers that are not whole, nearly."""
  if isinstance(wanted, float):
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
  elif isinstance(wanted, dict):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
      assert_same(found[key], value)
  elif isinstance(wanted, list):
    assert len(found) == len(wanted)
    for pair in zip(found, wanted):
      assert_same(*pair)
  else:
    assert found == wanted


def test_two_processes_give_what_one_gives(made):
  """From samples to the report: records, judgements, pairs, the trained adapter and the figures."""
  config, folder, found = made
  one, two = folder / "one", folder / "two"
  for of in found:
    assert (of["two"][0], of["decode"][0]) == (0, 0), found
  assert found[1]["two"][1] == ""  # bars and reports are the first one's

  def files(run: Path) -> set[str]:
    paths = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    return {p for p in paths if "tfevents" not in p and "checkpoints" not in p}

  assert files(two) == files(one)  # no part and no lock is left
  names = {n for n in files(one) if n.endswith(".jsonl") and "round1" not in n}
  for name in names - {"eval/judgements/local/scores.jsonl"}:  # what the trained policy answers, may differ
    assert_same(rows_of(two / name), rows_of(one / name))
  pairs = "weight_2/round1/pairs.jsonl"
  assert_same(read_jsonl(two / pairs), read_jsonl(one / pairs))
  found, wanted = (load_file(run / "weight_2/round1/train/adapter.safetensors") for run in (two, one))
  assert found.keys() == wanted.keys()
  for key, value in wanted.items():
    np.testing.assert_allclose(found[key].astype("f"), value.astype("f"), rtol=1e-2, atol=1e-4)  # bfloat16
  summaries = (json.loads((run / "eval/summary.json").read_text())["systems"] for run in (two, one))
  assert_same(*({n: s for n, s in of.items() if "round1" not in n} for of in summaries))
  command.decode_file(config, str(folder / "prompts.jsonl"), str(folder / "one.jsonl"))
  assert read_jsonl(folder / "two.jsonl") == read_jsonl(folder / "one.jsonl")


def test_an_end_of_one_process_is_an_end_of_all(made):
  """A full disk, SIGTERM, and a wait for answers: the exit code, and a line that says where it was."""
  _, folder, found = made
  part = part_of(folder / "full" / "start" / "samples.jsonl", 1)
  message = f"{part}: No space left on device"
  assert [of["full"] for of in found] == [
    (1, f"error: process 1: {message}"),
    (1, f"error: {message}"),
  ]
  assert [of[name][0] for name in ("stopped", "waiting") for of in found] == [75, 75, 4, 4]
  for name in ("full", "stopped"):
    start = folder / name / "start"
    assert len(rows_of(part_of(start / "samples.jsonl", 1))) == 3  # what is finished is kept
    assert not (folder / name / LOCK).exists()


@pytest.mark.parametrize("count", [1, 2])
def test_what_a_killed_process_has_finished_is_not_made_again(count: int, made):
  config, folder, _ = made
  whole = rows_of(folder / "one" / "start" / "samples.jsonl")
  killed = folder / "killed"
  if not (before := folder / "killed before").exists():
    shutil.copytree(killed, before)
  shutil.rmtree(killed)
  shutil.copytree(before, killed)
  path = killed / "start" / "samples.jsonl"
  part = part_of(path, 1)
  assert len(rows_of(part)) == 3
  for file in (f for f in (path, part) if f.exists()):
    write_jsonl(file, [row | {"kept": True} for row in read_jsonl(file)])
  with open(part, "a") as file:
    file.write('{"id": "p0#')  # killed while it wrote
  kept = {row["id"] for file in (path, part) if file.exists() for row in read_finished_lines(file)}
  if count == 1:
    optimise(with_changes(config, {"preference.stages": "sample"}), killed)
  else:
    assert [of["killed"][0] for of in map(ends, begin(folder, "resume"))] == [0, 0]
  rows = rows_of(path)
  assert {i for i, row in rows.items() if row.pop("kept", False)} == kept
  assert_same(rows, whole)
  assert not part.exists() and len(kept) < len(rows)
