"""Adapters with int8 factors: what is lost, what stays, and what is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_model import logits, rewrite

from pasta_jax.model.lora import Adapter
from pasta_jax.weights import build
from pasta_jax.weights.adapter import AdapterError, load_adapter, read_adapter, read_metadata, write_adapter
from pasta_jax.weights.arrays import param_shapes
from pasta_jax.weights.checkpoint import TINY, load_checkpoint
from pasta_jax.weights.export import export
from pasta_jax.weights.shrink import shrink

NAME = "layers.0.attn.q"
METADATA = {"speeds": "[0, 1]", "decode": '{"no_repeat":3}', "note": "é"}
CHECKPOINT = load_checkpoint(TINY)
CONFIG = CHECKPOINT.config


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
  """An adapter of the tiny model in bfloat16, and converted. Of its four rank components, one is zero; the others
  matter equally, though the numbers in them differ by a factor of 1000: one scale for a factor would lose two."""
  rng, size = np.random.default_rng(0), np.array([1, 0.03, 0.001], "f")

  def draw(n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.zeros((n_in, 4), "f"), np.zeros((4, n_out), "f")
    a[:, :3] = rng.normal(size=(n_in, 3)) * n_in**-0.5 * size
    b[:3] = rng.normal(size=(3, n_out)) / size[:, None]
    return a, b

  kernels = {
    name.removesuffix(".kernel"): shape
    for name, shape in param_shapes(CONFIG).items()
    if name.startswith("layers.") and name.endswith(".kernel")
  }
  tags = rng.normal(size=(6, CONFIG.d_model)) * CONFIG.d_model**-0.5
  adapter = Adapter(0.5, {name: draw(*shape) for name, shape in kernels.items()}, tags, None, METADATA)
  folder = tmp_path_factory.mktemp("adapters")
  write_adapter(folder / "a.safetensors", adapter, CONFIG)
  shrink(folder / "a.safetensors", folder / "new" / "b.safetensors")
  return folder / "a.safetensors", folder / "new" / "b.safetensors"


def test_updates_change_by_less_than_a_hundredth_and_the_rest_not_at_all(files):
  before, after = (read_adapter(path, CONFIG) for path in files)
  assert before.factors.keys() == after.factors.keys() and before.scale == after.scale
  np.testing.assert_array_equal(before.tags, after.tags)
  assert dict(after.metadata) == {**before.metadata, "storage": "int8"}
  assert METADATA.items() <= after.metadata.items()
  for name in before.factors:
    (a, b), (c, d) = before.factors[name], after.factors[name]
    assert 0 < np.linalg.norm(a @ b - c @ d) < 0.01 * np.linalg.norm(a @ b), name


def test_a_file_in_bfloat16_is_as_it_was(files, tmp_path: Path):
  """Also when it is written from an adapter that was read with int8 factors."""
  old, new = files
  again = tmp_path / "again.safetensors"
  write_adapter(again, read_adapter(new, CONFIG), CONFIG)
  for path in (old, again):
    assert "storage" not in read_metadata(path)
    arrays = load_file(path)
    assert {x.dtype for x in arrays.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert not [name for name in arrays if name.endswith(".scale")]
  assert load_file(old).keys() == load_file(again).keys()
  assert read_metadata(old) == read_metadata(again)


def test_the_models_of_both_files_have_nearly_the_same_logits(files):
  tokens = np.random.default_rng(1).integers(0, CONFIG.vocab_size + 6, (1, 48))
  found = []
  for path in files:
    model = build.from_params(CONFIG, CHECKPOINT.params)
    load_adapter(path, model)
    found.append(logits(model, tokens))
  for name in ("q", "k", "v", "o"):  # the updates matter
    getattr(model.layers[0].attn, name).lora_a[...] *= 0
  without = logits(model, tokens)
  difference = np.abs(found[0] - found[1]).mean()
  assert 0 < difference < 0.02 * found[0].std() < 0.1 * np.abs(found[0] - without).mean()


def test_exports_are_those_of_the_adapter(files, tmp_path: Path):
  old, new = files
  for path in files:
    export(tmp_path / path.stem, CHECKPOINT, path, form="peft", dtype="float32")
  before, after = (load_file(tmp_path / p.stem / "adapter_model.safetensors") for p in (old, new))
  assert before.keys() == after.keys()
  for name, x in before.items():
    np.testing.assert_allclose(after[name], x, atol=np.abs(x).max() / 250, err_msg=name)
  export(tmp_path / "merged", CHECKPOINT, new, form="merged", dtype="float32")
  described = json.loads((tmp_path / "merged" / "config.json").read_text())
  assert "int8" not in json.dumps(described)  # the folder's weights are not


def test_the_command_says_sizes_and_error(files, tmp_path: Path):
  old, _ = files
  run = lambda *args: subprocess.run(
    [sys.executable, "-m", "pasta_jax.weights.shrink", *map(str, args)], capture_output=True, text=True
  )
  out = tmp_path / "small.safetensors"
  said = run(old, f"--output={out}")
  before, after, error, name = re.fullmatch(
    rf"{out}: ([\d,]+) bytes before, ([\d,]+) now; largest relative error of an update ([\d.]+) % \((.*)\)\n",
    said.stdout,
  ).groups()
  assert [int(x.replace(",", "")) for x in (before, after)] == [p.stat().st_size for p in (old, out)]
  first, second = (read_adapter(p, CONFIG).factors for p in (old, out))
  relative = {
    n: np.linalg.norm(a @ b - np.matmul(*second[n])) / np.linalg.norm(a @ b) for n, (a, b) in first.items()
  }
  assert name == max(relative, key=relative.get)
  assert float(error) == pytest.approx(100 * relative[name], abs=0.006)
  refused = run(out, f"--output={tmp_path / 'smaller'}")
  assert refused.returncode == 1 and refused.stderr == f"error: {out} has int8 factors already\n"
  assert not (tmp_path / "smaller").exists()


def test_what_cannot_be_converted_is_refused(files, tmp_path: Path):
  path, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
  path.write_bytes(files[0].read_bytes())
  (tmp_path / "link.safetensors").symlink_to(path)
  for same in (path, tmp_path / "x" / ".." / path.name, tmp_path / "link.safetensors"):
    with pytest.raises(ValueError, match="is the adapter itself"):
      shrink(path, same)
  assert path.read_bytes() == files[0].read_bytes()
  rewrite(path, **{f"{NAME}.lora_b": None})
  with pytest.raises(AdapterError, match=f"only one factor of {NAME}"):
    shrink(path, out)
  write_adapter(path, Adapter(1.0, {}, np.ones((6, CONFIG.d_model)), None), CONFIG)
  with pytest.raises(ValueError, match="no low-rank factors, because all weights were trained"):
    shrink(path, out)
  assert not out.exists()


SCALE = f"{NAME}.lora_a.scale"
DAMAGES = {
  "storage 'int4' is none of bfloat16, int8": lambda p: rewrite(p, {"storage": "int4"}),
  "lora_a has type I8: only F64": lambda p: rewrite(p, {"storage": None}),
  f"{NAME}.lora_a has type F32: only I8": lambda p: rewrite(p, **{f"{NAME}.lora_a": np.ones((64, 4), "f")}),
  f"{SCALE} is missing": lambda p: rewrite(p, **{SCALE: None}),
  r"shapes \(64, 4\) and \(64,\): not one scale": lambda p: rewrite(p, **{SCALE: np.ones(64, "f")}),
  r"shapes \(64, 4\) and \(1, 4\): not one scale": lambda p: rewrite(p, **{SCALE: np.ones((1, 4), "f")}),
  r"shapes \(64,\) and \(4,\): not one scale": lambda p: rewrite(p, **{f"{NAME}.lora_a": np.ones(64, "i1")}),
  r"shapes \(64, 5\) and \(4, 64\), which have no product": lambda p: rewrite(
    p, **{f"{NAME}.lora_a": np.ones((64, 5), "i1"), SCALE: np.ones(5, "f")}
  ),
  r"have shapes \(63, 4\) and \(4, 64\), its kernel \(64, 64\)": lambda p: rewrite(
    p, **{f"{NAME}.lora_a": np.ones((63, 4), "i1")}
  ),
  f"only one factor of {NAME}": lambda p: rewrite(p, **{f"{NAME}.lora_a": None, SCALE: None}),
  "has extra.scale, which is no part of": lambda p: rewrite(p, **{"extra.scale": np.ones(4, "f")}),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_file_is_refused(message: str, files, tmp_path: Path):
  path = tmp_path / "adapter.safetensors"
  path.write_bytes(files[1].read_bytes())
  DAMAGES[message](path)
  with pytest.raises(AdapterError, match=message) as caught:
    read_adapter(path, CONFIG)
  assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, 3e38, np.nan, np.inf])
def test_a_scale_that_no_component_has_is_refused(value: float, files, tmp_path: Path):
  path = tmp_path / "adapter.safetensors"
  path.write_bytes(files[1].read_bytes())
  rewrite(path, **{SCALE: np.array([1, 1, value, 1], "f")})
  with pytest.raises(AdapterError, match=f"{SCALE} has numbers that are not above 0 and at most"):
    read_adapter(path, CONFIG)
