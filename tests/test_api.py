"""The public API as a user calls it, the examples and the notebook, and what decoding imports; on a tiny
model."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pasta_jax
from pasta_jax.config import Config, with_changes
from pasta_jax.decode.generator import DecodeError, Model, decode_settings
from pasta_jax.decode.scheduler import DecodeRequest
from pasta_jax.decode.settings import SamplingConfig
from pasta_jax.lang.forms import Forms
from pasta_jax.weights.adapter import Adapter, read_adapter, write_adapter
from pasta_jax.weights.checkpoint import TINY, load_checkpoint

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SETTINGS = {
  "max_new_tokens": 48,
  "max_branches": 2,
  "kv_capacity": 512,
  "dtype": "float32",
  "promise_bias": 6.0,
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
  """An adapter of the tiny model with random rows for the tags, which are as likely as other tokens."""
  config = load_checkpoint(TINY).config
  tags = np.random.default_rng(1).normal(size=(6, config.d_model)).astype(np.float32) * config.d_model**-0.5
  path = tmp_path_factory.mktemp("api") / "adapter.safetensors"
  write_adapter(path, Adapter(1.0, {}, tags, None if config.tie_embeddings else tags.T), config)
  return path


@pytest.fixture(scope="module")
def model(adapter) -> Model:
  return pasta_jax.load("tiny", adapter, temperature=1.0, seed=1, **SETTINGS)


def test_a_response_has_text_trace_record_and_timeline(model, tmp_path):
  seen = []
  answer = model.generate("Why?", on_step=seen.append, every=4)
  assert answer.text == answer.trace.text == answer.record["text"]
  assert answer.trace.cost.n_promises > 0 and answer.seconds > 0
  assert answer.record["total_tokens"] == answer.trace.cost.total_tokens
  assert len(seen) > 2 and seen[-1].text == answer.text
  json.dumps(answer.record)
  for name, begin in (("a.html", "<!DOCTYPE html>"), ("a.svg", "<svg")):
    answer.timeline(tmp_path / name)
    assert (tmp_path / name).read_text("utf-8").startswith(begin)
  answer.timeline(str(tmp_path / "a.svg"))  # a string will do, and an old file is replaced
  with pytest.raises(ValueError, match="must end in .html or .svg"):
    answer.timeline(tmp_path / "a.png")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "a.svg"]


def test_a_flag_counts_before_the_adapters_own_settings_and_these_before_the_defaults(adapter, tmp_path):
  """Identity has the values that decoding takes, so older runs and either way of giving a value agree."""
  config = load_checkpoint(TINY).config
  own = read_adapter(adapter, config)._replace(metadata={"decode": '{"no_repeat": 3, "promise_bias": 2}'})
  write_adapter(tmp_path / "own.safetensors", own, config)

  def taken(path: Path, **settings) -> tuple[dict, tuple]:
    model = pasta_jax.load("tiny", path, max_new_tokens=8, kv_capacity=256, **settings)
    changes = {"model.source": "tiny", **{f"decode.{k}": v for k, v in settings.items()}}
    s, features = model.sampling, model.interpreter(True).features
    return (
      decode_settings(with_changes(Config(), changes), str(path), parallel=True),
      (s.repetition_penalty, features.no_repeat, s.promise_bias),
    )

  for path, settings, wanted in (
    (adapter, {}, (1.1, 16, 1.5)),
    (tmp_path / "own.safetensors", {}, (1.1, 3, 2.0)),
    (tmp_path / "own.safetensors", {"no_repeat": 0, "repetition_penalty": 1.0}, (1.0, 0, 2.0)),
  ):
    stored, values = taken(path, **settings)
    assert values == wanted
    assert tuple(stored[f"decode.{n}"] for n in ("repetition_penalty", "no_repeat", "promise_bias")) == wanted
    names = ("repetition_penalty", "no_repeat", "promise_bias")
    assert taken(path, **dict(zip(names, wanted)))[0] == stored


def test_a_batch_gives_what_single_prompts_give(model):
  prompts = ["Why?", "Plan a trip.", [{"role": "user", "content": "Name three birds."}]]
  finished = []
  answers = model.generate_batch(prompts, batch_size=2, on_finish=lambda i, r: finished.append((i, r.text)))
  assert [a.text for a in answers] == [model.generate(p).text for p in prompts]
  assert sorted(finished) == [(i, a.text) for i, a in enumerate(answers)]
  greedy = SamplingConfig()
  [one] = model.generate_batch(prompts[:1], sampling=greedy, parallel=False, batch_size=2)
  assert one.text == model.generate(prompts[0], sampling=greedy, parallel=False).text
  assert one.trace.cost.n_promises == 0


def test_a_scheduler_of_the_model_serves_requests(model):
  scheduler = model.scheduler(batch_size=2)
  ids = [scheduler.submit(DecodeRequest(model.encode(p), model.sampling)) for p in ("Why?", "How?")]
  assert scheduler.cancel(ids[1])
  while scheduler.step():
    pass
  assert {id: t.text for id, t in scheduler.results()} == {ids[0]: model.generate("Why?").text}


def test_wrong_arguments_are_one_clear_error(model, adapter, tmp_path):
  with pytest.raises(ValueError, match="max_tokens"):
    pasta_jax.load("tiny", adapter, max_tokens=3)
  with pytest.raises(ValueError, match="decode.temperature must be"):
    pasta_jax.load("tiny", adapter, temperature=-1.0)
  with pytest.raises(ValueError, match="decode.dtype must be"):
    pasta_jax.load("tiny", adapter, dtype="bf16")
  with pytest.raises(ValueError, match="no adapter file"):
    pasta_jax.load("tiny", tmp_path / "none.safetensors")
  with pytest.raises(ValueError, match="neither a GGUF file"):
    pasta_jax.load(tmp_path / "none")
  with pytest.raises(DecodeError, match="no PASTA tags"):
    pasta_jax.load("tiny", **SETTINGS).generate("Why?")  # no adapter of this source is in the package
  with pytest.raises(DecodeError, match="the prompt is empty"):
    model.generate(" ")


def run_python(*arguments: str, timeout: float = 300) -> str:
  done = subprocess.run(
    [sys.executable, *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=timeout,
    stdin=subprocess.DEVNULL,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_importing_the_package_is_light():
  out = run_python("-c", "import pasta_jax, sys; print(pasta_jax.__version__, 'jax' in sys.modules)")
  assert out.split() == [pasta_jax.__version__, "False"]


# The examples.


def run_example(name: str, monkeypatch, capsys, *arguments: str) -> str:
  """What a script prints; run in this process, so that JAX is imported and programs are compiled once."""
  monkeypatch.setattr(sys, "argv", [name, *arguments])
  code = compile((EXAMPLES / name).read_text("utf-8"), name, "exec")
  exec(code, {"__name__": "__main__", "__doc__": "An example."})
  return capsys.readouterr().out


def test_example_generate(adapter, monkeypatch, capsys, tmp_path):
  timeline = tmp_path / "timeline.svg"
  tiny = ["--source=tiny", f"--adapter={adapter}", "--tokens=24", f"--timeline={timeline}"]
  out = run_example("generate.py", monkeypatch, capsys, "Why?", *tiny)
  assert f"timeline: {timeline}" in out and " steps, " in out
  assert timeline.read_text("utf-8").startswith("<svg")


def test_example_batch(adapter, monkeypatch, capsys):
  tiny = ["--source=tiny", f"--adapter={adapter}", "--tokens=24"]
  out = run_example("batch.py", monkeypatch, capsys, "Why?", "How?", "Who?", *tiny)
  for prompt in ("Why?", "How?", "Who?"):
    assert f"# {prompt} (" in out and f"{prompt}: " in out


def test_example_program(monkeypatch, capsys):
  out = run_example("program.py", monkeypatch, capsys)
  assert "33 tokens, 28 steps" in out
  rows = [line.split() for line in out.splitlines()]
  [sync] = [r for r in rows if r and r[0] == "<sync"]
  assert "." not in sync[-1]  # it sees the chunks that it joins


def test_the_notebook(adapter, monkeypatch, tmp_path):
  """Its code cells, run one after the other; nothing of a run was saved in it."""
  notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text("utf-8"))
  assert notebook["nbformat"] == 4
  monkeypatch.setenv("PASTA_SOURCE", "tiny")
  monkeypatch.setenv("PASTA_ADAPTER", str(adapter))
  monkeypatch.chdir(tmp_path)
  scope: dict = {}
  cells = [c for c in notebook["cells"] if c["cell_type"] == "code"]
  for cell in cells:
    assert cell["outputs"] == [] and cell["execution_count"] is None
    exec("".join(cell["source"]), scope)
  assert len(cells) >= 3 and (tmp_path / "answer.html").exists()


@pytest.mark.parametrize("name", ["generate.py", "batch.py", "program.py"])
def test_examples_are_short(name):
  assert len((EXAMPLES / name).read_text("utf-8").splitlines()) < 40


# What decoding imports.

NOT_FOR_DECODING = [  # optax is missing here: flax.nnx imports it
  "orbax",
  "tensorboardX",
  "grain",
  "tensorflow_datasets",
  "tensorflow",
  "matplotlib",
  "pyarrow",
  "scipy.optimize",  # numba imports scipy itself
  "gguf",
  "sentencepiece",
  "pasta_jax.train",
  "pasta_jax.data",
  "pasta_jax.evaluate",
  "pasta_jax.preference",
]


def test_decoding_imports_nothing_of_training(adapter):
  script = f"""
