"""An adapter's file with int8 factors, of about half the size.

    python -m pasta_jax.weights.shrink runs/pasta/adapter.safetensors --output=small.safetensors

Everything that reads an adapter reads either file. Tag rows and metadata stay as they are.
"""

import sys
from pathlib import Path

import numpy as np
from absl import app, flags

from pasta_jax.utils.text import one_line
from pasta_jax.weights.adapter import read_file, write_file


def shrink(path: Path, out: Path) -> str:
  """Writes the adapter of `path` to `out`; returns a line with both sizes and the largest relative error of an update.

  Raises ValueError (AdapterError for a file that cannot be read), one line, if there is nothing to convert, or for an
  output that is the input.
  """
  if out.resolve() == path.resolve():
    raise ValueError(f"--output={out} is the adapter itself: name another file")
  adapter, *_ = read_file(path)
  if adapter.metadata.get("storage") == "int8":
    raise ValueError(f"{path} has int8 factors already")
  if not adapter.factors:
    raise ValueError(f"{path} has no low-rank factors, because all weights were trained: nothing to convert")
  out.parent.mkdir(parents=True, exist_ok=True)
  write_file(out, adapter, "int8")
  written = read_file(out)[0].factors
  errors = {name: relative_error(pair, written[name]) for name, pair in adapter.factors.items()}
  worst = max(errors, key=errors.__getitem__)
  return (
    f"{out}: {path.stat().st_size:,} bytes before, {out.stat().st_size:,} now; largest relative error of an update "
    f"{100 * errors[worst]:.2f} % ({worst})"
  )


def relative_error(pair: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> float:
  """‖A·B − A'·B'‖ / ‖A·B‖ in the Frobenius norm, of factors [in, r] and [r, out]; 0 where A·B is 0."""
  (a, b), (c, d) = pair, other
  norm = _norm(a, b)
  return _norm(np.hstack([a, -c]), np.vstack([b, d])) / norm if norm else 0.0


def _norm(a: np.ndarray, b: np.ndarray) -> float:
  """‖A·B‖ without the product [in, out]: orthogonal factors do not change it."""
  return float(np.linalg.norm(np.linalg.qr(a).R @ np.linalg.qr(b.T).R.T))


def main(argv: list[str]) -> None:
  if len(argv) != 2:
    raise app.UsageError("name the file of one adapter")
  try:
    print(shrink(Path(argv[1]).expanduser(), Path(flags.FLAGS.output).expanduser()))
  except (ValueError, OSError) as error:
    sys.exit(f"error: {one_line(str(error))}")


if __name__ == "__main__":
  flags.DEFINE_string("output", None, "file of the adapter with int8 factors", required=True)
  app.run(main)
