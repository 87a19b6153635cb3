"""The modes as a user runs them, on a tiny model; and what a user reads when something is wrong."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from helpers.folders import trained_config, with_fields
from ml_collections import config_flags

from configs.ablations import forms, positions, preference, stages
from pasta_jax.config import from_flags
from pasta_jax.config.sections import kept_folder
from pasta_jax.decode import command
from pasta_jax.decode.generator import DecodeError, Model
from pasta_jax.lang.positions import ORACLES, STRATEGIES
from pasta_jax.preference.policies import policies
from pasta_jax.utils.jsonl import DataError
from pasta_jax.utils.waiting import Waiting
from pasta_jax.weights.adapter import AdapterError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A config whose adapter was trained by the trainer for four steps on the seed data, and its folder."""
  folder = tmp_path_factory.mktemp("modes")
  config = with_fields(
    trained_config(folder),
    "decode",
    max_new_tokens=40,
    max_branches=2,
    kv_capacity=1024,
    temperature=1.0,
    dtype="float32",
  )
  prompts = [
    {"id": str(i), "prompt": text} for i, text in enumerate(["Plan a trip.", "Why?", "Name three birds."])
  ]
  (folder / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
  return config, folder


def test_decode_one_prompt(trained, capsys, tmp_path):
  config, _ = trained
  response = command.decode_prompt(config, "Plan a trip.", timeline=str(tmp_path / "run.html"))
  out = capsys.readouterr()
  assert out.out == response.text + "\n"  # piped: the answer alone
  for figure in (
    "Tokens",
    "Decode steps",
    "Longest path",
    "Theoretical",
    "Wall clock",
    "Same-text speedup",
    "Peak",
    "kernels: xla",
  ):
    assert figure in out.err
  assert "<svg" in (tmp_path / "run.html").read_text()


def test_decode_a_file_gives_what_single_prompts_give(trained, tmp_path):
  config, folder = trained
  command.decode_file(config, str(folder / "prompts.jsonl"), str(tmp_path / "out.jsonl"))
  rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
  assert [r["id"] for r in rows] == ["0", "1", "2"]
  generator = Model(config)
  assert {(r["dtype"], r["kernels"]) for r in rows} == {("float32", "xla")}
  assert [r["text"] for r in rows] == [generator.generate(r["prompt"]).text for r in rows]


def test_no_promises_without_tags(trained):
  config, _ = trained
  with pytest.raises(DecodeError, match="no PASTA tags"):
    Model(config, adapter="").generate("Plan a trip.")
  assert Model(config, adapter="").generate("Plan a trip.", parallel=False).trace.cost.n_promises == 0


def test_wrong_input_is_one_clear_error(trained, tmp_path):
  config, folder = trained
  with pytest.raises(DecodeError, match="the prompt is empty"):
    command.decode_prompt(config, "  \n")
  with pytest.raises(DecodeError, match="the prompt has .* tokens, the pool has room"):
    Model(config).generate("word " * 2000)
  with pytest.raises(DecodeError, match="there is no folder"):
    command.decode_file(config, str(folder / "prompts.jsonl"), str(tmp_path / "none" / "out.jsonl"))
  with pytest.raises(DecodeError, match="cannot be written"):
    command.decode_file(config, str(folder / "prompts.jsonl"), str(tmp_path))
  with pytest.raises(DecodeError, match="there is no folder"):
    command.decode_prompt(config, "Plan a trip.", timeline=str(tmp_path / "none" / "run.svg"))
  (tmp_path / "empty.jsonl").write_text('{"prompt": "a"}\n{"prompt": " "}\n')
  with pytest.raises(DecodeError, match="row 2: the prompt is empty"):
    command.decode_file(config, str(tmp_path / "empty.jsonl"), None)
  with pytest.raises(DataError, match="no such data file"):
    command.decode_file(config, str(tmp_path / "none.jsonl"), None)
  with pytest.raises(AdapterError, match="no adapter file"):
    Model(config, adapter=str(tmp_path / "none.safetensors"))


def parsed(words: list[str], monkeypatch) -> flags.FlagValues:
  """The flags of a command, its config loaded."""
  monkeypatch.setattr(sys, "argv", words)  # where ml_collections looks for overrides
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values)
  for name in ("mode", "workdir", "adapters", "data", "output"):
    flags.DEFINE_string(name, "", "", flag_values=values)
  values(words)
  return values


