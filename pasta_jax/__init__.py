"""PASTA in JAX: language models that decode independent parts of their own answer in parallel.

import pasta_jax

model = pasta_jax.load()
answer = model.generate("Compare trains and planes.")
print(answer.text)
answer.timeline("answer.html")
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from pasta_jax.decode.generator import Model

__version__ = "0.1.0"


def load(
  source: str | Path = "smollm2-135m-instruct", adapter: str | Path | None = None, **settings: Any
) -> "Model":
  """Loads a model that decodes in parallel.

  Args:
    source: "smollm2-135m-instruct" or "gemma3-270m" (downloaded once), a .gguf file, a Hugging Face folder, the
      folder of a training run, or "tiny", a model with random weights.
    adapter: the name of an adapter of this package, a file, or "" for none. None: the PASTA adapter of `source`
      if the package has one, otherwise none.
    **settings: of decoding, by their names in `config.decode`: max_new_tokens=256, temperature=0.7,
      dtype="float32", …

  Returns:
    A `decode.generator.Model`: `model.generate(prompt)`, `model.generate_batch(prompts)`, `model.scheduler()`.

  Raises:
    ValueError: the weights or the adapter cannot be loaded, or a setting is unknown or out of range; one line.
  """
  from pasta_jax.decode.generator import load  # here, so that `import pasta_jax` stays light

  return load(source, None if adapter is None else str(adapter), **settings)
