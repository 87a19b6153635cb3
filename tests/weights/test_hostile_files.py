"""Files of models that claim, name or contain what no model has: one line that names the file, at once."""

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from fuzz import weights as valid
from helpers.folders import write_gguf

from pasta_jax.model.config import ModelConfig, RopeScaling
from pasta_jax.weights import chat
from pasta_jax.weights.adapter import AdapterError, read_adapter, read_metadata, weights_of, write_adapter
from pasta_jax.weights.arrays import WeightsError
from pasta_jax.weights.checkpoint import load_checkpoint
from pasta_jax.weights.model_files import inside, save_tensors
from pasta_jax.weights.run_folder import load_run
from pasta_jax.weights.tokenizer import Tokenizer

SMALL = valid._small()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
  """The valid input of a kind of `tests.fuzz.weights`, made once."""
  places: dict[str, Path] = {}

  def make(name: str) -> Path:
    if name not in places:
      places[name] = tmp_path_factory.mktemp(name)
      valid.KINDS[name].make(places[name])
    return places[name]

  return make


@pytest.fixture
def copy(made, tmp_path: Path) -> Callable[[str], Path]:
  """A copy of a valid input; `model` in it, if it has one."""

  def copied(name: str) -> Path:
    shutil.copytree(made(name), tmp_path / name)
    return tmp_path / name / "model" if name not in ("adapter", "checkpoint") else tmp_path / name

  return copied


def edit(path: Path, **changes: object) -> None:
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(path: Path, message: str, read: Callable[[Path], object] = load_checkpoint) -> None:
  start = time.monotonic()
  with pytest.raises(ValueError, match=message) as caught:
    read(path)
  assert str(path.parent) in str(caught.value) and "\n" not in str(caught.value)
  assert time.monotonic() - start < 5


# --- config.json ---


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(num_hidden_layers=10**9), "num_hidden_layers = 1000000000 is not a count"),
    (dict(num_hidden_layers=9000), "tensor model.layers.2.* is missing"),
    (dict(vocab_size=3 * 10**8), r"embed_tokens.weight has shape \[520, 8\]"),
    (dict(hidden_size=10**400), "hidden_size = 1000.* is not a count"),
    (dict(head_dim=True), "head_dim = True is not a count"),
    (dict(rms_norm_eps=float("nan")), "rms_norm_eps must be a valid number, not None"),
    (dict(rms_norm_eps=10**400), "rms_norm_eps must be a valid number"),
    (dict(rms_norm_eps=-1.0), "norm_eps = -1.0 is not a number from 0"),
    (dict(rope_theta=0), "rope_theta = 0.0 is not a number from 1"),
    (dict(rope_theta="1e4"), "rope_theta must be a valid number, not '1e4'"),
    (dict(rope_scaling={"type": "linear", "factor": 0}), "RoPE's factor = 0.0 is not"),
    (dict(rope_scaling={"type": "linear", "factor": [2]}), "rope_scaling.factor must be a valid number"),
    (dict(model_type="gemma2", layer_types=[["x"]]), "layer_types.0 must be a valid string"),
    (dict(model_type="gemma2", query_pre_attn_scalar=0), "query_pre_attn_scalar must be greater than 0"),
    (dict(model_type="mistral", sliding_window=2**40), "window = 1099511627776 is not a whole number"),
  ],
)
def test_numbers_that_no_model_has(changes: dict, message: str, copy):
  folder = copy("config")
  defaults = dict(hidden_act="gelu_pytorch_tanh") if changes.get("model_type") == "gemma2" else {}
  edit(folder / "config.json", **defaults, **changes)
  refused(folder, message)


