"""`eval.vary`: one system for each value of a setting of decoding, so that one adapter gives a front."""

import dataclasses

from pasta_jax.config import Config
from pasta_jax.config.fields import PROMISES
from pasta_jax.config.sections import Decode, vary_of
from pasta_jax.evaluate.errors import EvalError
from pasta_jax.evaluate.systems.registry import SYSTEMS


def varied(config: Config) -> tuple[Config, dict[str, dict[str, str]]]:
  """(the config with a system for each value in the place of each system of `eval.systems` but the baseline, and of
  each such system, by its name, the system that it is made of, `varied`, and its `value`).

  A system that the setting does not change stays as it is. Raises EvalError if none is left to vary.
  """
  settings = vary_of(config.eval.vary)
  if not settings:
    return config, {}
  field = settings[0].partition("=")[0]
  [when] = {f.metadata.get("identity") for f in dataclasses.fields(Decode) if f.name == field}
  systems, names, about = dict(config.systems), [], {}
  for name in config.eval.systems:
    entry = config.systems[name]
    if name == config.eval.baseline or when == PROMISES and not SYSTEMS[entry.decode].promises:
      names.append(name)
      continue
    for setting in settings:
      value = setting.partition("=")[2]
      new = f"{name}_{field}_{value.replace('/', '-')}"
      systems[new] = dataclasses.replace(entry, own=setting, speed=None if field == "speed" else entry.speed)
      about[new] = {"varied": name, "value": value}
      names.append(new)
  if not about:
    raise EvalError(
      f"eval.vary={config.eval.vary} changes none of eval.systems={','.join(config.eval.systems)}"
    )
  evaluated = dataclasses.replace(config.eval, systems=tuple(names), vary="")
  return dataclasses.replace(config, systems=systems, eval=evaluated), about
