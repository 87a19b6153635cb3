"""The modes as a user runs them, on a tiny model; and what a user reads when something is wrong."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from folders import trained_config
from ml_collections import config_flags

from configs.ablations import positions
from configs.ablations.positions import sweep
from pasta_jax.data.examples import DataError
from pasta_jax.decode import command
from pasta_jax.decode.generate import DecodeError, Generator
from pasta_jax.lang.layout import STRATEGIES
from pasta_jax.model.lora import AdapterError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A config whose adapter was trained by the trainer for four steps on the seed data, and its folder."""
  folder = tmp_path_factory.mktemp("modes")
  config = trained_config(folder)
  config.decode.update(max_new_tokens=40, slots=2, capacity=1024, temperature=1.0, dtype="float32")
  prompts = [{"id": str(i), "prompt": text} for i, text in enumerate(["Plan a trip.", "Why?", "Name three birds."])]
  (folder / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
  return config, folder


def test_decode_one_prompt(trained, capsys, tmp_path):
  config, _ = trained
  response = command.decode_prompt(config, "Plan a trip.", timeline=str(tmp_path / "run.html"))
  out = capsys.readouterr()
  assert out.out == response.text + "\n"  # piped: the answer alone
  for figure in ("Tokens", "Decode steps", "Longest path", "Theoretical", "Wall clock", "Measured speed-up", "Peak"):
    assert figure in out.err
  assert "<svg" in (tmp_path / "run.html").read_text()


def test_decode_a_file_gives_what_single_prompts_give(trained, tmp_path):
  config, folder = trained
  command.decode_file(config, str(folder / "prompts.jsonl"), str(tmp_path / "out.jsonl"))
  rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
  assert [r["id"] for r in rows] == ["0", "1", "2"]
  generator = Generator(config)
  assert [r["text"] for r in rows] == [generator.respond(r["prompt"]).text for r in rows]


def test_no_promises_without_tags(trained):
  config, _ = trained
  with pytest.raises(DecodeError, match="no PASTA tags"):
    Generator(config, adapter="").respond("Plan a trip.")
  assert Generator(config, adapter="").respond("Plan a trip.", parallel=False).trace.cost.n_promises == 0


def test_wrong_input_is_one_clear_error(trained, tmp_path):
  config, folder = trained
  with pytest.raises(DecodeError, match="the prompt is empty"):
    command.decode_prompt(config, "  \n")
  with pytest.raises(DecodeError, match="the prompt has .* tokens, the pool has room"):
    Generator(config).respond("word " * 2000)
  with pytest.raises(DecodeError, match="there is no folder"):
    command.decode_file(config, str(folder / "prompts.jsonl"), str(tmp_path / "none" / "out.jsonl"))
  with pytest.raises(DecodeError, match="cannot be written"):
    command.decode_file(config, str(folder / "prompts.jsonl"), str(tmp_path))
  with pytest.raises(DecodeError, match="there is no folder"):
    command.decode_prompt(config, "Plan a trip.", timeline=str(tmp_path / "none" / "run.svg"))
  (tmp_path / "empty.jsonl").write_text('{"prompt": "a"}\n{"prompt": " "}\n')
  with pytest.raises(DecodeError, match="row 2: the prompt is empty"):
    command.decode_file(config, str(tmp_path / "empty.jsonl"), None)
  for field, value, words in (("dtype", "bf16", "decode.dtype must be"), ("requests", 0, "must be 1 or more")):
    wrong = config.copy_and_resolve_references()
    wrong.decode[field] = value
    with pytest.raises(DecodeError, match=words):
      command.decode_file(wrong, str(folder / "prompts.jsonl"), None)
  with pytest.raises(DataError, match="no such data file"):
    command.decode_file(config, str(tmp_path / "none.jsonl"), None)
  with pytest.raises(AdapterError, match="no adapter file"):
    Generator(config, adapter=str(tmp_path / "none.safetensors"))


def test_every_step_of_the_ablation_is_a_command_that_parses(monkeypatch):
  """Each printed command names a config that loads, and flags that exist; the trained adapter is what is evaluated."""
  commands = [shlex.split(c) for c in sweep("a folder/runs", "data.jsonl", "prompts.jsonl", "--config.train.steps=3")]
  trained = [c for c in commands if "--mode=train" in c]
  assert [positions.get_config(s).positions.strategy for s in STRATEGIES] == list(STRATEGIES)
  assert len(trained) == len(STRATEGIES) == len(commands) - len(trained) + 1  # the oracle is not decoded
  for words in commands:
    monkeypatch.setattr(sys, "argv", words[1:])  # where ml_collections looks for overrides
    parsed = config_flags.DEFINE_config_file("config", flag_values=(values := flags.FlagValues()))
    flags.DEFINE_string("mode", "", "", flag_values=values)
    flags.DEFINE_string("workdir", "", "", flag_values=values)
    values(words[1:])
    assert parsed.value.train.steps == 3 and values.workdir.startswith("a folder/runs/")
    if values.mode == "eval":
      strategy = parsed.value.positions.strategy
      assert parsed.value.systems.pasta.adapter == f"a folder/runs/{strategy}/train/adapter.safetensors"


@pytest.mark.parametrize("arguments, words", [
    (["--config.decode.slot=3"], "slot"),
    (["--config=configs/none.py"], "configs/none.py"),
    (["--mode=train"], "--workdir"),
    (["--mode=eval", "--workdir=/proc/none", "--config.eval.prompts=data/seed.jsonl"], "/proc/none"),
    (["--prompt="], "prompt is empty"),
    (["--prompt=a", "--output=b.jsonl"], "--output and --prompt do not go together"),
    (["--mode=train", "--workdir=none", "--config.train.dtype=fp32"], "train.dtype must be"),
    (["stray"], "stray"),
], ids=lambda x: "" if isinstance(x, str) else x[0])
def test_the_command_line_says_it_in_one_line(arguments, words):
  run = subprocess.run([sys.executable, "main.py", *arguments], cwd=ROOT, capture_output=True, text=True,
                       stdin=subprocess.DEVNULL, timeout=300)
  assert run.returncode != 0
  assert words in run.stderr and "Traceback" not in run.stderr
