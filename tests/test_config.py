"""Settings: flags as README and docs write them, rules, identity, and what old runs and config files have."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import main
from configs import smollm2_135m, tiny
from pasta_jax import config as settings
from pasta_jax.config import ALIASES, Config, System, from_flags, identity, sections, to_flags, with_changes
from pasta_jax.lang.positions import PositionRule
from pasta_jax.model import transformer
from pasta_jax.preference.score import SPEEDUPS
from pasta_jax.train import ahead
from pasta_jax.utils import endpoint
from pasta_jax.utils.records import Records

ROOT = Path(__file__).parent.parent
TEXTS = [
  ROOT / "README.md",
  *(ROOT / "docs").glob("**/*.md"),
  *(ROOT / "configs").glob("**/*.py"),
  *(ROOT / "launch").iterdir(),
  *(ROOT / "pasta_jax").glob("**/*.md"),
]
# Flags of the first README and docs, some of them by names that have changed since.
FLAGS = """
--config.annotate.check=False --config.annotate.data=a.jsonl --config.annotate.kind=structure
--config.annotate.url=http://localhost:8000/v1 --config.annotate.per_minute=60 --config.annotate.against=b.jsonl
--config.compile.stages=train,preference --config.compile.topology=v5e:4x4 --config.dataset.strict=True
--config.dataset.train=annotated.jsonl,data/seed.jsonl --config.dataset.validation_share=0.05
--config.decode.dtype=float32 --config.decode.max_depth=2 --config.decode.no_repeat=0
--config.decode.parallel=False --config.decode.promise_bias=0.0 --config.decode.repetition_penalty=1.0
--config.decode.speed=0 --config.decode.temperature=0.7 --config.decode.slots=2 --config.decode.capacity=2048
--config.decode.requests=8 --config.eval.categories=writing,math --config.eval.judges=local,llm,people.jsonl
--config.eval.min_quality=40 --config.eval.min_speedup=1.3 --config.eval.prompts=alpaca_eval.json
--config.eval.systems=pasta,baseline,apar,sot,sequential,base --config.eval.timed=-1 --config.eval.requests=8
--config.eval.timed_prompts=timed_40.jsonl --config.eval.width=4 --config.export.form=peft
--config.mesh.tensor=2 --config.mesh.data=2 --config.model.adapter=pasta_fast --config.model.source=/a/folder
--config.preference.accumulate=1 --config.preference.clip=0.5 --config.preference.requests=16
--config.preference.width=3 --config.preference.weights=1,2,4,8,inf --config.preference.conditioned=True
--config.preference.share=2/3 --config.preference.stages=sample --config.preference.score=theoretical
--config.systems.baseline.adapter=mine.safetensors --config.train.data=data/seed.jsonl*2,sft/train.jsonl
--config.train.validation=runs/data/responses/1.0.0:validation --config.train.lora_rank=0
--config.train.accumulate=4 --config.train.clip=2.0 --config.train.attention=gpu --config.train.workers=3
"""


def flags_in(text: str) -> dict[str, str]:
  """{dotted name: value, or "" where the text has none or a placeholder} of each `--config.` flag."""
  found = re.findall(r"--config\.([a-z_]+(?:\.[a-z_0-9]+)+)(?:=([^\s`\"'|)\]]*))?", text)
  return {name: "" if re.search("[{}…]|^[A-Z_]+$", value) else value.rstrip(".,:") for name, value in found}


def parsed(arguments: list[str], monkeypatch) -> Config:
  """What main.py's modes get, from its own parser."""
  monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
  for name in [n for n in main.FLAGS if n.startswith("config.")]:
    delattr(main.FLAGS, name)  # ml_collections defines them anew for each command
  main.FLAGS.unparse_flags()
  main.parse(sys.argv)
  return from_flags(main.FLAGS.config)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_flags_that_are_written_anywhere_exist(path: Path, monkeypatch):
  """A name without a value exists; one with a value lands where it belongs."""
  defaults = to_flags(Config())
  for name, value in flags_in(path.read_text()).items():
    section, field = ALIASES.get(name, name).rsplit(".", 1)
    part = defaults
    for step in section.split("."):
      part = part[step]
    assert field in part, f"{path}: --config.{name}"
    if value and name != "preference.share":
      given = parsed([f"--config.{name}={value}"], monkeypatch).to_dict()
      for step in (*section.split("."), field):
        given = given[step]
      assert given == type(given)(value) if not isinstance(given, bool) else str(given) == value


