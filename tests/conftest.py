"""Fixtures that several test files share."""

import pytest

from pasta_jax.model.checkpoint import Checkpoint, load_checkpoint
from pasta_jax.model.decoder import exact_products

exact_products("float32")


@pytest.fixture(scope="session")
def smollm2_checkpoint() -> Checkpoint:
  """The default model, downloaded on the first run ever. Shared: tests must not change it."""
  return load_checkpoint(progress=False)
