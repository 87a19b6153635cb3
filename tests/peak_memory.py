"""A script for `test_weights`: how much memory loading takes, in sizes of the parameters that are loaded.

    python tests/peak_memory.py SOURCE DTYPE FORM [ADAPTER]

SOURCE as of `load_checkpoint`; FORM: plain, stacked (of training) or decoding, with an adapter merged if one
is named. DTYPE of the form decoding is one of `decode.dtype`.
"""

import sys
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[i]) for i in (0, 1)]  # as a script

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

from pasta_jax.config.sections import formats  # noqa: E402
from pasta_jax.weights import build  # noqa: E402
from pasta_jax.weights.adapter import read_adapter  # noqa: E402
from pasta_jax.weights.checkpoint import load_checkpoint  # noqa: E402


def own_memory() -> int:
  """Bytes of this process that are no mapped file's."""
  lines = Path("/proc/self/status").read_text().splitlines()
  return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def main(source: str, dtype: str, form: str, adapter: str = "") -> None:
  products, weights = formats(dtype)
  build.from_params(*_parts("tiny"), jnp.dtype(products))  # what JAX takes for itself
  checkpoint = load_checkpoint(source, progress=False)
  before, peak, done = own_memory(), [0], threading.Event()

  def watch() -> None:
    while not done.is_set():
      peak[0] = max(peak[0], own_memory())
      time.sleep(0.001)

  watcher = threading.Thread(target=watch)
  watcher.start()
  if form == "decoding":
    merge = read_adapter(Path(adapter), checkpoint.config) if adapter else None
    model = build.for_decoding(
      checkpoint.config, checkpoint.params, merge, jnp.dtype(products), weights=weights
    )
  else:
    model = build.from_params(
      checkpoint.config, checkpoint.params, jnp.dtype(dtype), stacked=form == "stacked"
    )
  done.set()
  watcher.join()
  size = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
  print(f"{size / 1e6:.0f} MB of parameters, at most {(peak[0] - before) / size:.2f} times that taken")


def _parts(source: str):
  checkpoint = load_checkpoint(source)
  return checkpoint.config, checkpoint.params


if __name__ == "__main__":
  main(*sys.argv[1:])
