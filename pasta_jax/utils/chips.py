"""Chips as their vendors state them: peak, memory and its bandwidth."""

from typing import NamedTuple


class Chip(NamedTuple):
  """Dense bfloat16 FLOP/s, bytes of memory, and bytes a second that it can be read at."""

  peak: float
  memory: float
  bandwidth: float


# By prefix of `jax.Device.device_kind`.
_CHIPS = {
  "TPU v4": Chip(275e12, 32e9, 1228e9),
  "TPU v5 lite": Chip(197e12, 16e9, 819e9), "TPU v5e": Chip(197e12, 16e9, 819e9),
  "TPU v5": Chip(459e12, 95e9, 2765e9),
  "TPU v6 lite": Chip(918e12, 32e9, 1640e9), "TPU v6e": Chip(918e12, 32e9, 1640e9),
  "NVIDIA A100": Chip(312e12, 80e9, 2039e9), "NVIDIA H100": Chip(989e12, 80e9, 3352e9),
  "NVIDIA H200": Chip(989e12, 141e9, 4800e9),
}  # fmt: skip


def chip(kind: str) -> Chip | None:
  """The chip of a `jax.Device.device_kind`; None for CPUs and chips that are not listed."""
  return next((_CHIPS[name] for name in sorted(_CHIPS, key=len, reverse=True) if kind.startswith(name)), None)
