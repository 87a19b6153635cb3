"""Ways of decoding by name, and the systems that a config names."""

from pasta_jax.decode.generator import Model
from pasta_jax.evaluate.systems.interpreter import ParallelSystem, SequentialSystem
from pasta_jax.evaluate.systems.skeleton import SkeletonSystem
from pasta_jax.evaluate.systems.system import System

# By the `decode` of an entry of `config.systems` (config.sections.DECODINGS).
SYSTEMS: dict[str, type[System]] = {
  "parallel": ParallelSystem,
  "sequential": SequentialSystem,
  "skeleton": SkeletonSystem,
}


def load_system(config, name: str, models: dict[tuple[str, str], Model], *, timed: bool) -> System:
  """The system `config.systems[name]`, for `answer` or, with `timed`, for `answer_timed`.

  `models` are the loaded models by adapter and dtype: one that is missing is loaded and added.
  """
  entry = config.systems[name]
  key = (entry.adapter, config.decode.dtype if timed else config.eval.dtype)
  if key not in models:
    models[key] = Model(config, adapter=entry.adapter, dtype=key[1])
  config, model = config.of_system(name), models[key]
  model = model.with_settings(config.decode) if entry.own else model
  return SYSTEMS[entry.decode].from_config(config, entry, model, timed=timed)
