"""How the tests compile, and fixtures that several files share."""

import os

# Most of the time here is XLA's; what it makes of tiny models need not be fast. What tests start inherits this.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")

import jax  # noqa: E402
import pytest  # noqa: E402

from pasta_jax.model.checkpoint import Checkpoint, load_checkpoint  # noqa: E402
from pasta_jax.model.decoder import exact_products  # noqa: E402

exact_products("float32")


@pytest.fixture(scope="session")
def smollm2_checkpoint() -> Checkpoint:
  """The default model, downloaded on the first run ever. Shared: tests must not change it."""
  return load_checkpoint(progress=False)


@pytest.fixture(autouse=True)
def full_optimisation(request: pytest.FixtureRequest):
  """Of what a user runs: the default model is large enough to need it, and is tested as it is compiled for users."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", before and "smollm2_checkpoint" not in request.fixturenames)
  yield
  jax.config.update("jax_disable_most_optimizations", before)
