"""Weights are read back exactly from safetensors; broken files are refused in one line. GGUF: `test_gguf`."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.folders import BYTE_TOKENS, write_gguf
from safetensors.numpy import load_file, save_file

from pasta_jax.model.config import ModelConfig
from pasta_jax.weights.arrays import Arena, WeightsError, param_shapes
from pasta_jax.weights.checkpoint import load_checkpoint

# All widths differ, so that a transposed or swapped tensor cannot pass.
CONFIG = ModelConfig(
  vocab_size=len(BYTE_TOKENS), d_model=24, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=8, d_ff=40,
  rope_theta=50_000.0, norm_eps=1e-5, tie_embeddings=True, max_position=64,
)  # fmt: skip


def random_params(config: ModelConfig) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {name: rng.normal(size=shape).astype(np.float32) for name, shape in param_shapes(config).items()}


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]):
  assert actual.keys() == expected.keys()
  for name, value in expected.items():
    assert actual[name].dtype == np.float32 and actual[name].flags.c_contiguous and actual[name].flags.owndata
    np.testing.assert_array_equal(actual[name], value, err_msg=name)


@pytest.mark.parametrize("source", ["no-such-model", "/nowhere/model.gguf"])
def test_unknown_source(source: str):
  with pytest.raises(WeightsError, match="neither a GGUF file"):
    load_checkpoint(source)


def test_libraries_of_one_format_are_imported_for_that_format_only():
  """A decode imports neither the checkpoints of training nor the readers of formats that it does not load."""
  code = (
    "import sys; from pasta_jax.weights import build, checkpoint; checkpoint.load_checkpoint('tiny');"
    "print(*{'orbax', 'gguf', 'sentencepiece', 'pyarrow'} & set(sys.modules))"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.strip() == ""


# --- Hugging Face folders ---


@pytest.fixture(scope="module")
def hf_model():
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  return transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=len(BYTE_TOKENS), hidden_size=24, intermediate_size=40, num_hidden_layers=2,
      num_attention_heads=6, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5,
      tie_word_embeddings=False, max_position_embeddings=64,
      rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
    )
  )  # fmt: skip


@pytest.fixture
def hf_folder(hf_model, tmp_path: Path) -> Path:
  """A complete folder, with the tokenizer of the GGUF tests."""
  folder = tmp_path / "tiny-hf"
  hf_model.save_pretrained(folder)
  tokenizer = load_checkpoint(write_gguf(tmp_path / "tiny.gguf", CONFIG, random_params(CONFIG))).tokenizer
  tokenizer._backend.save(str(folder / "tokenizer.json"))
  template = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.content | trim }}{% endfor %}"
  config = {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|endoftext|>", "chat_template": template}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder


def hf_expected(hf_model) -> dict[str, np.ndarray]:
  state = {name: value.numpy() for name, value in hf_model.state_dict().items()}
  words = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "layers": "model.layers",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attn": "self_attn",
  }
  words |= {letter: f"{letter}_proj" for letter in ("q", "k", "v", "o", "gate", "up", "down")}
  expected = {}
  for name in param_shapes(CONFIG) | {"head.kernel": ()}:
    *path, _ = name.split(".")
    value = state[".".join(words.get(part, part) for part in path) + ".weight"]
    expected[name] = value.T if name.endswith("kernel") else value
  return expected


def test_hf_folder_is_read_back_equal(hf_folder: Path, hf_model):
  loaded = load_checkpoint(hf_folder)
  assert loaded.name == "tiny-hf"
  assert loaded.config == ModelConfig(**(vars(CONFIG) | {"tie_embeddings": False}))
  assert_same(loaded.params, hf_expected(hf_model))


def test_hf_shards_in_bfloat16(hf_folder: Path, hf_model):
  torch = pytest.importorskip("torch")
  (hf_folder / "model.safetensors").unlink()
  half = type(hf_model)(hf_model.config)
  half.load_state_dict(hf_model.state_dict())
  half.to(torch.bfloat16).save_pretrained(hf_folder, max_shard_size="8KB")
  assert len(list(hf_folder.glob("*.safetensors"))) > 2
  expected = {name: torch.tensor(v).bfloat16().float().numpy() for name, v in hf_expected(hf_model).items()}
  assert_same(load_checkpoint(hf_folder).params, expected)
  next(hf_folder.glob("model-00002*")).unlink()
  with pytest.raises(WeightsError, match="model-00002"):
    load_checkpoint(hf_folder)


def test_hf_chat_template_that_trims(hf_folder: Path):
  """The markers in texts of control tokens must not keep a template from trimming; trimmed text is not
  encoded."""
  tokenizer = load_checkpoint(hf_folder).tokenizer
  ids = tokenizer.chat_prompt([{"role": "user", "content": " he<|im_end|> \n"}])
  assert ids == [0, 1, *tokenizer.encode("he<|im_end|>")]


def edit_json(path: Path, **changes: object):
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, **changes: np.ndarray | None):
  tensors = load_file(path) | changes
  save_file({name: value for name, value in tensors.items() if value is not None}, path)


NORM = "model.layers.1.input_layernorm.weight"
BREAKAGES = {
  "architecture 'mamba' is not supported": lambda d: edit_json(d / "config.json", model_type="mamba"),
  "attention_bias is not supported": lambda d: edit_json(d / "config.json", attention_bias=True),
  "factor is missing": lambda d: edit_json(d / "config.json", rope_parameters={"rope_type": "llama3"}),
  "hidden_size = 'wide' is not a count": lambda d: edit_json(d / "config.json", hidden_size="wide"),
  r"embed_tokens.weight has shape \[261, 24\], not \[10, 24\]": lambda d: edit_json(
    d / "config.json", vocab_size=10
  ),
  "config.json: not JSON": lambda d: (d / "config.json").write_text("{"),
  "config.json: cannot be read": lambda d: (d / "config.json").unlink(),
  "tokenizer.json: cannot be read": lambda d: (d / "tokenizer.json").unlink(),
  "tokenizer_config.json: cannot be read": lambda d: (d / "tokenizer_config.json").unlink(),
  "not a BPE tokenizer, byte-level or": lambda d: edit_json(
    d / "tokenizer.json", pre_tokenizer={"type": "Whitespace"}
  ),
  "eos_token '</s>' is not": lambda d: edit_json(d / "tokenizer_config.json", eos_token="</s>"),
  "no \\*.safetensors": lambda d: (d / "model.safetensors").unlink(),
  "truncated": lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-9]),
  f"tensor {NORM} is missing": lambda d: edit_tensors(d / "model.safetensors", **{NORM: None}),
  f"tensor {NORM} has shape": lambda d: edit_tensors(d / "model.safetensors", **{NORM: np.ones(23, "f")}),
  "tensor spare is not part": lambda d: edit_tensors(d / "model.safetensors", spare=np.ones(3, "f")),
}


@pytest.mark.parametrize("message", BREAKAGES)
def test_hf_folder_that_is_broken_is_refused(hf_folder: Path, message: str):
  BREAKAGES[message](hf_folder)
  with pytest.raises(WeightsError, match=message) as caught:
    load_checkpoint(hf_folder)
  assert str(hf_folder) in str(caught.value) and "\n" not in str(caught.value)


# --- memory ---


@pytest.mark.parametrize(
  "form, dtype",
  [("plain", "bfloat16"), ("stacked", "bfloat16"), ("decoding", "bfloat16"), ("decoding", "int8")],
)
def test_a_model_is_in_memory_once_while_it_is_loaded(smollm2_checkpoint, form: str, dtype: str):
  """The default model: half of its float32 values would already be too much. With 8 bits one matrix at a time is in
  float32 too."""
  root = Path(__file__).parents[2]
  adapter = (
    [str(root / "pasta_jax" / "adapters" / "smollm2_135m_pasta_paper.safetensors")]
    if form == "decoding"
    else []
  )
  done = subprocess.run(
    [sys.executable, "tests/peak_memory.py", smollm2_checkpoint.name, dtype, form, *adapter],
    cwd=root,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert 0.5 < float(done.stdout.split("at most ")[1].split()[0]) < 1.3, done.stdout


def test_arrays_of_an_arena_share_blocks_and_no_bytes(monkeypatch):
  """Odd sizes, one larger than a block, and more than one block; each where XLA takes it without a copy."""
  monkeypatch.setattr(Arena, "BLOCK", 4096)
  arena, shapes = Arena(), [(3, 5), (700,), (1,), (5000,), (40, 11), (0,), (999,)]
  arrays = [arena.empty(shape, dtype) for shape in shapes for dtype in (np.float32, np.int8)]
  for i, array in enumerate(arrays):
    array[...] = i
  for i, array in enumerate(arrays):
    assert array.ctypes.data % 64 == 0 and np.all(array == i)
  assert [a.shape for a in arrays[::2]] == shapes and arrays[0].base is arrays[1].base