def test_readme_is_read():
  assert len({name for path in TEXTS for name in flags_in(path.read_text())}) > 30
  assert flags_in("a `--config.eval.min_quality=40`. --config.train.workers: --config.eval.prompts=FILE") == {
    "eval.min_quality": "40", "train.workers": "", "eval.prompts": ""}  # fmt: skip


def test_flags_of_the_first_readme(monkeypatch):
  """Old names included; lists land as tuples."""
  arguments = shlex.split(FLAGS)
  config = parsed(arguments, monkeypatch)
  for argument in arguments:
    name, _, value = argument.removeprefix("--config.").partition("=")
    path = ALIASES.get(name, name).split(".")
    given = config.to_dict()
    for step in path:
      given = given[step]
    assert given == type(given)(value) if not isinstance(given, bool) else str(given) == value, argument
  assert config.train.data == ("data/seed.jsonl*2", "sft/train.jsonl")
  assert config.preference.weights == (1, 2, 4, 8, float("inf"))
  assert config.eval.categories == ("writing", "math") and config.compile.stages == ("train", "preference")
  assert config.systems["pasta"].adapter == config.systems["sequential"].adapter == "pasta_fast"
  assert config.systems["baseline"].adapter == "mine.safetensors"


def test_a_setting_that_is_left_open(monkeypatch):
  """It has no value but a type, on the command line too; what a run's config.json has counts as given."""
  config = parsed(["--config.decode.promise_bias=1"], monkeypatch)
  assert config.decode.promise_bias == 1.0 and config.decode.no_repeat is None
  assert config.to_dict()["decode"]["no_repeat"] is None and parsed([], monkeypatch).decode == Config().decode
  with pytest.raises(SystemExit):  # absl has named the flag
    parsed(["--config.decode.no_repeat=few"], monkeypatch)
  resolved = config.decode.resolved({"promise_bias": 3.0, "no_repeat": 0})
  assert (resolved.promise_bias, resolved.no_repeat, resolved.repetition_penalty) == (1.0, 0, 1.1)
  assert set(sections.OWN_SETTINGS) == {n for n, v in vars(Config().decode).items() if v is None}


def test_lists_are_written_with_spaces_too():
  config = with_changes(
    Config(), {"train.data": " b , a*1,", "eval.judges": "", "preference.weights": "1, inf"}
  )
  assert config.train.data == ("b", "a*1") and config.eval.judges == ()
  assert config.preference.weights == (1.0, float("inf"))
  assert with_changes(config, {"preference.weights": [0.1, 1 / 3]}).to_dict()["preference"]["weights"] == (
    f"0.1,{1 / 3!r}"
  )


def test_a_comma_in_a_name_has_a_backslash_before_it():
  config = with_changes(Config(), {"train.data": r"a\,b.jsonl*2, c.jsonl"})
  assert config.train.data == ("a,b.jsonl*2", "c.jsonl")
  assert Config.from_dict(config.to_dict()).train == config.train


