"""What responses depend on: the settings that are kept with each file of rows."""

from pasta_jax.config import identity
from pasta_jax.decode.generator import adapter_digest, decode_settings
from pasta_jax.evaluate.systems.registry import SYSTEMS
from pasta_jax.utils.environment import machine


def settings_of(config, name: str, *, timed: bool) -> dict:
  """What the responses of system `name` depend on; `timed`: of its timed responses."""
  config = config.of_system(name)
  entry, e = config.systems[name], config.eval
  system = SYSTEMS[entry.decode]
  out = {
    "source": config.model.source,
    "decode": entry.decode,
    "adapter's sha256": adapter_digest(entry.adapter),  # not its path: a run's folder may be moved
  }
  if system.promises:
    out |= {f"positions.{k}": v for k, v in identity(config.positions).items()}
  out |= decode_settings(config, entry.adapter, parallel=system.promises)
  if (speed := config.decode.speed if entry.speed is None else entry.speed) >= 0:
    out["decode.speed"] = speed
  out["decode.dtype"] = config.decode.dtype if timed else e.dtype
  out |= system.settings(config)
  if timed:
    out |= {
      "repeats": e.repeats,
      "decode.max_branches": config.decode.max_branches,
      "machine": machine(),
    }
  return out
