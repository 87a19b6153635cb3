"""What training updates: the model split into trainable and frozen parameters, the optimiser, the state."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from pasta_jax.lang.forms import from_metadata
from pasta_jax.lang.syntax import TAG_TEXTS
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.model import lora
from pasta_jax.model.config import ModelConfig
from pasta_jax.model.sharding import shard_put, shard_put_array, shardings
from pasta_jax.model.transformer import LoraParam, TagParam, Transformer, stack
from pasta_jax.weights import build
from pasta_jax.weights.adapter import Merged, read_adapter
from pasta_jax.weights.checkpoint import Checkpoint

Params = Any  # a pytree of arrays

# A tag's row is initialised to the mean embedding of these words, in the order of `syntax.TAG_TEXTS`.
TAG_WORDS = (
  " promise topic about",
  " number of tokens length",
  " done next then",
  " begin start part",
  " end of this part",
  " wait now all together",
)
# The row of a length that is one token lies between these two; neighbouring lengths are near each other.
SHORTEST_WORDS, LONGEST_WORDS = " next part begin start short", " next part begin start very long"


class SplitModel(NamedTuple):
  """A Transformer in three parts, layers stacked; `nnx.merge(*parts)` is the model again."""

  graph: Any
  trainable: Params  # float32
  frozen: Params  # stored in the dtype of products


class TrainState(NamedTuple):
  """Everything that changes from step to step; what a checkpoint stores."""

  step: jax.Array  # int32, number of updates done
  trainable: Params
  optimiser: Params


def tag_rows(embedding: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
  """[n, D] initial rows of the tags, and of lengths that are tokens: means of the embeddings of words that describe
  them."""
  mean = lambda words: embedding[vocabulary.tokenizer.encode(words)].mean(axis=0)
  tags = [mean(words) for words in TAG_WORDS]
  shortest, longest = mean(SHORTEST_WORDS), mean(LONGEST_WORDS)
  n = len(vocabulary.table.lengths)
  return np.stack([*tags, *(shortest + i / n * (longest - shortest) for i in range(n))])


def first_tags(checkpoint: Checkpoint, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
  """Initial rows [n, D] of the tags, and of lengths that are tokens, in the embedding and in the head; the
  checkpoint's own if it was trained for PASTA, in a form that has them."""
  embedding = checkpoint.params["embed.embedding"]
  new = tag_rows(embedding, vocabulary)
  if not checkpoint.pasta:
    return new, new
  has_lengths = from_metadata(checkpoint.pasta).number == "token"
  ids = list(checkpoint.config.tag_ids)[: None if has_lengths else len(TAG_TEXTS)]
  head = embedding if checkpoint.config.tie_embeddings else checkpoint.params["head.kernel"].T
  with_new = lambda rows: np.concatenate([rows[ids], new[len(ids) :]])
  return with_new(embedding), with_new(head)


def make_model(
  checkpoint: Checkpoint,
  vocabulary: Vocabulary,
  config,
  *,
  tags: bool = True,
  adapter: Path | None = None,
  mesh: Mesh | None = None,
) -> SplitModel:
  """The model to train.

  `config.lora_rank` 0 trains every parameter, in float32; otherwise frozen parameters are stored in
  `config.dtype`. With an `adapter`, training continues from its tag rows and its low-rank updates, which keep
  their rank, or are merged if every parameter is trained. Without one, new updates start at zero, with tag
  rows if `tags`. On a `mesh` each array is sharded as soon as it is read, so the host holds one at a time.
  """
  full = config.lora_rank == 0
  dtype = jnp.dtype(jnp.float32 if full else config.dtype)
  params, merge = checkpoint.params, None if adapter is None else read_adapter(adapter, checkpoint.config)
  if merge is not None and full:
    params = Merged(checkpoint.config, params, merge._replace(tags=None, head_tags=None))
    merge = merge._replace(factors={})
  how: dict[str, Any] = (
    {} if mesh is None else {"put": lambda name, x: jax.block_until_ready(shard_put_array(mesh, name, x))}
  )
  model = build.from_params(checkpoint.config, params, dtype, stacked=True, **how)
  if merge is not None:
    lora.put(merge, model)
  elif tags:
    lora.add_tags(model, *first_tags(checkpoint, vocabulary))
  if not full and not any(module.lora_a is not None for module in lora.linears(model).values()):
    lora.add_lora(model, config.lora_rank, config.lora_alpha, nnx.Rngs(config.seed))
  graph, trainable, frozen = split(model, full=full)
  if mesh is not None:
    trainable, frozen = shard_put(mesh, trainable), shard_put(mesh, frozen)
  return SplitModel(graph, trainable, frozen)


def abstract_model(architecture: ModelConfig, config, *, tags: bool = True) -> SplitModel:
  """`make_model` without an adapter, with shapes in place of arrays."""
  full = config.lora_rank == 0

  def make() -> Transformer:
    dtype = jnp.dtype(jnp.float32 if full else config.dtype)
    model = stack(Transformer(architecture, rngs=nnx.Rngs(0), dtype=dtype))
    if tags:
      rows = len(architecture.tag_ids) or len(TAG_TEXTS)
      lora.add_tags(model, jnp.zeros((rows, architecture.d_model)))  # type: ignore[arg-type]
    if not full:
      lora.add_lora(model, config.lora_rank, config.lora_alpha, nnx.Rngs(0))
    return model

  return split(nnx.eval_shape(make), full=full)


def split(model: Transformer, *, full: bool) -> SplitModel:
  """Trains every parameter if `full`, otherwise low-rank updates and tag rows only."""
  chosen = nnx.Param if full else nnx.Any(nnx.OfType(LoraParam), nnx.OfType(TagParam))
  return SplitModel(*nnx.split(model, chosen, ...))


def compute_model(graph, trainable: Params, frozen: Params, dtype: Any) -> Transformer:
  """The model to differentiate through: float32 master weights cast to the dtype of products.

  Norm scales and biases stay float32, as they do in the frozen part.
  """

  def cast(path, leaf):
    small = any("norm" in str(p) or "bias" in str(p) for p in path)
    return leaf if small or leaf.ndim < 2 else leaf.astype(dtype)

  return nnx.merge(graph, jax.tree_util.tree_map_with_path(cast, trainable), frozen)


def make_optimizer(config, total_steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """AdamW after clipping by the global norm; the learning rate warms up, then decays linearly to zero."""
  warmup = max(1, int(config.warmup * total_steps))
  rise = optax.linear_schedule(0.0, config.learning_rate, warmup)
  fall = optax.linear_schedule(config.learning_rate, 0.0, total_steps - warmup)
  schedule = optax.join_schedules([rise, fall], [warmup])
  optimiser = optax.chain(
    optax.clip_by_global_norm(config.max_grad_norm),
    optax.adamw(schedule, b1=0.9, b2=config.adam_b2, weight_decay=config.weight_decay),
  )
  return optimiser, schedule


def init_train_state(mesh: Mesh, trainable: Params, optimiser: optax.GradientTransformation) -> TrainState:
  """The state before the first step. `trainable` is on the mesh already; the optimiser's state is initialised
  directly on its devices."""
  where = shardings(mesh, jax.eval_shape(optimiser.init, trainable))
  moments = jax.jit(optimiser.init, out_shardings=where)(trainable)
  return TrainState(
    shard_put_array(mesh, "step", np.zeros((), np.int32)), trainable, shard_put(mesh, moments)
  )
