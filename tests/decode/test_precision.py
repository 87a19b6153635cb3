"""`dtype=auto`: the rule by a clock of the test, the cache, and that runs name what was chosen and keep it."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasta_jax.config import Config, with_changes
from pasta_jax.cpu.programs import unusable
from pasta_jax.decode import command, precision
from pasta_jax.decode.generator import Model
from pasta_jax.decode.record import ResponseRecord
from pasta_jax.evaluate.run import evaluate
from pasta_jax.preference import rounds
from pasta_jax.train import sft
from pasta_jax.utils import distributed
from pasta_jax.utils.records import settings_beside
from pasta_jax.weights.adapter import Adapter, read_metadata, write_adapter
from pasta_jax.weights.checkpoint import TINY, load_checkpoint

SLOW, FAST = {"float32": 1.0, "bfloat16": 2.0}, {"float32": 2.0, "bfloat16": 1.0}  # of bfloat16
BASE = {"model.source": "tiny", "model.adapter": "", "decode.max_new_tokens": 8, "decode.kv_capacity": 256}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
  """An empty cache folder."""
  monkeypatch.setenv("PASTA_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache" / "precision.json"


@pytest.fixture
def machine(monkeypatch, cache) -> "Machine":
  found = Machine(cache)
  monkeypatch.setattr(precision, "measure", found.measure)
  return found


class Machine:
  """One on which measurements say `seconds`."""

  def __init__(self, cache: Path):
    self.seconds, self.asked, self._cache = SLOW, [], cache

  def measure(self, task: str, kernels: str) -> dict[str, float]:
    self.asked.append((task, kernels))
    return self.seconds

  def change(self, seconds: dict[str, float]) -> None:
    """Another one, where nothing is cached."""
    self.seconds = seconds
    self._cache.unlink(missing_ok=True)


# The measurement.


@pytest.mark.parametrize("task", ["decode", "train"])
def test_medians_of_alternating_runs_are_summed(monkeypatch, task):
  """The first run of each program, which compiles it, does not count; nor does one slow one."""
  taken = {
    ("float32", 0): [50, 3, 9, 2],
    ("bfloat16", 0): [60, 5, 4, 90],
    ("float32", 1): [70, 8, 7, 7],
    ("bfloat16", 1): [80, 1, 1, 30],
  }
  order, now = [], [0.0]

  def programs(dtype: str, n: int):
    def run(i: int):
      order.append((dtype, i))
      now[0] += taken[dtype, i].pop(0)
      return jnp.zeros(1)

    return [lambda i=i: run(i) for i in range(n)]

  monkeypatch.setattr(precision, "_decoding", lambda dtype, kernels: programs(dtype, 2))
  monkeypatch.setattr(precision, "_training", lambda dtype: programs(dtype, 1))
  found = precision.measure(task, "xla", clock=lambda: now[0])
  assert found == (
    {"float32": 3 + 7, "bfloat16": 5 + 1} if task == "decode" else {"float32": 3, "bfloat16": 5}
  )
  turn = order[: len(order) // 4]
  assert order == 4 * turn and len(set(turn)) == len(turn)


@pytest.mark.parametrize("kernels", ["xla", "numba"])
def test_what_is_measured_are_products_of_the_step(monkeypatch, kernels):
  """Of the rows that a step has, by its kernels, each matrix after the one before it."""
  if kernels == "numba" and (reason := unusable()):
    pytest.skip(reason)
  for name, value in (("_WIDTH", 64), ("_HIDDEN", 96), ("_MATRICES", 3), ("_TOKENS", 6)):
    monkeypatch.setattr(precision, name, value)
  product, seen = precision.PRODUCTS[kernels], []
  watched = lambda x, kernel, scale: (seen.append(kernel.shape), product(x, kernel, scale))[1]
  monkeypatch.setitem(precision.PRODUCTS, kernels, watched)
  for dtype, rows in (("float32", [1, 8]), ("bfloat16", [2 if kernels == "xla" else 1, 8])):
    matrix = np.asarray(precision._random((64, 2, 96), dtype), np.float64)
    wanted = np.linalg.multi_dot([np.ones(64), *3 * [matrix[:, 0, :64]]])
    found = [run() for run in precision._decoding(dtype, kernels)]
    assert [x.shape for x in found] == [(n, 64) for n in rows] and {str(x.dtype) for x in found} == {dtype}
    for x in found:
      error = np.abs(np.asarray(x, np.float64) - wanted).max() / np.abs(wanted).max()
      assert error < (1e-5 if dtype == "float32" else 2e-2)
  assert set(seen) == {(64, 2, 96)}
  x_bar, y_bar = precision._training("bfloat16")[0]()
  assert (x_bar.shape, y_bar.shape) == ((6, 64), (64, 192)) and x_bar.dtype == y_bar.dtype == "bfloat16"


def test_the_faster_one_is_chosen(machine):
  assert precision.fastest("train") == "float32"
  machine.change(FAST)
  assert precision.fastest("train") == "bfloat16"
  machine.change({"float32": 1.0, "bfloat16": 1.0})
  assert precision.fastest("decode", "xla") == "bfloat16"  # half the memory


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_accelerators_are_not_measured(machine, monkeypatch, backend):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  assert precision.fastest("train") == precision.fastest("decode", "xla") == "bfloat16"
  assert not machine.asked


# The cache.


def test_each_measurement_is_made_once(machine, cache):
  for _ in range(2):
    assert precision.fastest("decode", "numba") == precision.fastest("train") == "float32"
    machine.seconds = FAST  # not looked at again
  assert machine.asked == [("decode", "numba"), ("train", "xla")]
  assert list(json.loads(cache.read_text()).values()) == [SLOW, SLOW]
  assert [p.name for p in cache.parent.iterdir()] == [cache.name]


@pytest.mark.parametrize(
  "content", [b"", b"{", b"\xff\xfe", b"[]", b"3", b'{"KEY": 3}', b'{"KEY": {"float32": 1.0}}', b'{"KEY": "float32"}',
              b'{"KEY": {"float32": 1.0, "bfloat16": NaN}}', b'{"KEY": {"float32": "a", "bfloat16": "b"}}'],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_written_anew(machine, cache, content):
  cache.parent.mkdir()
  cache.write_bytes(content.replace(b"KEY", precision._key("train", "xla").encode()))
  assert precision.fastest("train") == "float32" and precision.fastest("train") == "float32"
  assert len(machine.asked) == 1 and json.loads(cache.read_text())[precision._key("train", "xla")] == SLOW


@pytest.mark.parametrize("obstacle", ["the folder is a file", "the file is a folder"])
def test_a_cache_that_cannot_be_written_is_no_error(machine, cache, obstacle):
  if obstacle == "the folder is a file":
    cache.parent.write_text("")
  else:
    (cache / "inside").mkdir(parents=True)
  assert precision.fastest("train") == precision.fastest("train") == "float32"
  assert len(machine.asked) == 2  # each time


def test_the_key_has_what_the_answer_depends_on(monkeypatch):
  key = lambda: precision._key("decode", "numba")
  first = key()
  assert first == key() and precision._key("decode", "xla") != first != precision._key("train", "numba")
  name, features = precision.processor()
  optimised = jax.config.read("jax_disable_most_optimizations")
  for place, attribute, value in (
    (precision, "processor", lambda: ("another", features)),
    (precision, "processor", lambda: (name, f"{features} amx_bf16")),
    (precision, "cores", lambda: 512),
    (jax, "__version__", "99.0"),
  ):
    with monkeypatch.context() as other:
      other.setattr(place, attribute, value)
      assert key() != first
  with monkeypatch.context() as other:
    other.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2")
    assert key() != first
  try:
    jax.config.update("jax_disable_most_optimizations", not optimised)
    assert key() != first
  finally:
    jax.config.update("jax_disable_most_optimizations", optimised)
  assert key() == first


# What runs make of it.


def test_only_auto_is_resolved(machine):
  given = with_changes(Config(), {"decode.dtype": "int8", "train.dtype": "bfloat16"})
  assert precision.resolve(given, "decode") is given and precision.resolve(given, "train") is given
  assert not machine.asked
  found = precision.resolve(given, "preference")
  assert found == with_changes(given, {"preference.dtype": "float32"}) and machine.asked == [("train", "xla")]
  xla = with_changes(Config(), {"decode.kernels": "xla"})
  assert precision.resolve(xla, "decode").decode.dtype == "float32" and machine.asked[1:] == [
    ("decode", "xla")
  ]


def test_of_several_processes_the_first_one_counts(machine, monkeypatch):
  monkeypatch.setattr(distributed, "from_first", lambda make: "bfloat16")  # what it says in another process
  assert precision.resolve(Config(), "train").train.dtype == "bfloat16" and not machine.asked


@pytest.mark.parametrize(
  "stored, wanted",
  [
    ({"train": {"dtype": "bfloat16"}, "decode": {"dtype": "float32"}}, "bfloat16"),  # config.json
    ({"train.dtype": "bfloat16", "source": "tiny"}, "bfloat16"),  # beside rows
    ({"train": {"dtype": "auto"}}, "float32"),  # of a mode that does not train
    ({"train": {"dtype": "int8"}}, "float32"),  # auto chooses no weights
    ({"train": {"dtype": ["bfloat16"]}}, "float32"),
    ({"decode": {"dtype": "bfloat16"}}, "float32"),
    (None, "float32"),
  ],
)
def test_what_a_run_had_is_kept(machine, tmp_path, stored, wanted):
  path = tmp_path / "config.json"
  path.write_text("no JSON" if stored is None else json.dumps(stored))
  assert precision.resolve(Config(), "train", path).train.dtype == wanted
  assert precision.resolve(Config(), "train", tmp_path / "none.json").train.dtype == "float32"


def test_without_the_machine_it_is_bfloat16(machine):
  found = precision.on_accelerators(with_changes(Config(), {"train.dtype": "float32"}))
  assert (found.train.dtype, found.decode.dtype, found.preference.dtype) == (
    "float32",
    "bfloat16",
    "bfloat16",
  )
  assert not machine.asked


def test_a_model_and_its_records_name_it(machine):
  config = with_changes(Config(), BASE)
  model = Model(config)
  record = model.generate("Why?", parallel=False).record
  assert (model.dtype, record["dtype"], record["kernels"]) == ("float32", "float32", "xla")
  assert model.model.dtype == jnp.float32
  assert Model(config, dtype="bfloat16").generate("Why?", parallel=False).record["dtype"] == "bfloat16"
  [task] = machine.asked
  machine.change(FAST)
  model = Model(config)
  [record] = [r.record for r in model.generate_batch(["Why?"], parallel=False)]
  assert record["dtype"] == "bfloat16" and record["kernels"] == model.kernels == task[1]
  assert ResponseRecord.from_json(record).to_json() == record


def test_a_file_of_prompts_is_finished_in_the_precision_it_was_begun_in(machine, monkeypatch, tmp_path):
  prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
  prompts.write_text('{"prompt": "Why?"}\n{"prompt": "How?"}\n')
  config = with_changes(Config(), BASE | {"decode.parallel": False, "decode.batch_size": 1})
  generate = Model.generate_batch

  def killed(self, prompts, on_finish, **how):
    generate(self, prompts[:1], on_finish=on_finish, **how)
    raise KeyboardInterrupt

  monkeypatch.setattr(Model, "generate_batch", killed)
  with pytest.raises(KeyboardInterrupt):
    command.decode_file(config, str(prompts), str(output))
  monkeypatch.setattr(Model, "generate_batch", generate)
  partial = tmp_path / "out.jsonl.partial"
  assert json.loads(settings_beside(partial).read_text())["decode.dtype"] == "float32"
  machine.change(FAST)
  with pytest.raises(ValueError, match="was made with decode.dtype='float32', not 'bfloat16': delete"):
    command.decode_file(with_changes(config, {"decode.dtype": "bfloat16"}), str(prompts), str(output))
  command.decode_file(config, str(prompts), str(output))
  assert [json.loads(line)["dtype"] for line in output.read_text().splitlines()] == ["float32"] * 2
  command.decode_file(config, str(prompts), str(output))  # a new run
  assert [json.loads(line)["dtype"] for line in output.read_text().splitlines()] == ["bfloat16"] * 2


def test_a_training_run_names_it_and_keeps_it(machine, tmp_path, capsys):
  train = {
    "data": "data/seed.jsonl",
    "length": 1024,
    "batch_size": 1,
    "steps": 1,
    "lora_rank": 2,
    "min_speedup": 2.2,
  }
  config = with_changes(Config(), {"model.source": "tiny", **{f"train.{k}": v for k, v in train.items()}})
  sft.train(config, tmp_path / "run")
  said = lambda: json.loads((tmp_path / "run" / "config.json").read_text())
  header = lambda: json.loads(read_metadata(tmp_path / "run" / "adapter.safetensors")["train"])["dtype"]
  assert said()["train"]["dtype"] == header() == "float32" and said()["decode"]["dtype"] == "auto"
  machine.change(FAST)
  sft.train(with_changes(config, {"train.steps": 2}), tmp_path / "run")
  assert said()["train"]["dtype"] == header() == "float32" and "train.dtype" not in capsys.readouterr().out
  sft.train(with_changes(config, {"train.steps": 3, "train.dtype": "bfloat16"}), tmp_path / "run")
  assert "train.dtype float32 -> bfloat16" in capsys.readouterr().out
  assert said()["train"]["dtype"] == header() == "bfloat16"


def test_an_evaluation_names_it_and_keeps_it(machine, tmp_path):
  prompts = tmp_path / "prompts.jsonl"
  prompts.write_text('{"id": "a", "prompt": "Why?"}\n{"id": "b", "prompt": "How?"}\n')
  changes = {
    "prompts": str(prompts),
    "systems": "base",
    "baseline": "base",
    "judges": "",
    "timed": 1,
    "batch_size": 2,
  }
  config = with_changes(Config(), BASE | {f"eval.{k}": v for k, v in changes.items()})
  assert evaluate(config, tmp_path / "run")["dtype"] == "float32"
  beside = lambda folder: json.loads((tmp_path / "run" / folder / "base.settings.json").read_text())[
    "decode.dtype"
  ]
  assert (
    json.loads((tmp_path / "run" / "config.json").read_text())["decode"]["dtype"]
    == beside("timed")
    == "float32"
  )
  assert beside("responses") == "float32"  # eval.dtype
  machine.change(FAST)
  assert evaluate(with_changes(config, {"eval.timed": 2}), tmp_path / "run")["dtype"] == "float32"
  (tmp_path / "run" / "config.json").unlink()
  with pytest.raises(ValueError, match="was made with decode.dtype='float32', not 'bfloat16'"):
    evaluate(config, tmp_path / "run")


def test_rounds_of_stage_two_name_it_and_keep_it(machine, monkeypatch, tmp_path):
  model, adapter = load_checkpoint(TINY).config, tmp_path / "adapter.safetensors"
  tags = np.zeros((6, model.d_model), np.float32)
  write_adapter(adapter, Adapter(1.0, {}, tags, None if model.tie_embeddings else tags.T), model)
  (tmp_path / "prompts.jsonl").write_text('{"id": "a", "prompt": "Why?"}\n')
  config = with_changes(Config(), BASE | {
    "model.adapter": str(adapter), "preference.prompts": str(tmp_path / "prompts.jsonl"),
    "preference.stages": "sample,train",
  })  # fmt: skip
  jobs = []
  monkeypatch.setattr(rounds, "_rounds", jobs.append)
  for seconds in (SLOW, FAST):
    machine.change(seconds)
    rounds.optimise(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["preference"]["dtype"] == "float32"
    settings = jobs[-1].settings(jobs[-1].policies[0], 1)
    assert settings["preference.dtype"] == "float32" and settings["preference.sample_dtype"] == "float32"
  assert machine.asked == [("train", "xla")]
