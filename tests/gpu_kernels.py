"""A script for a machine with a GPU: the training kernels of `model.flash` against the definition in float64.

    python tests/gpu_kernels.py

Random rows of nested chunks and of both forms of visibility, forward and backward, in float32 and bfloat16; exit code
1 if a difference is too large. Elsewhere the kernels are interpreted by tests/model/test_attention.py.
"""

import dataclasses
import sys
import time
from functools import partial
from pathlib import Path

sys.path[:0] = [
  str(Path(__file__).parents[1]),
  *(str(Path(__file__).parent / d) for d in (".", "lang", "model")),
]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from helpers.devices import verdict  # noqa: E402
from test_attention import CONFIG, definition, naive, random_rows  # noqa: E402

from pasta_jax.model import flash  # noqa: E402
from pasta_jax.model.transformer import set_matmul_precision  # noqa: E402
from pasta_jax.train.attention import mask_of  # noqa: E402

# (window, soft cap, tokens, key-value heads, query heads of each, width)
CASES = [
  (0, 0.0, 640, 3, 3, 64),
  (97, 0.0, 512, 1, 4, 256),
  (97, 30.0, 384, 2, 2, 128),
  (0, 0.0, 301, 2, 1, 32),
]
LARGEST = {"float32": 2e-3, "bfloat16": 2e-2}  # of the norm of the difference over the norm


def gradients(q, k, v, out, mask, softcap: float):
  """Cotangents of `naive`, in float64 on the host's CPU."""
  with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):

    def attend(q, k, v):
      scores = jnp.einsum("btkgh,bskh->bkgts", q, k)
      scores = softcap * jnp.tanh(scores / softcap) if softcap else scores
      weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -jnp.inf), axis=-1)
      return jnp.einsum("bkgts,bskh->btkgh", weights, v)

    wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v, out)]
    return [np.asarray(g) for g in jax.vjp(attend, *wide[:3])[1](wide[3])]


def check(window, softcap, length, heads, groups, width, visibility, local, dtype) -> float:
  """The largest relative difference of context and cotangents."""
  rng = np.random.default_rng(length + width)
  config = dataclasses.replace(CONFIG, window=window, attention_softcap=softcap, head_dim=width)
  batch = random_rows(rng, 2, length)
  cast = lambda x: jnp.asarray(x.astype("f")).astype(dtype)
  q = cast(rng.normal(size=(2, length, heads, groups, width)) * width**-0.5)
  k, v = (cast(rng.normal(size=(2, length, heads, width))) for _ in range(2))
  out = rng.normal(size=q.shape).astype("f")
  mask = mask_of(batch, visibility)
  size = flash.tile_size("gpu", length, width)
  how = flash.Settings("gpu", size, softcap, window > 0, False, type(mask))

  @jax.jit
  def run(q, k, v):
    tables = flash.make_tables(mask, batch["positions"], window, size)
    attend = partial(flash.attention, tables=tables, settings=how, config=config)
    context, pull = jax.vjp(lambda *x: attend(*x, local), q, k, v)
    return context, pull(out)

  context, found = run(q, k, v)
  sees = definition(batch, visibility)
  if local:
    sees = sees & (batch["positions"][:, :, None] - batch["positions"][:, None] < window)
  wanted = [naive(q, k, v, sees, softcap), *gradients(q, k, v, out, sees, softcap)]
  norm = lambda x: float(np.linalg.norm(np.asarray(x, np.float64)))
  return max(norm(np.asarray(x, np.float64) - y) / norm(y) for x, y in zip((context, *found), wanted))


def main() -> None:
  set_matmul_precision("float32")
  wrong = 0
  for window, softcap, length, heads, groups, width in CASES:
    for visibility in ("promise", "live"):
      for local in (False, True) if window else (False,):
        for dtype in LARGEST:
          started = time.time()
          case = partial(check, window, softcap, length, heads, groups, width, visibility, local, dtype)
          said, bad = verdict(case, LARGEST[dtype])
          wrong += bad
          print(
            f"{visibility:8} {length} tokens, {heads}x{groups} heads of {width}, window {window if local else 0}, "
            f"soft cap {softcap:g}, {dtype}: {said} ({time.time() - started:.1f} s)",
            flush=True,
          )
  print(f"{jax.devices()[0].device_kind}: {wrong} wrong")
  sys.exit(bool(wrong))


if __name__ == "__main__":
  main()
