"""Where arrays live: rules, meshes, and eight virtual devices against one."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import PartitionSpec
from test_training import tiny  # noqa: F401  (a fixture)

from pasta_jax.train.sharding import AXES, check_rows, make_mesh, spec

ROOT = Path(__file__).parent.parent


def test_eight_devices_give_what_one_gives(tiny):  # noqa: F811
  """Losses and parameters over twenty steps on every shape of mesh; a run that moves to another shape."""
  environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
  done = subprocess.run([sys.executable, str(ROOT / "tests" / "on_eight_devices.py"), str(tiny)], env=environment,
                        cwd=ROOT, capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stderr[-3000:]
  lines = done.stdout.splitlines()
  assert sum("arrays divided" in line for line in lines) == 11 and lines[-1] == "moved"


@pytest.mark.parametrize("name, shape, wanted", [
  ("layers.attn.q.kernel", (28, 64, 128), (None, "fsdp", "tensor")),
  ("trainable.layers.mlp.down.kernel", (28, 128, 64), (None, "tensor", "fsdp")),
  ("optimiser.1.0.mu.layers.attn.o.lora_b", (28, 16, 64), (None, None, "fsdp")),
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
  for sizes, words in [((1, -1, -1), "one may be -1"), ((0, 1, 1), "1 or more"),
                       ((2, 1, 1), "needs 2 devices, not the 1"), ((2, -1, 1), "needs a multiple of 2 devices")]:
    with pytest.raises(ValueError, match=words):
      make_mesh(dict(zip(AXES, sizes)), one)
  check_rows(make_mesh(dict.fromkeys(AXES, 1), one), 3, "train.batch_size")
