"""Log-likelihoods of texts under a model, by the trainer's forward pass over packed rows."""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx

from pasta_jax.data.packing import concatenate, fill_rows, pack_row
from pasta_jax.decode.generator import Model
from pasta_jax.lang.layout import layout
from pasta_jax.lang.thread import Thread
from pasta_jax.model.sharding import ROWS, on_mesh
from pasta_jax.model.transformer import stack
from pasta_jax.train.losses import token_log_likelihood

ROW_LENGTH = 1024  # tokens of a packed row; for a longer text, the next power of two
BATCH_ROWS = 2  # on one device


class Likelihood:
  """Log-likelihoods of plain texts after prompts. Without promises every form of the language has the same mask and
  positions, so kept figures do not depend on the form."""

  def __init__(self, model: Model):
    self._model = model
    graph, self._params = nnx.split(stack(model.model))
    run = jax.jit(lambda params, batch: token_log_likelihood(nnx.merge(graph, params), batch)[0])
    self._run = on_mesh(model.mesh, run)
    parts = 1 if model.mesh is None else math.prod(model.mesh.shape[axis] for axis in ROWS)
    self._rows = math.lcm(BATCH_ROWS, parts)

  def __call__(
    self,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    on_finish: Callable[[int, float], None],
  ) -> None:
    """Calls `on_finish(i, sum of log p of the tokens texts[i] given prompts[i])`, in any order of i."""
    g = self._model
    examples = [
      layout(Thread(tuple(t)), g.forms.positions, g.vocabulary.table, p) for p, t in zip(prompts, texts)
    ]
    buckets: dict[int, list[int]] = {}
    for i, e in enumerate(examples):
      buckets.setdefault(max(ROW_LENGTH, 1 << (len(e) - 1).bit_length()), []).append(i)
    for length, members in sorted(buckets.items()):
      rows = [[members[k] for k in row] for row in fill_rows([len(examples[i]) for i in members], length)]
      rows += [[]] * (-len(rows) % self._rows)
      for first in range(0, len(rows), self._rows):
        batch = concatenate(
          [pack_row([examples[i] for i in row], length, 1) for row in rows[first : first + self._rows]]
        )
        log_p = np.asarray(self._run(self._params, batch.as_dict()))
        for b, row in enumerate(rows[first : first + self._rows]):
          for segment, i in enumerate(row, 1):
            on_finish(i, float(log_p[b][batch.segment_ids[b] == segment].sum()))