def test_one_rule_for_every_path(monkeypatch):
  monkeypatch.setenv("HOME", "/home/her")
  paths = {"model.source": "~/a", "model.adapter": "~/b", "train.data": "~/c*2,d/~e", "eval.prompts": "~/f~"}
  config = with_changes(Config(), paths | {"systems.apar.adapter": "~/g", "eval.judges": "local,~/h.jsonl"})
  assert (config.model.source, config.model.adapter) == ("/home/her/a", "/home/her/b")
  assert config.train.data == ("/home/her/c*2", "d/~e") and config.eval.prompts == "/home/her/f~"
  assert config.systems["pasta"].adapter == "/home/her/b" and config.systems["apar"].adapter == "/home/her/g"
  assert config.eval.judges == ("local", "/home/her/h.jsonl")


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"train.lenght": 5}, "there is no setting train.lenght"),
    ({"trian.length": 5}, "there is no section 'trian'"),
    ({"systems.none.adapter": "a"}, "there is no section 'systems.none'"),
    ({"train.length": "5"}, "train.length must be an integer, not '5'"),
    ({"train.length": True}, "train.length must be an integer, not True"),
    ({"train.warmup": "a"}, "train.warmup must be a number, not 'a'"),
    ({"decode.guard": 1}, "decode.guard must be True or False, not 1"),
    ({"train.data": 3}, "train.data must be text or several"),
    ({"train.batch_size": 0}, "train.batch_size must be 1 to 65536, not 0"),
    ({"train.remat": "all"}, "train.remat must be one of none, full, attention, products, not 'all'"),
    ({"train.attention": "flash"}, "train.attention must be one of auto, .*, not 'flash'"),
    ({"train.annotation": "tree"}, "train.annotation must be one of plan, structure, none"),
    ({"train.epochs": 0.0}, "train.epochs must be above 0"),
    ({"positions.strategy": "far"}, "positions.strategy must be one of pred_10x"),
    ({"mesh.data": 0}, "mesh=.*: sizes are 1 or more"),
    ({"mesh.data": -1}, "mesh=.*: sizes are 1 or more; one may be -1"),
    ({"decode.top_p": 0.0}, r"decode.top_p must be in \(0, 1\], not 0.0"),
    ({"decode.min_p": 1.0}, r"decode.min_p must be in \[0, 1\), not 1.0"),
    ({"decode.temperature": float("nan")}, "decode.temperature must be a finite number, not nan"),
    ({"decode.promise_bias": float("-inf")}, "decode.promise_bias must be a finite number"),
    ({"decode.temperature": -0.1}, "decode.temperature must be 0 or more"),
    ({"decode.max_branches": 0}, "decode.max_branches must be 1 to 256, not 0"),
    ({"decode.max_branches": 10_000}, "decode.max_branches must be 1 to 256"),
    ({"decode.max_branches": 8, "decode.kv_capacity": 8}, "kv_capacity=8 must be above decode.max_branches=8"),
    ({"decode.max_depth": 100}, "decode.max_depth must be 0 to 8"),
    ({"decode.max_threads": 10**6}, "decode.max_threads must be 1 to 4096"),
    ({"decode.seed": 10**400}, "decode.seed must be 2147483647 at most"),
    ({"train.learning_rate": float("inf")}, "train.learning_rate must be a finite number"),
    ({"train.data": "a.jsonl,gs://b/c.jsonl"}, "train.data=gs://b/c.jsonl: gs:// is not supported: mount it"),
    ({"model.source": "hf://a/b"}, "model.source=hf://a/b: hf:// is not supported"),
    ({"decode.dtype": "bf16"}, "decode.dtype must be one of auto, float32, bfloat16, int8, fp8, not 'bf16'"),
    ({"train.dtype": "int8"}, "train.dtype must be one of auto, float32, bfloat16, not 'int8'"),
    ({"eval.dtype": "auto"}, "eval.dtype must be one of float32, bfloat16, int8, fp8, not 'auto'"),
    ({"preference.sample_dtype": "auto"}, "preference.sample_dtype must be one of float32, bfloat16"),
    ({"export.dtype": "fp8"}, "export.dtype must be one of float32, bfloat16, not 'fp8'"),
    ({"decode.batch_size": 0}, "decode.batch_size must be 1 to 4096"),
    ({"systems.sot.decode": "points"}, "systems.sot.decode must be one of parallel"),
    ({"eval.systems": "pasta,faster"}, "eval.systems: unknown system 'faster'; config.systems has pasta"),
    ({"eval.baseline": "none"}, "eval.baseline: unknown system 'none'"),
    ({"eval.timed": -2}, "eval.timed must be -1 or more"),
    ({"eval.judges": "llm,friend"}, "eval.judges takes local, llm, .* not 'friend'"),
    ({"preference.weights": ""}, "preference.weights must be weights of quality"),
    ({"preference.weights": "-1"}, "preference.weights must be weights of quality"),
    ({"preference.weights": "nan"}, "preference.weights must be weights of quality"),
    ({"preference.share": "4/3", "preference.stages": "sample"}, 'preference.share must be like "2/3"'),
    ({"preference.share": "2/3"}, "preference.share='2/3' is for samples"),
    ({"preference.keep": "0.1,1"}, "preference.keep must be shares of the steps between 0 and 1"),
    ({"preference.keep": "0.1,0.1"}, "preference.keep must be shares of the steps between 0 and 1, each once"),
    ({"annotate.rules": "all"}, "annotate.rules must be one of independent, full, paper, not 'all'"),
    ({"preference.samples": 1}, "preference.samples must be 2 or more"),
    ({"preference.beta": -0.1}, "preference.beta must be 0 or more"),
    ({"judge.kind": "structure"}, "judge.kind must be one of openai, gemini, batch"),
    ({"annotate.timeout": 0.0}, "annotate.timeout must be above 0"),
    ({"dataset.validation_share": 1.0}, r"dataset.validation_share must be in \[0, 1\)"),
    ({"compile.stages": "sample"}, "compile.stages takes train, preference, prefill, decode, not 'sample'"),
    ({"export.form": "gguf"}, "export.form must be one of merged, peft"),
  ],
)  # fmt: skip
def test_what_no_mode_can_use_is_one_line(changes, message):
  with pytest.raises(ValueError, match=message) as error:
    with_changes(Config(), changes)
  assert "\n" not in str(error.value)