@pytest.mark.parametrize("name", ["rope_theta", "norm_eps", "attention_softcap", "query_scale"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_an_architecture_has_finite_numbers(name: str, value: float):
  with pytest.raises(ValueError, match=f"{name} = "):
    ModelConfig(9, 8, 1, 2, 1, 4, 8, **{name: value})
  with pytest.raises(ValueError, match="RoPE's factor = "):
    RopeScaling("linear", value)


def test_json_that_is_too_deep(copy):
  for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
    folder = copy("config").parent
    (folder / "model" / name).write_text('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}")
    refused(folder / "model", f"{name}: nested too deeply")
    folder.rename(folder.with_name(f"{name}.done"))


# --- names and kinds of files ---


@pytest.mark.parametrize("name", ["../x.safetensors", "/dev/zero", "a/../../x", "", "a\0b", "//x"])
def test_a_name_stays_in_its_folder(name: str, copy, tmp_path: Path):
  with pytest.raises(ValueError, match="is not the name of a file in the same folder"):
    inside(tmp_path, name)
  folder = copy("index")
  index = folder / "model.safetensors.index.json"
  where = json.loads(index.read_text())["weight_map"]
  edit(index, weight_map=where | {min(where): name})
  refused(folder, "index.json: .* is not the name of a file")
  path = copy("adapter") / "adapter.safetensors"
  tensors, header = safetensors.numpy.load_file(path), read_metadata(path)
  safetensors.numpy.save_file(tensors, path, header | {"base": name})
  refused(path, "base .* is not the name of a file", weights_of)


@pytest.mark.parametrize(
  "name", ["model-0.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_regular_file_is_not_opened(name: str, kind: str, copy):
  folder = copy("index")
  (folder / name).unlink()
  os.mkfifo(folder / name) if kind == "pipe" else (folder / name).mkdir()
  refused(folder, f"{name}: cannot be read")


def test_a_pipe_is_no_gguf_file_and_no_adapter(tmp_path: Path):
  os.mkfifo(tmp_path / "model.gguf")
  refused(tmp_path / "model.gguf", "model.gguf|neither a GGUF file")
  refused(tmp_path / "model.gguf", "no adapter file", read_metadata)


def test_links_as_in_hugging_faces_cache(copy, tmp_path: Path):
  folder = copy("index")
  (tmp_path / "blobs").mkdir()
  for file in list(folder.iterdir()):
    file.rename(tmp_path / "blobs" / file.name)
    file.symlink_to(Path("../../blobs") / file.name)
  valid.load(folder)


@pytest.mark.parametrize("name", ["a[b]", "a,b", "a*b?", "$x", "[red]"])
def test_any_name_of_a_folder(name: str, copy):
  for kind in ("index", "config"):
    folder = copy(kind)
    valid.load(folder.rename(folder.with_name(name)))
  path = folder.with_name("gguf") / name
  path.mkdir(parents=True)
  valid.gguf(pieces=False)(path)
  valid.load(path)


# --- GGUF ---


def test_gguf_arrays_that_are_too_deep(tmp_path: Path):
  value = struct.pack("<IQ", 9, 1) * 20_000
  key = struct.pack("<Q", 1) + b"x" + struct.pack("<I", 9)
  (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + value)
  refused(tmp_path / "x.gguf", "arrays nested too deeply")


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("llama.block_count", 10**9, r"n_layers|blk.999999999.attn_norm.weight is missing"),
    ("llama.rope.freq_base", float("nan"), "llama: rope.freq_base must be a finite number"),
    (
      "llama.attention.layer_norm_rms_epsilon",
      float("inf"),
      "layer_norm_rms_epsilon must be a finite number",
    ),
    ("llama.rope.freq_base", "x", "llama: rope.freq_base must be a valid number"),
    ("general.alignment", 0, "an alignment of 0"),
    ("tokenizer.ggml.eos_token_id", "x", "eos_token_id must be a valid integer"),
    ("tokenizer.ggml.eos_token_id", 3 * 10**8, "300000000, is not in the vocabulary"),
    ("tokenizer.ggml.scores", [float("nan")], "scores.0 must be a finite number"),
    ("tokenizer.chat_template", ["x"], "chat_template must be a valid string"),
  ],
)
def test_gguf_values_that_no_model_has(field: str, value, message: str, tmp_path: Path):
  config = valid._small(vocab_size=len(valid.PIECE_TOKENS))
  kind = {int: "add_uint32", float: "add_float32", str: "add_string", list: "add_array"}[type(value)]

  def describe(writer):
    writer.kv_data[0].pop(field, None)
    getattr(writer, kind)(field, value)

  path = write_gguf(tmp_path / "x.gguf", config, valid._random(config), pieces=True, describe=describe)
  refused(path, message)


# --- adapters ---


@pytest.mark.parametrize(
  ("header", "message"),
  [
    (dict(scale="nan"), "scale nan is not a usable number"),
    (dict(scale="1e999"), "scale inf is not a usable number"),
    (dict(scale="1e38"), "scale 1e\\+38 is not a usable number"),
    (dict(positions="null"), "header is damaged: positions: not a rule"),
    (dict(positions='{"strategy": "x", "fixed": 60}'), "positions: position strategy 'x' is none of"),
    (dict(positions='{"strategy": "fixed", "fixed": -1}'), "positions: not a rule: fixed must be greater"),
    (dict(positions="[" * 100_000), "positions: nested too deeply"),
    (dict(speeds="5"), "speeds: not a list of speeds"),
    (dict(decode="[1]"), "header is damaged: decode: not settings"),
    (dict(decode='{"no_repeat": true}'), "decode: not settings: no_repeat"),
    (dict(decode='{"no_repeat": 1.5}'), "decode: decode.no_repeat must be an integer, not 1.5"),
    (dict(decode='{"repetition_penalty": 0.5}'), "decode: decode.repetition_penalty must be 1 or more"),
    (dict(decode='{"promise_bias": NaN}'), "decode: "),
    (dict(decode='{"temperature": 1}'), "decode: 'temperature' is none of repetition_penalty"),
    (dict(model="[1]"), "header has no model or no scale"),
    (dict(model='{"tags": 3}'), "header has no model or no scale"),
  ],
)
def test_an_adapters_header(header: dict, message: str, copy):
  path = copy("adapter") / "adapter.safetensors"
  safetensors.numpy.save_file(safetensors.numpy.load_file(path), path, read_metadata(path) | header)
  refused(path, message, lambda path: read_adapter(path, SMALL))


def test_an_adapters_numbers(copy):
  path = copy("adapter") / "adapter.safetensors"
  tensors, header = safetensors.numpy.load_file(path), read_metadata(path)
  name = "layers.0.attn.q.lora_a"
  for value in (np.nan, np.inf):
    safetensors.numpy.save_file(tensors | {name: np.full((8, 2), value, "f")}, path, header)
    refused(path, f"{name} has numbers that are not finite", lambda path: read_adapter(path, SMALL))
  eighths = tensors[name].astype(ml_dtypes.float8_e4m3fn)
  save_tensors(path, tensors | {name: eighths}, header)
  refused(path, f"{name} has type F8_E4M3", lambda path: read_adapter(path, SMALL))
  safetensors.numpy.save_file(tensors | {"embed.tags": np.ones((7, 8), "f")}, path, header)
  with pytest.raises(AdapterError, match=r"embed.tags has shape \(7, 8\), not \(6, 8\)"):
    read_adapter(path, SMALL)


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  def full(*_):
    raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

  monkeypatch.setattr("pasta_jax.weights.model_files.save_file", full)
  with pytest.raises(OSError, match="No space left on device") as caught:
    write_adapter(tmp_path / "a.safetensors", valid.Adapter(1.0, {}, np.ones((6, 8), "f"), None), SMALL)
  assert "a.safetensors" in str(caught.value) and not list(tmp_path.iterdir())


# --- tokenizers ---


def test_ids_that_leave_gaps(copy):
  folder = copy("tokenizer")
  parts = json.loads((folder / "tokenizer.json").read_text())
  parts["model"]["vocab"]["far"] = 3 * 10**8
  edit(folder / "tokenizer.json", **parts)
  refused(folder, "tokenizer.json: 300000001 tokens, but only 520 embeddings")
  refused(folder, "tokenizer.json: 513 tokens have ids up to 300000000", Tokenizer.from_folder)


@pytest.mark.parametrize(
  "part",
  [
    dict(
      pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, valid.BYTE_LEVEL]}
    ),
    dict(model={"end_of_word_suffix": "</w>"}),
  ],
)
def test_words_that_lose_characters(part: dict, copy):
  folder = copy("tokenizer")
  parts = json.loads((folder / "tokenizer.json").read_text())
  edit(folder / "tokenizer.json", **{k: {**parts[k], **v} if k == "model" else v for k, v in part.items()})
  refused(folder, "tokenizer.json: the text .* after it was encoded")


def test_a_piece_that_is_too_long(copy):
  from sentencepiece import sentencepiece_model_pb2

  folder = copy("pieces")
  model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # generated code
  model.ParseFromString((folder / "tokenizer.model").read_bytes())
  model.pieces[-1].piece = "x" * 200_000
  (folder / "tokenizer.model").write_bytes(model.SerializeToString())
  refused(folder, "tokenizer.model: a piece of 200000 characters")


@pytest.mark.parametrize(
  ("index", "text", "message"),
  [
    ("-5", "<x>", "an added token has the id -5"),
    ("abc", "<x>", "added_tokens_decoder has an id that is not a number"),
    ("5.5", "<x>", "an id that is not a number"),
    ("270", "<x>", "the added token '<x>' has the id of"),
    ("284", [1], "added_tokens_decoder: .*content must be a valid string"),
  ],
)
def test_added_tokens_overwrite_no_others(index: str, text, message: str, copy):
  folder = copy("pieces")
  edit(folder / "tokenizer_config.json", added_tokens_decoder={index: {"content": text}})
  refused(folder, message)


@pytest.mark.parametrize("part", ["whole", "text_config"])
@pytest.mark.parametrize("generation", [None, {}, {"eos_token_id": None}, {"eos_token_id": 1}])
def test_ends_of_a_text_in_config_json(part: str, generation: dict | None, copy):
  folder = copy("tokenizer")
  (folder / "generation_config.json").unlink()
  if generation is not None:
    (folder / "generation_config.json").write_text(json.dumps(generation))
  ends = {"eos_token_id": [0, 2]}
  edit(folder / "config.json", **(ends if part == "whole" else {"text_config": ends}))
  found = Tokenizer.from_folder(folder).end_ids
  assert found == ((1, 2) if (generation or {}).get("eos_token_id") else (0, 2))
  edit(folder / "config.json", eos_token_id=3)
  assert 3 in Tokenizer.from_folder(folder).end_ids or generation == {"eos_token_id": 1}


# --- templates ---

_DOUBLED = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
TEMPLATES = {
  "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "too many steps",
  "{{ 'x' * 10 ** 9 }}": "too much text",
  "{{ 9 ** 999999 }}": "a power is too large",
  "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}": "product",
  _DOUBLED + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}": "too much text",
  _DOUBLED + "{% set ns.x = ns.x + ns.x %}{% endfor %}": "too much text",
  _DOUBLED + "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}": "too much text",
  "{{ 'x'|center(10 ** 9) }}": "too much text",
  "{{ 'x'.ljust(10 ** 9) }}": "too much text",
  "{{ '{:>1000000000}'.format(1) }}": "too much text",
  "{{ '{:>{}}'.format(1, 10 ** 9) }}": "too much text",
  "{{ '%1000000000d' % 1 }}": "too much text",
  "{{ '%*d' % (10 ** 9, 1) }}": "too much text",
  "{% set a = 'a' * 100000 %}{{ a.replace('a', a) }}": "too much text",
  "{% set a = 'a' * 100000 %}{{ a|replace('a', a) }}": "too much text",
  "{{ messages|tojson(indent=10 ** 9) }}": "too much text",
  "{% set b = 'ab' * 1000000 %}{% for i in range(99999) %}{% if 'z' in b %}{% endif %}{% endfor %}": "too many",
  "{% for i in range(99999) %}{% set x = range(99999)|select('odd')|list %}{% endfor %}": "too many steps",
  "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
  "{{ " + "(" * 3000 + ")" * 3000 + " }}": "recursion",
  "{{ 'x' }}" * 30_000: "270000 characters, more than",
}


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
def test_templates_that_do_too_much(template: str):
  start = time.monotonic()
  with pytest.raises(ValueError, match=f"^chat template: .*{TEMPLATES[template]}") as caught:
    chat.render(template, [{"role": "user", "content": "hello"}], {})
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 and time.monotonic() - start < 8


