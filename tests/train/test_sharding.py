"""Sharding: rules, meshes, eight virtual devices against one, and two processes against one."""

import json
import shutil
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.devices import on_eight, start_two
from helpers.on_two_processes import config_of, train_pairs
from jax.sharding import PartitionSpec
from safetensors import safe_open
from test_training import metric_lines, tiny  # noqa: F401  (a fixture)

from pasta_jax.model.sharding import AXES, check_rows, make_mesh, spec
from pasta_jax.train import sft
from pasta_jax.utils import distributed
from pasta_jax.weights.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]


def test_eight_devices_give_what_one_gives(tiny):  # noqa: F811
  """Losses and parameters over twenty steps: full training on every shape of mesh; low-rank, with the kernel
  (five steps, both visibilities) and on pairs on meshes that mix axes; a run that moves to another mesh; and
  one with a teacher on two meshes."""
  lines = on_eight("on_eight_devices.py", str(tiny))
  assert (
    sum("arrays divided" in line for line in lines) == 11
    and {"heads divide", "moved"} <= {*lines}
    and lines[-1] == "taught"
  )


def test_two_processes_give_what_one_gives(tiny, tmp_path):  # noqa: F811
  """Losses and weights: low-rank, on pairs, and full. If one process receives SIGTERM, both stop; the run
  resumes on two processes or on one."""

  def run(folder: Path):
    shutil.copytree(tiny, folder)
    both = start_two("on_two_processes.py", folder, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    return both, [p.communicate(timeout=600) for p in both]

  folder = tmp_path / "tiny"
  both, said = run(folder)
  if any(p.returncode for p in both) and any("workers are out of sync" in errors for _, errors in said):
    # Seen now and then while Orbax makes a folder, for a reason that is not known yet: said, and tried once more.
    warnings.warn("\n".join(errors[:3000] for _, errors in said), stacklevel=1)
    folder = tmp_path / "again"
    both, said = run(folder)
  for process, (out, _) in zip(both, said):
    assert process.returncode == 0, "\n".join(
      f"{e[:3000]} …" for _, e in said
    )  # the first error is the cause
    assert "stopped by SIGTERM after step 3 of 6" in out and out.splitlines()[-1] == "done"
  sft.train(config_of(folder, 1, 1, lora_rank=0), folder / "left")  # one process resumes what two started
  sft.train(config_of(folder, 1, 1), folder / "two, alone")
  sft.train(config_of(folder, 1, 1, lora_rank=0), folder / "stopped, alone")
  train_pairs(config_of(folder, 1, 1), folder, folder / "pairs, alone")
  for name in ("two", "stopped", "pairs"):
    ours, theirs = ([row["loss"] for row in metric_lines(folder / run)] for run in (f"{name}, alone", name))
    np.testing.assert_allclose(theirs, ours, rtol=1e-5)
    if name == "stopped":
      np.testing.assert_allclose([row["loss"] for row in metric_lines(folder / "left")], ours, rtol=1e-5)
    assert sorted(p.name for p in (folder / name).iterdir()) == sorted(
      p.name for p in (folder / f"{name}, alone").iterdir()
    )
    with (
      safe_open(folder / f"{name}, alone" / "adapter.safetensors", "flax") as one,
      safe_open(folder / name / "adapter.safetensors", "flax") as two,
    ):
      assert one.keys() == two.keys()
      for key in one.keys():
        ours, theirs = (file.get_tensor(key).astype("f") for file in (one, two))
        np.testing.assert_allclose(theirs, ours, rtol=1e-2, atol=1e-4)  # bfloat16
  one, two = (
    [*map(json.loads, (folder / run / "reference.jsonl").open())] for run in ("pairs, alone", "pairs")
  )
  assert [row["id"] for row in one] == [row["id"] for row in two] and len(one) == 4  # written once
  np.testing.assert_allclose([row["log_p"] for row in two], [row["log_p"] for row in one], rtol=1e-5)
  weights = [load_checkpoint(folder / run / "model").params for run in ("stopped, alone", "stopped")]
  for key, value in weights[0].items():
    np.testing.assert_allclose(weights[1][key], value, rtol=1e-5, atol=1e-5, err_msg=key)


@pytest.mark.parametrize(
  "given, words",
  [
    (("", 2, 0), "go together"),
    (("host:1", 0, 0), "go together"),
    (("host:1", 2, 2), "--process=2 must be in 0 to 1"),
    (("host", 2, 0), "--coordinator=host must be host:port"),
  ],
)
def test_processes_say_who_they_are(given, words):
  with pytest.raises(ValueError, match=words):
    distributed.start(*given)


@pytest.mark.parametrize("name, shape, wanted", [
  ("layers.attn.q.kernel", (28, 64, 128), (None, "fsdp", "tensor")),
  ("trainable.layers.mlp.down.kernel", (28, 128, 64), (None, "tensor", "fsdp")),
  ("optimiser.1.0.mu.layers.attn.o.lora_b", (28, 16, 64), (None, None, "fsdp")),
  ("layers.3.attn.qkv.kernel", (576, 4, 320), ("fsdp", "tensor", None)),  # the fused form, which decodes
  ("layers.3.attn.qkv.kernel", (576, 1, 320), ("fsdp", None, "tensor")),  # one key-value head
  ("layers.3.attn.qkv.bias", (4, 320), ("tensor", None)),
  ("layers.3.mlp.gate_up.kernel", (576, 2, 1536), ("fsdp", None, "tensor")),
  ("layers.mlp.gate_up.kernel", (28, 576, 2, 1536), (None, "fsdp", None, "tensor")),
  ("layers.3.attn.q.bias", (576,), ()),
  ("layers.3.attn.qkv.kernel_scale", (4, 320), ("tensor", None)),
  ("layers.3.mlp.gate_up.kernel_scale", (2, 1536), (None, "tensor")),
  ("layers.3.mlp.down.kernel_scale", (576,), ("fsdp",)),
  ("head.kernel_scale", (49152,), ("tensor",)),
  ("embed.embedding", (49152, 576), (("tensor", "fsdp"), None)),
  ("embed.embedding", (49151, 576), (None, None)),  # a vocabulary that eight devices cannot share evenly
  ("layers.attn_norm.scale", (28, 64), ()),
  ("embed.tags", (6, 64), ()),
  ("optimiser.1.0.count", (), ()),
])  # fmt: skip
def test_rules(name, shape, wanted):
  assert spec(name, shape, {"data": 1, "fsdp": 4, "tensor": 2}) == PartitionSpec(*wanted)


def test_meshes_make_up_the_devices():
  one = jax.devices()[:1]
  assert dict(make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, one).shape) == dict.fromkeys(AXES, 1)
  for sizes, words in [
    ((1, -1, -1), "one may be -1"),
    ((0, 1, 1), "1 or more"),
    ((2, 1, 1), "needs 2 devices, not the 1"),
    ((2, -1, 1), "needs a multiple of 2 devices"),
  ]:
    with pytest.raises(ValueError, match=words):
      make_mesh(dict(zip(AXES, sizes)), one)
  check_rows(make_mesh(dict.fromkeys(AXES, 1), one), 3, "train.batch_size")
