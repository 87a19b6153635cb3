"""What a training run keeps: trainable and frozen parameters, the optimiser, and checkpoints."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.model import lora
from pasta_jax.model.transformer import LoraParam, TagParam, Transformer
from pasta_jax.train.sharding import shard_put, shard_put_array, shardings
from pasta_jax.weights import build
from pasta_jax.weights.adapter import Merged, read_adapter
from pasta_jax.weights.checkpoint import Checkpoint

Params = Any  # a pytree of arrays

# Words whose mean embedding a tag row starts from, in the order of `syntax.TAG_TEXTS`.
TAG_WORDS = (
  " promise topic about",
  " number of tokens length",
  " done next then",
  " begin start part",
  " end of this part",
  " wait now all together",
)


class TrainState(NamedTuple):
  """Everything that changes from step to step; what a checkpoint holds."""

  step: jax.Array  # int32, updates done
  trainable: Params
  optimiser: Params


def tag_rows(embedding: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
  """[6, D] first rows for the tags: means of the embeddings of words that describe them."""
  encode = vocabulary.tokenizer.encode
  return np.stack([embedding[encode(words)].mean(axis=0) for words in TAG_WORDS])


def first_tags(checkpoint: Checkpoint, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
  """Rows [6, D] that the tags start from, of the embedding and of the head: their own, where the weights know
  PASTA."""
  embedding = checkpoint.params["embed.embedding"]
  if not checkpoint.pasta:
    return (tag_rows(embedding, vocabulary),) * 2
  ids = list(checkpoint.config.tag_ids)
  head = embedding if checkpoint.config.tie_embeddings else checkpoint.params["head.kernel"].T
  return embedding[ids], head[ids]


def make_model(
  checkpoint: Checkpoint,
  vocabulary: Vocabulary,
  config,
  *,
  tags: bool = True,
  adapter: Path | None = None,
  mesh: Mesh | None = None,
) -> tuple[Any, Params, Params]:
  """(graph, trainable, frozen) of the model to train, layers stacked.

  `config.lora_rank` 0 trains every parameter. Trainable parameters are float32; frozen ones are stored in
  `config.dtype`. `graph` turns both back into a Decoder with `nnx.merge`. With an `adapter` training goes on
  from its tag rows and its updates, whose rank stays, or which are merged where every parameter is trained;
  else new ones begin at no effect, `tags` or no tags. On a `mesh` each array is divided when it has been
  read: the host holds one at a time.
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
  return graph, trainable, frozen


def init_train_state(mesh: Mesh, trainable: Params, optimiser: optax.GradientTransformation) -> TrainState:
  """The state before any step, `trainable` placed already; moments are made where they stay."""
  where = shardings(mesh, jax.eval_shape(optimiser.init, trainable))
  moments = jax.jit(optimiser.init, out_shardings=where)(trainable)
  return TrainState(
    shard_put_array(mesh, "step", np.zeros((), np.int32)), trainable, shard_put(mesh, moments)
  )


def split(model: Transformer, *, full: bool) -> tuple[Any, Params, Params]:
  """(graph, trainable, frozen): every parameter is trained, or updates and tag rows alone."""
  chosen = nnx.Param if full else nnx.Any(nnx.OfType(LoraParam), nnx.OfType(TagParam))
  return nnx.split(model, chosen, ...)  # type: ignore[return-value]


def compute_model(graph, trainable: Params, frozen: Params, dtype: Any) -> Transformer:
  """The decoder to differentiate through: float32 master weights cast to the dtype of products.

  Norm scales and biases stay float32, as in the frozen form.
  """

  def cast(path, leaf):
    small = any("norm" in str(p) or "bias" in str(p) for p in path)
    return leaf if small or leaf.ndim < 2 else leaf.astype(dtype)

  return nnx.merge(graph, jax.tree_util.tree_map_with_path(cast, trainable), frozen)


