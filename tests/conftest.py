"""How the tests compile, and fixtures that several files share."""

import gc
import os
import tempfile
from pathlib import Path

# Most of the time here is XLA's. What it makes of tiny models need not be fast; and one program is compiled
# once in all processes of these tests, which inherit these variables.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _compiled = tempfile.TemporaryDirectory(prefix="compiled-")  # goes when the process that made it ends
  os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": _compiled.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }

import jax  # noqa: E402
import pytest  # noqa: E402

from pasta_jax.model.transformer import set_matmul_precision  # noqa: E402
from pasta_jax.weights.checkpoint import Checkpoint, load_checkpoint  # noqa: E402

set_matmul_precision("float32")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """The longest file goes first: where files are shared out, nobody waits for it at the end."""
  items.sort(key=lambda item: item.path.name != "test_sharding.py")


@pytest.fixture(scope="session")
def smollm2_checkpoint() -> Checkpoint:
  """The default model, downloaded on the first run ever. Shared: tests must not change it."""
  return load_checkpoint(progress=False)


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps():
  """After a file: forget compiled programs where they hold many memory maps. Linux lets a process have 65,530,
  a program takes dozens, and XLA aborts when it gets no more."""
  yield
  maps = Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def full_optimisation(request: pytest.FixtureRequest):
  """Of what a user runs: the default model is large enough to need it, and is tested as it is compiled for
  users."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update(
    "jax_disable_most_optimizations", before and "smollm2_checkpoint" not in request.fixturenames
  )
  yield
  jax.config.update("jax_disable_most_optimizations", before)
