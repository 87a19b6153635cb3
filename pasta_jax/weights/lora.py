"""PASTA's adapters on models: low-rank updates and tag rows, added for training, saved as one file, put
back."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pasta_jax.model.transformer import LoraParam, TagParam, Transformer
from pasta_jax.weights.adapter import Adapter, read_adapter, write_adapter
from pasta_jax.weights.build import adapter_of, linears


def add_lora(model: Transformer, rank: int, alpha: float, rngs: nnx.Rngs) -> None:
  """Puts a zero-effect update of the given rank on every linear module of the layers, in place.

  `a` starts normal with variance 1/in, `b` at zero (Hu et al. 2021); the update is scaled by alpha / rank.
  """
  for module in linears(model).values():
    *lead, n_in, n_out = module.kernel.shape
    module.lora_a = LoraParam(jax.random.normal(rngs.params(), (*lead, n_in, rank)) * n_in**-0.5)
    module.lora_b = LoraParam(jnp.zeros((*lead, rank, n_out)))
    module.lora_scale = alpha / rank


def add_tags(model: Transformer, rows: np.ndarray, head_rows: np.ndarray | None = None) -> None:
  """Gives PASTA's tags rows [6, D] of the vocabulary (`config.tag_ids`), apart from the base's, in place; an
  untied head gets the same, or others."""
  model.embed.tags = TagParam(jnp.asarray(rows, jnp.float32))
  if model.head is not None:
    model.head_tags = TagParam(jnp.asarray(rows if head_rows is None else head_rows, jnp.float32).T)


def save_adapter(path: Path, model: Transformer, metadata: Mapping[str, str]) -> None:
  """Writes the model's updates and tag rows (`adapter.write_adapter`); its layers may be stacked."""
  write_adapter(path, adapter_of(model)._replace(metadata=metadata), model.config)


def load_adapter(path: Path, model: Transformer) -> Mapping[str, str]:
  """Puts a saved adapter on a model, in place; returns the file's metadata.

  Raises AdapterError, one line, if the file cannot be read or does not fit; the model is then as it was.
  """
  adapter = read_adapter(path, model.config)
  put(adapter, model)
  return adapter.metadata


def put(adapter: Adapter, model: Transformer) -> None:
  """Puts an adapter that fits on a model, whose layers may be stacked, in place."""
  if adapter.tags is not None:
    model.embed.tags = TagParam(jnp.asarray(adapter.tags))
  if adapter.head_tags is not None:
    model.head_tags = TagParam(jnp.asarray(adapter.head_tags))
  stacked = not isinstance(model.layers, nnx.List)
  for name, module in linears(model).items():
    rest = name.removeprefix("layers.")
    names = [f"layers.{i}.{rest}" for i in range(model.config.n_layers)] if stacked else [name]
    if found := [adapter.factors[n] for n in names if n in adapter.factors]:
      if len(found) < len(names):
        raise ValueError(
          f"{rest} has updates in {len(found)} of {len(names)} layers only: they cannot be stacked"
        )
      pair = [jnp.stack(f) if stacked else jnp.asarray(f[0]) for f in zip(*found)]
      module.lora_a, module.lora_b = map(LoraParam, pair)
      module.lora_scale = adapter.scale