def make_optimizer(config, total_steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """AdamW behind a clip of the global norm; the rate warms up, then falls linearly to zero."""
  warmup = max(1, int(config.warmup * total_steps))
  rise = optax.linear_schedule(0.0, config.learning_rate, warmup)
  fall = optax.linear_schedule(config.learning_rate, 0.0, total_steps - warmup)
  schedule = optax.join_schedules([rise, fall], [warmup])
  optimiser = optax.chain(
    optax.clip_by_global_norm(config.max_grad_norm),
    optax.adamw(schedule, b1=0.9, b2=config.adam_b2, weight_decay=config.weight_decay),
  )
  return optimiser, schedule


class Checkpoints:
  """Orbax checkpoints of a TrainState under `workdir/checkpoints`, written in the background."""

  def __init__(self, workdir: Path, every: int, checkpoint_metadata: dict[str, Any], keep: int = 2):
    """`checkpoint_metadata` is kept beside each state: what `model.run_folder` needs to make weights of it."""
    self._about = checkpoint_metadata
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, save_interval_steps=every)
    self._path = (workdir / "checkpoints").resolve()
    # With a handler named here, shapes can be read before anything is restored.
    handlers = {
      "state": ocp.StandardCheckpointHandler(),
      "data": ocp.JsonCheckpointHandler(),
      "about": ocp.JsonCheckpointHandler(),
    }
    self._manager = ocp.CheckpointManager(self._path, options=options, item_handlers=handlers)

  def save(self, state: TrainState, data: dict[str, Any], *, force: bool = False) -> None:
    """Saves if the step is due (or `force`), and `data`, the input pipeline's state, beside it. The state's
    buffers may be donated as soon as this returns."""
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(_plain(state)),
      data=ocp.args.JsonSave(data),
      about=ocp.args.JsonSave(self._about),
    )
    self._manager.save(int(state.step), args=items, force=force)

  def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
    """What was saved last, the state with the shapes and shardings of `like`; None if nothing was saved.

    Raises ValueError, one line, if what was saved has other arrays than `like`.
    """
    step = self._manager.latest_step()
    if step is None:
      return None
    wanted = _plain(like)
    if not all((self._path / str(step) / item).is_dir() for item in ("state", "data")):
      raise ValueError(
        f"{self._path / str(step)} is of an earlier version of this program: choose another --workdir"
      )
    stored = {name: array.shape for name, array in self._manager.item_metadata(step).state.tree.items()}
    for name in sorted(wanted.keys() | stored.keys()):
      here = wanted[name].shape if name in wanted else None
      if stored.get(name) != here:
        there, here = (("absent" if s is None else f"{list(s)}") for s in (stored.get(name), here))
        raise ValueError(
          f"{self._path} belongs to a run with another model or configuration: {name} is "
          f"{there} there, {here} here; choose another --workdir, or the settings of that run"
        )
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
    saved = self._manager.restore(
      step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
    )
    # By name: a dict's leaves come sorted, the state's in the order of its fields.
    return jax.tree.unflatten(jax.tree.structure(like), [saved.state[name] for name in wanted]), saved.data

  def close(self) -> None:
    """Waits until the last save is on disk."""
    self._manager.wait_until_finished()
    self._manager.close()


def checkpoint_metadata(
  checkpoint: Checkpoint, model: Transformer, metadata: dict[str, str]
) -> dict[str, Any]:
  """What `Checkpoints` keeps beside the state of a run that began with `checkpoint`; `metadata` are its
  adapter's."""
  scales = [module.lora_scale for module in lora.linears(model).values() if module.lora_a is not None]
  return {"source": checkpoint.source, "scale": scales[0] if scales else 1.0, "metadata": metadata}


def _plain(state: TrainState) -> dict[str, Any]:
  """The state's leaves under stable names, which `model.run_folder` knows: checkpoints do not depend on
  classes of optax or NNX."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
