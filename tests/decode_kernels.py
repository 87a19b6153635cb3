"""A script for a machine with a GPU or TPU: the kernels of `decode.flash_decoding` against float64, and their time
against plain attention.

    python tests/decode_kernels.py [KIND]              # of decode.attention; the machine's own kernel if not given

Layers of Gemma 7B and 2B, SmolLM2-135M and others: random masks, soft caps, in float32 and bfloat16, alone
and in a batch of requests; exit code 1 if a difference is too large. Then one layer of each model with eight branches
and a pool that is used in part. Elsewhere tests/decode/test_flash_decoding.py interprets the kernels.
"""

import sys
import time
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), *(str(Path(__file__).parent / d) for d in (".", "decode"))]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from helpers.devices import verdict  # noqa: E402
from test_flash_decoding import POOL_AXES, expected, random_layer  # noqa: E402

from pasta_jax.decode.attention import make_decode_attend  # noqa: E402
from pasta_jax.model.transformer import set_matmul_precision  # noqa: E402

# (key-value heads, query heads of each, width)
MODELS = {
  "Gemma 7B": (16, 1, 256),
  "Gemma 2B": (1, 8, 256),
  "SmolLM2-135M": (3, 3, 64),
  "Gemma 2 9B": (8, 2, 256),
}
# (branches, key-value heads, query heads of each, width, entries, soft cap)
CASES = [
  *((8, *sizes, 4224, 0.0) for sizes in MODELS.values()),
  (1, 3, 3, 64, 1024, 0.0),
  (5, 2, 5, 80, 1100, 50.0),
  (40, 8, 4, 128, 640, 0.0),
]
LARGEST = {"float32": 1e-5, "bfloat16": 1e-2}  # of the norm of the difference over the norm
CHAINED = 64  # layers of one timed program


def branches(kind: str, softcap: float = 0.0):
  """(keys, values, mask [W, P], q, k, v) -> [W, K, G, H]."""

  def one(keys, values, mask, q, k, v):
    return make_decode_attend(kind, mask, None, softcap)((keys, values), q, k, v, False)[0]

  return jax.vmap(one, POOL_AXES)


def check(kind: str, *sizes, softcap: float, dtype: str, requests: int) -> float:
  """The largest relative difference of a request."""
  rng = np.random.default_rng(sum(sizes))
  layers = [random_layer(rng, *sizes, share=0.3, dtype=jnp.dtype(dtype)) for _ in range(requests)]
  run = branches(kind, softcap)
  if requests == 1:
    got = [jax.jit(run)(*layers[0])]
  else:
    got = list(jax.jit(jax.vmap(run))(*(jnp.stack(x) for x in zip(*layers))))
  wanted = [expected(*layer, softcap) for layer in layers]
  return max(float(np.linalg.norm(g - w) / np.linalg.norm(w)) for g, w in zip(got, wanted))


def milliseconds(kind: str, sizes, entries: int, used: int) -> float:
  """Of one layer in bfloat16 with eight branches: the median of ten runs. Each layer's queries depend on the layer
  before, and the pools of eight layers take turns, so that a cache does not serve them."""
  rng = np.random.default_rng(0)
  layers = [random_layer(rng, 8, *sizes, entries, dtype=jnp.bfloat16) for _ in range(8)]
  mask = jnp.broadcast_to(jnp.arange(entries) < used, (8, entries))
  run = branches(kind)

  @jax.jit
  def chain(layers, mask):
    q = layers[0][3]
    for i in range(CHAINED):
      keys, values, _, _, k, v = layers[i % len(layers)]
      q = q + run(keys, values, mask, q, k, v)
    return q

  chain(layers, mask).block_until_ready()
  times = []
  for _ in range(10):
    started = time.perf_counter()
    chain(layers, mask).block_until_ready()
    times.append(time.perf_counter() - started)
  return float(np.median(times)) * 1e3 / CHAINED


def main() -> None:
  kind = sys.argv[1] if len(sys.argv) > 1 else jax.default_backend()
  wrong = 0
  for *sizes, softcap in CASES:
    for dtype in LARGEST:
      jax.config.update("jax_default_matmul_precision", None)
      set_matmul_precision(dtype)
      for requests in (1, 3):
        case = partial(check, kind, *sizes, softcap=softcap, dtype=dtype, requests=requests)
        said, bad = verdict(case, LARGEST[dtype])
        wrong += bad
        w, k, g, h, p = sizes
        print(
          f"{requests} x {w} branches, {k}x{g} heads of {h}, {p} entries, soft cap {softcap:g}, {dtype}: {said}"
        )
        sys.stdout.flush()
  jax.config.update("jax_default_matmul_precision", None)
  for name, sizes in MODELS.items():
    for entries, used in ((1024, 1024), (4096, 600), (4096, 4096)):
      plain, kernel = (milliseconds(which, sizes, entries, used) for which in ("xla", kind))
      print(
        f"{name}, pool of {entries}, {used} used: xla {plain:.4f} ms a layer, {kind} {kernel:.4f} ms",
        flush=True,
      )
  print(f"{jax.devices()[0].device_kind}: {wrong} wrong")
  sys.exit(bool(wrong))


if __name__ == "__main__":
  main()
