"""One optimiser step over accumulated batches: the same for every loss."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from pasta_jax.train.sharding import constrain
from pasta_jax.train.state import Params, TrainState

Sums = dict[str, jax.Array]
Loss = Callable[[Params, Params, dict[str, jax.Array]], tuple[jax.Array, Sums]]  # (trainable, frozen, batch)


def make_step(
  loss: Loss,
  optimiser: optax.GradientTransformation,
  *,
  over: str,
  means: Callable[[Sums, jax.Array], dict[str, jax.Array]],
):
  """The jitted step: (state, frozen, batches) -> (state, metrics).

  `batches` has leaves [A, …]: the losses of A batches are summed and divided by all that their `over` counts,
  which is what one batch of them all would give. `means(sums, count)` makes metrics of the sums. The state's
  buffers are reused; on a mesh (`jax.set_mesh`) its arrays stay where `sharding` puts them.
  """

  @partial(jax.jit, donate_argnums=0)
  def step(state: TrainState, frozen, batches):
    def add(sums, batch):
      (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(state.trainable, frozen, batch)
      return jax.tree.map(jnp.add, sums, (constrain(gradient), metrics)), None

    first = jax.tree.map(lambda x: x[0], batches)
    _, shapes = jax.eval_shape(loss, state.trainable, frozen, first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (gradient, sums), _ = jax.lax.scan(add, (jax.tree.map(jnp.zeros_like, state.trainable), zeros), batches)
    count = jnp.maximum(sums[over], 1)
    gradient = jax.tree.map(lambda g: g / count, gradient)
    updates, optimiser_state = optimiser.update(gradient, state.optimiser, state.trainable)
    metrics = means(sums, count) | {over: sums[over], "gradient_norm": optax.global_norm(gradient)}
    return constrain(
      TrainState(state.step + 1, optax.apply_updates(state.trainable, updates), optimiser_state)
    ), metrics

  return step