def test_edges_are_valid():
  with_changes(Config(), {
    "decode.top_p": 1.0, "decode.min_p": 0.0, "decode.temperature": 0, "preference.alpha": 1,
    "preference.beta": 0.0, "preference.share": "3/3", "preference.stages": "sample", "train.epochs": 0.0,
    "train.steps": 1, "mesh.data": -1, "mesh.fsdp": 1, "annotate.kind": "structure", "eval.judges": "a.jsonl.gz",
  })  # fmt: skip


def test_choices_are_what_is_implemented():
  assert set(sections.REMAT) == set(transformer.REMAT)
  assert set(sections.SCORES) == {*SPEEDUPS, "clock"}
  assert set(sections.PROVIDERS) == {*endpoint._URLS, endpoint.BATCH}
  assert (*ahead.TASKS, "prefill", "decode") == sections.PROGRAMS
  assert PositionRule() == PositionRule(**vars(Config().positions))


def test_a_config_cannot_be_changed_and_systems_follow_the_model():
  config = Config()
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.train.length = 5  # type: ignore[misc]
  changed = with_changes(config, {"model.adapter": "mine"})
  assert changed.systems["pasta"].adapter == changed.systems["sequential"].adapter == "mine"
  assert changed.systems["fast"].adapter == "pasta_fast" and config.systems["pasta"].adapter == "pasta"
  own = with_changes(with_changes(config, {"systems.pasta.adapter": "own"}), {"model.adapter": "mine"})
  assert [own.systems[n].adapter for n in ("pasta", "sequential")] == ["own", "mine"]
  flags = to_flags(config)
  flags.model.adapter = "mine"
  assert from_flags(flags).systems["sequential"].adapter == "mine"


def test_round_trips():
  for config in (Config(), from_flags(tiny.get_config()), from_flags(smollm2_135m.get_config("baseline"))):
    values = json.loads(config.to_json(indent=2))
    back = Config.from_dict(values)
    assert values == config.to_dict() == back.to_dict() == from_flags(to_flags(config)).to_dict()
    assert list(values["systems"]) == list(config.systems) == list(from_flags(to_flags(config)).systems)
  ours = from_flags(smollm2_135m.get_config())  # the defaults, but for the form that training teaches
  assert (
    with_changes(Config(), {f"language.{k}": v for k, v in vars(ours.language).items()}).to_dict()
    == ours.to_dict()
  )
  paper = sections.Language()
  assert ours.language != paper == from_flags(smollm2_135m.get_config("apar")).language
  fast = dataclasses.replace(Config(), systems=Config().systems | {"a": System("x", speed=2)})
  assert fast.to_dict()["systems"]["a"] == {"adapter": "x", "decode": "parallel", "speed": 2}
  assert Config.from_dict(fast.to_dict()).systems["a"].speed == 2
  assert "speed" not in fast.to_dict()["systems"]["pasta"]