def test_every_step_of_the_ablation_is_a_command_that_parses(monkeypatch):
  """Each printed command names a config that loads, and flags that exist; the trained adapter is what is
  evaluated."""
  steps = positions.sweep("a folder/runs", "data.jsonl", "prompts.jsonl", "--config.train.steps=3")
  commands = [shlex.split(c) for c in steps]
  trained = [c for c in commands if "--mode=train" in c]
  assert [positions.get_config(s).positions.strategy for s in STRATEGIES] == list(STRATEGIES)
  assert (
    len(trained) == len(STRATEGIES) == len(commands) - len(trained) + len(ORACLES)
  )  # those are not decoded
  for words in commands:
    values = parsed(words[1:], monkeypatch)
    assert values.config.train.steps == 3 and values.workdir.startswith("a folder/runs/")
    if values.mode == "eval":
      strategy = values.config.positions.strategy
      assert values.config.systems.pasta.adapter == f"a folder/runs/{strategy}/train/adapter.safetensors"


def test_figure_6_is_the_papers_six_by_its_recipe(monkeypatch):
  """Baseline-SFT is trained on the same rows first, and is what the others are compared with."""
  steps = positions.sweep("runs", "data.jsonl", "p.jsonl", "--paper", "--config.train.seed=3")
  found = [parsed(shlex.split(c)[1:], monkeypatch) for c in steps]
  configs = [from_flags(f.config) for f in found]
  assert all(c.train.seed == 3 and c.train.lora_rank == 0 and c.train.learning_rate == 1e-5 for c in configs)
  trained = [c for c, f in zip(configs, found) if f.mode == "train"]
  assert [c.train.annotation for c in trained] == ["none"] + 6 * ["plan"]
  assert [c.positions.strategy for c in trained[1:]] == [
    *("pred_10x", "pred_1x", "oracle", "oracle_10x", "oracle_1x", "fixed"),
  ]  # fmt: skip
  assert trained[-1].positions.fixed == 40 and found[0].workdir == "runs/baseline/train"
  evaluated = [c for c, f in zip(configs, found) if f.mode == "eval"]
  assert [c.positions.strategy for c in evaluated] == ["pred_10x", "pred_1x", "fixed"]
  for c in evaluated:
    assert c.systems["pasta"].adapter == f"runs/{c.positions.strategy}/train/adapter.safetensors"
    assert c.systems["baseline"].adapter == "runs/baseline/train/adapter.safetensors"
  with pytest.raises(ValueError, match="'max' is none of pred_10x, pred_1x, oracle"):
    positions.get_config("paper_max")


def test_figure_8_is_four_scores_by_the_papers_recipe(monkeypatch):
  steps = preference.sweep("runs", "t.jsonl", "h.jsonl", "--paper", "--config.preference.seed=3")
  found = [parsed(shlex.split(c)[1:], monkeypatch) for c in steps if c.startswith("python ")]
  configs = [from_flags(f.config).preference for f in found]
  scores = ["theoretical", "harmonic", "arithmetic", "parallelism"]
  assert [c.score for c in configs] == scores and [f.workdir for f in found] == [f"runs/{s}" for s in scores]
  for c in configs:
    assert (c.weights, c.rounds, c.samples, c.seed) == ((1, 2, 4, 8), 1, 10, 3)
    assert (c.quality, c.per_token, c.learning_rate) == ("ratio", False, 5e-7)
  with pytest.raises(ValueError, match="'delivered' is none of theoretical, harmonic"):
    preference.get_config("paper_delivered")