def test_a_long_conversation_is_within_the_limits():
  turn = "{% set ns.text = ns.text ~ m.role ~ '\n' ~ m.content|trim %}"
  template = "{% set ns = namespace(text='') %}{% for m in messages %}" + turn + "{% endfor %}{{ ns.text }}"
  messages = [{"role": ("user", "assistant")[i % 2], "content": f"{i} " * 200} for i in range(500)]
  assert len(chat.render(template, messages, {})) > 300_000


# --- training runs ---


def test_a_damaged_checkpoint_falls_back_to_the_one_before(copy, capsys):
  run = copy("checkpoint") / "run"
  newest = run / "checkpoints" / "2"
  shutil.copytree(run / "checkpoints" / "1", newest)
  expected = load_checkpoint(run, progress=False).params["layers.0.attn.q.kernel"]
  assert not capsys.readouterr().err
  for file in (newest / "state").rglob("*"):
    if file.is_file():
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  np.testing.assert_array_equal(load_checkpoint(run).params["layers.0.attn.q.kernel"], expected)
  printed = capsys.readouterr().err.strip()
  assert (
    printed.count("\n") == 0 and f"{newest}: cannot be read" in printed and "1 is used instead" in printed
  )
  shutil.rmtree(run / "checkpoints" / "1")
  with pytest.raises(WeightsError, match=f"{newest}: cannot be read"):
    load_run(run, load_checkpoint)
