"""How likely texts are under a model: the trainer's own forward pass over packed rows."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx

from pasta_jax.data.packing import concatenate, fill_rows, pack_row
from pasta_jax.decode.generator import Model
from pasta_jax.lang.layout import layout
from pasta_jax.lang.thread import Thread
from pasta_jax.model.transformer import stack
from pasta_jax.train.losses import token_log_likelihood

ROW = 1024  # tokens of a packed row; a longer text gets rows of the next power of two
ROWS = 2  # of a batch


class Likelihood:
  """Log-likelihood of plain texts behind prompts, under a generator's model without promises."""

  def __init__(self, generator: Model):
    self._generator = generator
    graph, self._params = nnx.split(stack(generator.model))
    self._run = jax.jit(lambda params, batch: token_log_likelihood(nnx.merge(graph, params), batch)[0])

  def __call__(
    self, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], done: Callable[[int, float], None]
  ) -> None:
    """`done(i, sum of log p over the tokens texts[i] behind prompts[i])`, in an order of its own."""
    g = self._generator
    examples = [layout(Thread(tuple(t)), g.rule, g.vocabulary.table, p) for p, t in zip(prompts, texts)]
    buckets: dict[int, list[int]] = {}
    for i, e in enumerate(examples):
      buckets.setdefault(max(ROW, 1 << (len(e) - 1).bit_length()), []).append(i)
    for length, members in sorted(buckets.items()):
      rows = [[members[k] for k in row] for row in fill_rows([len(examples[i]) for i in members], length)]
      rows += [[]] * (-len(rows) % ROWS)
      for first in range(0, len(rows), ROWS):
        batch = concatenate(
          [pack_row([examples[i] for i in row], length, 1) for row in rows[first : first + ROWS]]
        )
        log_p = np.asarray(self._run(self._params, batch.as_dict()))
        for b, row in enumerate(rows[first : first + ROWS]):
          for segment, i in enumerate(row, 1):
            done(i, float(log_p[b][batch.segment_ids[b] == segment].sum()))