def test_figure_5_evaluates_every_stage_of_what_it_trains(monkeypatch):
  """Each system's adapter is one that the training leaves: in a round's folder, or in one that `keep` names."""
  steps = stages.sweep("a folder/runs", "t.jsonl", "h.jsonl", "--config.preference.limit=3")
  trained, evaluated = (parsed(shlex.split(c)[1:], monkeypatch) for c in steps)
  assert (trained.mode, evaluated.mode) == ("preference", "eval")
  c, e = from_flags(trained.config), from_flags(evaluated.config)
  assert c.preference.limit == e.preference.limit == 3 and c.preference.stages == ("sample", "judge", "train")
  assert c.preference.rounds == 2 and c.eval.prompts == e.eval.prompts == "h.jsonl"
  left = {
    f"{trained.workdir}/{policy.name}/round{n}/train/{folder}adapter.safetensors"
    for policy in policies(c)
    for n in (1, 2)
    for folder in ("", *(f"{kept_folder(s)}/" for s in c.preference.keep))
  }
  start, *systems = e.eval.systems
  named = [e.systems[s].adapter for s in systems]
  assert start == "pasta" and len(named) == len(set(named)) == 4 * 5 and set(named) <= left
  at = "a folder/runs/preference/weight_4/round2/train/kept_60/adapter.safetensors"
  assert e.systems["weight_4_round2_at60"].adapter == at


def test_every_step_of_the_ablation_of_forms_parses(monkeypatch):
  """Rows are chosen before they are trained on, by every form alike; what was trained is evaluated and read."""
  steps = forms.sweep("a folder/runs", "a.jsonl*2,b.jsonl", "held.jsonl", "p.jsonl", "--config.train.seed=3")
  commands = [shlex.split(c) for c in steps]
  found = [parsed(words[2 if "-m" in words else 1 :], monkeypatch) for words in commands]
  assert all(f.config.train.seed == 3 for f in found)
  by_topic, by_head, *trained, evaluated, read = found
  assert [words[2] for words in commands if words[1] == "-m"] == [
    *["pasta_jax.data.choose"] * 2, "pasta_jax.evaluate.text_nats",
  ]  # fmt: skip
  assert by_topic.config.train.data == "a.jsonl*2,b.jsonl" and by_topic.config.train.min_speedup == 1.4
  assert by_head.config.train.data == by_topic.output and by_head.config.language.promise == "head"
  for f in (by_head, *trained):
    assert f.config.train.min_speedup == 0 and f.config.train.plain_share == 1
  adapters = [f"{f.workdir}/adapter.safetensors" for f in trained]
  for form, f in zip(forms.FORMS, trained, strict=True):
    assert f.mode == "train" and f.workdir == f"a folder/runs/{form}/train"
    assert f.config.train.data == by_head.output and f.config.train.validation == "held.jsonl"
    assert (f.config.train.steps, f.config.train.annotation == "none") == (275, form == "baseline")
  assert [evaluated.config.systems[form].adapter for form in forms.FORMS] == adapters
  assert evaluated.mode == "eval" and from_flags(evaluated.config).eval.systems == ("topic", "head", "live")
  assert read.data == "held.jsonl" and sorted(read.adapters.split(",")) == sorted(adapters)
  with pytest.raises(ValueError, match="'short' is none of topic, head, live, baseline"):
    forms.get_config("short")


