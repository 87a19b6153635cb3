"""PASTA's adapters on models: low-rank updates (LoRA) and tag rows, added for training, taken off, put back.

`weights.adapter` reads and writes their files.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pasta_jax.model.transformer import Linear, LoraParam, TagParam, Transformer, unstack


class Adapter(NamedTuple):
  """Low-rank updates and tag rows, as NumPy or JAX arrays."""

  scale: float  # of the updates: alpha / rank
  factors: Mapping[str, tuple[Any, Any]]  # "layers.0.attn.q" -> ([in, r], [r, out])
  tags: Any | None = None  # [6, D]
  head_tags: Any | None = None  # [D, 6], if the head is not tied
  metadata: Mapping[str, str] = {}


def linears(model: Transformer) -> dict[str, Linear]:
  """The linear modules in the layers, by path ("layers.0.attn.q"; "layers.attn.q" if the layers are
  stacked)."""
  return {
    ".".join(map(str, path)): module
    for path, module in nnx.iter_modules(model)
    if isinstance(module, Linear) and path[0] == "layers"
  }


def add_lora(model: Transformer, rank: int, alpha: float, rngs: nnx.Rngs) -> None:
  """Adds a zero update of the given rank to every linear module of the layers, in place.

  `a` starts normal with variance 1/in, `b` at zero (Hu et al. 2021); the update is scaled by alpha / rank.
  """
  for module in linears(model).values():
    *lead, n_in, n_out = module.kernel.shape
    module.lora_a = LoraParam(jax.random.normal(rngs.params(), (*lead, n_in, rank)) * n_in**-0.5)
    module.lora_b = LoraParam(jnp.zeros((*lead, rank, n_out)))
    module.lora_scale = alpha / rank


def add_tags(model: Transformer, rows: np.ndarray, head_rows: np.ndarray | None = None) -> None:
  """Adds separate embeddings [6, D] for PASTA's tags (at `config.tag_ids`), in place. An untied head gets
  `head_rows`, or the same rows."""
  model.embed.tags = TagParam(jnp.asarray(rows, jnp.float32))
  if model.head is not None:
    model.head_tags = TagParam(jnp.asarray(rows if head_rows is None else head_rows, jnp.float32).T)


def adapter_of(model: Transformer) -> Adapter:
  """The updates and tag rows of a model, whose layers may be stacked."""
  model = model if isinstance(model.layers, nnx.List) else unstack(model)
  updated = {name: m for name, m in linears(model).items() if m.lora_a is not None and m.lora_b is not None}
  value = lambda param: None if param is None else param[...]
  return Adapter(
    scale=next((m.lora_scale for m in updated.values()), 1.0),
    factors={name: (m.lora_a[...], m.lora_b[...]) for name, m in updated.items()},  # type: ignore[index]
    tags=value(model.embed.tags),
    head_tags=value(model.head_tags),
  )


def put(adapter: Adapter, model: Transformer) -> None:
  """Puts an adapter that fits on a model, whose layers may be stacked, in place.

  Raises ValueError if the layers are stacked and only some of them have an update.
  """
  if adapter.tags is not None:
    model.embed.tags = TagParam(jnp.asarray(adapter.tags))
  if adapter.head_tags is not None:
    model.head_tags = TagParam(jnp.asarray(adapter.head_tags))
  stacked = not isinstance(model.layers, nnx.List)
  for name, module in linears(model).items():
    rest = name.removeprefix("layers.")
    names = [f"layers.{i}.{rest}" for i in range(model.config.n_layers)] if stacked else [name]
    if factors := [adapter.factors[n] for n in names if n in adapter.factors]:
      if len(factors) < len(names):
        raise ValueError(
          f"only {len(factors)} of {len(names)} layers have an update of {rest}: cannot stack them"
        )
      pair = [jnp.stack(f) if stacked else jnp.asarray(f[0]) for f in zip(*factors)]
      module.lora_a, module.lora_b = map(LoraParam, pair)
      module.lora_scale = adapter.scale


def merged_kernel(kernel: Any, factors: tuple[Any, Any] | None, scale: float) -> Any:
  """A kernel plus its low-rank update, if `factors` are given; leading layer axes are kept."""
  return kernel if factors is None else kernel + scale * (factors[0] @ factors[1])