import sys
sys.argv = ["main.py", "--config=configs/tiny.py", "--config.model.adapter={adapter}", "--prompt=Why?",
            "--config.decode.max_new_tokens=4", "--config.decode.kv_capacity=256"]
import main
from absl import app
try:
  app.run(main.main, flags_parser=main.parse)
except SystemExit as left:
  assert not left.code, left.code
print("loaded:", *(name for name in {NOT_FOR_DECODING} if name in sys.modules))
"""
  assert run_python("-c", script).splitlines()[-1] == "loaded:"


def test_the_released_adapter_that_reads_along_speaks_its_form():
  """Its rows, and its header, are found before a vocabulary is built: heads, lengths as tokens, chunks read along."""
  model = pasta_jax.load(adapter="pasta", dtype="float32", max_new_tokens=140)
  assert model.forms == Forms(visibility="live", promise="head", number="token")
  trace = model.generate("What are some good ways to save energy at home?").trace
  chunks = trace.threads[1:]
  assert len(chunks) >= 2 and trace.ill_formed == 0 and trace.form == model.forms
  last = [trace.threads[c.parent].tokens[c.fork_index] for c in chunks]  # of each promise: all of it
  assert set(last) <= set(model.vocabulary.table.lengths.tolist())
  assert all(c.topic and c.declared % 10 == 0 for c in chunks)
