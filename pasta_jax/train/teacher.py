"""Distillation: the student's text follows what a model without tags would write there (docs/training.md).

The teacher is an adapter of the same model, usually Baseline-SFT. It reads each row's text in reading order with full
sight (`data.reading`); the student learns the teacher's distribution of every token of text, and tags as before.
Low-rank updates leave embeddings and head as they are, so the teacher's hidden states are all that the loss needs:
the student's head makes its logits of them.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from pasta_jax.model.sharding import constrain_rows, shard_put_array
from pasta_jax.model.transformer import Transformer
from pasta_jax.train.attention import DeviceBatch
from pasta_jax.train.losses import hidden_states
from pasta_jax.weights import build
from pasta_jax.weights.adapter import Merged, read_adapter
from pasta_jax.weights.checkpoint import Checkpoint


class Teacher:
  """A frozen model whose hidden states are put beside a step's batches."""

  def __init__(self, checkpoint: Checkpoint, adapter: Path, settings, mesh: Mesh):
    """`settings` is the section of the config that trains: its `dtype` and `attention`."""
    merged = Merged(checkpoint.config, checkpoint.params, read_adapter(adapter, checkpoint.config))
    model = build.from_params(
      checkpoint.config,
      merged,
      jnp.dtype(settings.dtype),
      stacked=True,
      put=lambda name, x: jax.block_until_ready(shard_put_array(mesh, name, x)),
    )
    self._graph, self._params = nnx.split(model)
    self._attention = settings.attention

  def __call__(self, batches: DeviceBatch) -> dict[str, jax.Array]:
    """The batches, leaves [A, B, …], with `taught` [A, B, T, D]: the hidden state that predicts each target that is
    text."""
    taught = _hidden(self._graph, self._params, batches, self._attention)
    return {**batches, "taught": taught}


@partial(jax.jit, static_argnums=(0, 3))
def _hidden(graph, params, batches: DeviceBatch, attention: str) -> jax.Array:
  model: Transformer = nnx.merge(graph, params)
  return jax.lax.map(lambda batch: _of_batch(model, batch, attention), dict(batches))


def _of_batch(model: Transformer, batch: DeviceBatch, attention: str) -> jax.Array:
  tokens = jnp.where(batch["tokens"] < model.config.vocab_size, batch["tokens"], 0)  # it has no tags
  view = {
    **batch,
    "tokens": tokens,
    "positions": batch["reading_positions"],
    "rounds": batch["reading_rounds"],
  }
  hidden = hidden_states(model, view, remat="none", attention=attention, visibility="live")
  source = jnp.maximum(batch["reading_source"], 0)
  return constrain_rows(jnp.take_along_axis(hidden, source[..., None], axis=1))