def test_what_a_runs_identity_is():
  """Names that are stored beside results: a name that is missing or new makes old runs be refused."""
  without = {"dtype", "max_new_tokens", "kv_capacity", "temperature", "top_k", "top_p", "min_p",
             "repetition_penalty", "no_repeat", "seed"}  # fmt: skip
  config = Config()
  assert set(identity(config.decode, promises=False)) == without
  assert set(identity(config.decode)) == without | {
    "max_threads", "max_depth", "max_topic", "guard", "promise_bias"}  # fmt: skip
  invariant = dataclasses.replace(config.decode, invariant=True)
  assert set(identity(invariant, promises=False)) == without | {"invariant"}  # late, as those below
  assert identity(config.positions) == {"strategy": "pred_10x", "fixed": 60}
  assert identity(config.skeleton) == {"max_points": 10, "outline_tokens": 160, "point_tokens": 128}
  assert set(config.to_dict()["preference"]) - set(identity(config.preference)) == {
    "stages", "audit", "decode_batch_size", "branch_width", "rounds", "weights", "share", "checkpoint_every", "keep",
    "best", "quality", "plain",  # late: while they have their defaults
  }  # fmt: skip
  late = {"max_parts", "min_part", "start", "length_spread", "teacher"}
  assert set(identity(config.train)) == set(config.to_dict()["train"]) - late
  files = {"train.data": "a/b.jsonl*2,c/d.jsonl", "preference.prompts": "x/y.jsonl"}
  moved = with_changes(config, files)
  assert identity(moved.train)["data"] == "b.jsonl*2,d.jsonl" and identity(moved.train)["validation"] == ""
  assert identity(moved.preference)["prompts"] == "y.jsonl" and identity(moved.preference)["cost"] == ""
  json.dumps([identity(moved.train), identity(moved.preference)])


def test_old_names_of_settings(tmp_path: Path):
  """In config.json, in settings beside results, and together with the new name."""
  old = Config().to_dict()
  for was, name in ALIASES.items():
    section, field = was.split(".")
    old[section][field] = old[section].pop(name.split(".")[1])
  assert Config.from_dict(old).to_dict() == Config().to_dict()
  with pytest.raises(ValueError, match="train.clip is called train.max_grad_norm now: both are given"):
    Config.from_dict({"train": {"clip": 1.0, "max_grad_norm": 1.0}})
  assert with_changes(Config(), {"train.clip": 0.5}).train.max_grad_norm == 0.5
  path = tmp_path / "rows.jsonl"
  Records(path, {"decode.kv_capacity": 4096, "source": "a"}).add({"id": "1", "prompt": "p"})
  beside = path.with_suffix(".settings.json")
  beside.write_text(beside.read_text().replace("kv_capacity", "capacity"))
  assert list(Records(path, {"decode.kv_capacity": 4096, "source": "a"}).rows) == ["1"]
  with pytest.raises(ValueError, match="made with decode.kv_capacity=4096, not 512"):
    Records(path, {"decode.kv_capacity": 512, "source": "a"})


def test_a_config_file_of_ones_own(tmp_path: Path, monkeypatch):
  """Changes what `get_config` of ours returns; settings that do not exist are one line."""
  file = tmp_path / "mine.py"
  file.write_text(
    "from configs import smollm2_135m\n"
    "def get_config():\n"
    "  c = smollm2_135m.get_config()\n"
    "  c.train.update(length=99, data='a.jsonl,b.jsonl')\n"
    "  c.systems.mine = dict(adapter='m', decode='parallel')\n"
    "  return c\n"
  )
  config = parsed([f"--config={file}", "--config.eval.systems=mine,baseline"], monkeypatch)
  assert config.train.length == 99 and config.train.data == ("a.jsonl", "b.jsonl")
  assert config.systems["mine"] == System("m") and config.eval.systems == ("mine", "baseline")
  file.write_text(file.read_text().replace("length=99", "lenght=99"))
  with pytest.raises(ValueError, match="there is no setting train.lenght"):
    parsed([f"--config={file}"], monkeypatch)


def test_modes_import_what_they_need():
  """Settings import nothing heavy, the command line no JAX, decoding nothing of training."""
  code = "import sys, {}; print(*[m for m in {} if m in sys.modules])"
  for module, unwanted in (
    ("pasta_jax.config", ["jax", "flax", "numpy", "ml_collections"]),
    ("main", ["jax", "flax", "orbax", "optax"]),
    ("pasta_jax.decode.command", ["pasta_jax.train", "pasta_jax.evaluate", "tensorboardX"]),
  ):
    done = subprocess.run(
      [sys.executable, "-c", code.format(module, unwanted)],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=True,
    )
    assert done.stdout.strip() == "", module
  assert settings.__all__