def test_every_step_of_the_preference_ablation_parses(monkeypatch, tmp_path):
  """The first run draws the samples, the others get copies, also when all of it is started again."""
  runs = tmp_path / "a folder"
  steps = preference.sweep(str(runs), "train.jsonl", "held out.jsonl", "--config.preference.rounds=1")
  commands = [shlex.split(c) for c in steps if c.startswith("python ")]
  found = [parsed(words[1:], monkeypatch) for words in commands]
  scores = [f.config.preference.score for f in found]
  assert scores == ["delivered", "theoretical", "parallelism", "arithmetic", "harmonic"]
  for f in found:
    assert f.mode == "preference" and f.workdir == str(runs / f.config.preference.score)
    assert f.config.preference.prompts == "train.jsonl" and f.config.eval.prompts == "held out.jsonl"
    assert f.config.preference.rounds == 1
  (runs / "delivered" / "start").mkdir(parents=True)
  for name in ("start/samples.jsonl", "baseline.jsonl", "baseline.settings.json"):
    (runs / "delivered" / name).write_text(name)
  for _ in range(2):
    for c in steps:
      if not c.startswith("python "):
        subprocess.run(["bash", "-ec", c], check=True)
  for score in scores[1:]:
    assert (runs / score / "start" / "samples.jsonl").read_text() == "start/samples.jsonl"
    assert (runs / score / "baseline.settings.json").read_text() == "baseline.settings.json"
  with_clock = preference.sweep("runs", "train.jsonl", "held.jsonl", "--config.preference.cost=cost.json")
  assert shlex.split(with_clock[-1])[2] == "--config=configs/ablations/preference.py:clock"
  with pytest.raises(ValueError, match="'speed' is none of delivered, theoretical"):
    preference.get_config("speed")


def test_a_stopped_training_has_an_exit_code_of_its_own(monkeypatch, tmp_path, capsys):
  """Launchers start the same command again where they see it."""
  import main
  from pasta_jax.train import loop, sft

  def stopped(config, workdir):
    raise loop.Stopped("stopped by SIGTERM after step 3 of 6")

  monkeypatch.setattr(sft, "train", stopped)
  monkeypatch.setenv("PASTA_CACHE", str(tmp_path))
  monkeypatch.setattr("pasta_jax.utils.environment.use_compilation_cache", lambda folder: None)
  main.parse(["main.py", "--mode=train", f"--workdir={tmp_path}"])
  with pytest.raises(SystemExit) as left:
    main.main(["main.py"])
  assert left.value.code == main.RESTART == 75 and "after step 3 of 6" in capsys.readouterr().out

  def waits(config, workdir):
    raise Waiting("2 requests to m wait in a.jsonl")

  monkeypatch.setattr("pasta_jax.evaluate.run.evaluate", waits)
  main.parse(["main.py", "--mode=eval", f"--workdir={tmp_path}"])
  with pytest.raises(SystemExit) as left:
    main.main(["main.py"])
  assert (
    left.value.code == main.WAITING == 4 and capsys.readouterr().out == "2 requests to m wait in a.jsonl\n"
  )
  monkeypatch.setattr(sys, "argv", ["main.py"])
  main.parse(["main.py", "--mode=report", f"--workdir={tmp_path}", "--distributed"])
  with pytest.raises(SystemExit) as left:
    main.main(["main.py"])
  assert left.value.code == 1 and "--distributed is for --mode=train," in (said := capsys.readouterr().err)
  assert said.endswith(", not report\n")
  main.parse(["main.py", "--mode=decode", "--prompts_file=a.jsonl", "--distributed"])
  with pytest.raises(SystemExit):
    main.main(["main.py"])
  assert "--mode=decode --distributed needs --prompts_file and --output" in capsys.readouterr().err


@pytest.mark.parametrize(
  "arguments, words",
  [
    (["--config.decode.slot=3"], "slot"),
    (["--config=configs/none.py"], "configs/none.py"),
    (["--mode=train"], "--workdir"),
    (["--mode=eval", "--workdir=/proc/none", "--config.eval.prompts=data/seed.jsonl"], "/proc/none"),
    (["--prompt="], "prompt is empty"),
    (["--prompt=a", "--output=b.jsonl"], "--output and --prompt do not go together"),
    (["--mode=train", "--workdir=none", "--config.train.dtype=fp32"], "train.dtype must be"),
    (["stray"], "stray"),
  ],
  ids=lambda x: "" if isinstance(x, str) else x[0],
)
def test_the_command_line_says_it_in_one_line(arguments, words):
  run = subprocess.run(
    [sys.executable, "main.py", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    stdin=subprocess.DEVNULL,
    timeout=300,
  )
  assert run.returncode != 0
  assert words in run.stderr and "Traceback" not in run.stderr
