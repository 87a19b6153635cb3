"""Devices that are not here, for their compilers to compile for: TPU slices and GPUs.

The TPU's compiler is the package `libtpu` (`pip install -e ".[tpu]"`), the GPU's is in the CUDA plugin of JAX
(`pip install -e ".[cuda]"`). Neither needs a device.
"""

import dataclasses
import os
import re
from typing import Any

import jax

# libtpu queries no metadata server for a machine it is not on, and processes do not wait for each other.
_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_LOG_DIR": "disabled",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
}


@dataclasses.dataclass(frozen=True)
class Gpu:
  """What the compiler asks a GPU's driver for, where there is one (XLA's GpuDeviceInfoProto)."""

  kind: str  # jax.Device.device_kind
  capability: tuple[int, int]
  cores: int  # streaming multiprocessors
  fpus: int  # of a core
  shared_memory: int  # bytes of a core
  shared_memory_of_block: int  # at most
  l2_cache: int  # bytes
  clock: float  # GHz
  memory: int  # bytes
  bandwidth: int  # bytes a second

  def proto(self) -> str:
    """In protobuf's text format."""
    major, minor = self.capability
    info = dict(
      threads_per_block_limit=1024, threads_per_warp=32, threads_per_core_limit=2048, block_dim_limit_x=2**31 - 1,
      block_dim_limit_y=65535, block_dim_limit_z=65535, registers_per_core_limit=65536,
      registers_per_block_limit=65536, shared_memory_per_block=49152, shared_memory_per_core=self.shared_memory,
      shared_memory_per_block_optin=self.shared_memory_of_block, core_count=self.cores, fpus_per_core=self.fpus,
      l2_cache_size=self.l2_cache, clock_rate_ghz=self.clock, device_memory_size=self.memory,
      memory_bandwidth=self.bandwidth,
    )  # fmt: skip
    fields = " ".join(f"{name}: {value}" for name, value in info.items())
    version = f"cuda_compute_capability {{ major: {major} minor: {minor} }}"
    return (
      f'gpu_device_info {{ {fields} {version} }} platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} '
      f'device_description_str: "{self.kind}"'
    )


GPUS = {
  "h100": Gpu(
    "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 233472, 232448, 50 << 20, 1.98, 84978434048, 3352320000000
  ),
  "a100": Gpu(
    "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 167936, 166912, 40 << 20, 1.41, 84974239744, 2039000000000
  ),
}


def topology(name: str) -> list[jax.Device]:
  """The devices of a TPU slice, "v5e:4x8", or one GPU of `GPUS`. Raises ValueError, one line."""
  if name in GPUS:
    return _gpu(GPUS[name])
  for key, value in _ENVIRONMENT.items():
    os.environ.setdefault(key, value)
  from jax.experimental import topologies

  one = re.fullmatch(r"[^:]+:1x1(x1)?", name)
  try:
    return topologies.get_topology_desc(
      platform="tpu", topology_name=name, **({"chips_per_host_bounds": [1, 1, 1]} if one else {})
    ).devices
  except Exception as error:  # of many types: a missing package, an unknown name
    raise ValueError(
      f"compile.topology={name!r} is not available ({' '.join(str(error).split())[:160]}): names are "
      f"like v5e:4x8, v5p:2x2x4, v6e:4x4, and the package libtpu is needed; or {', '.join(GPUS)}"
    ) from None


def _gpu(gpu: Gpu) -> list[jax.Device]:
  from jax.experimental import topologies

  try:
    return topologies.get_topology_desc(
      platform="cuda", topology_name=gpu.kind, topology="1x1x1", target_config=gpu.proto()
    ).devices
  except Exception as error:  # of many types, such as a missing plugin
    raise ValueError(
      f"the compiler for {gpu.kind} is not available ({' '.join(str(error).split())[:160]}): it is in JAX's CUDA "
      'plugin (pip install -e ".[cuda]")'
    ) from None


def compile_for(name: str, lowered: Any, what: str, remedy: str) -> Any:
  """The compiled program of a `jax.stages.Lowered` for the devices of `topology(name)`. Raises ValueError, one line
  with a `remedy`, if it does not fit their memory; `what` names it."""
  options = {"xla_gpu_autotune_level": 0} if name in GPUS else None  # kernels cannot be timed
  try:
    return lowered.compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as error:
    if "Ran out of memory" not in str(error):
      raise
    sizes = re.search(r"\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", str(error))
    lack = f"a chip would need {sizes[1]} of its {sizes[2]}" if sizes else " ".join(str(error).split())[:200]
    raise ValueError(f"{what} does not fit {name}: {lack}; {remedy}") from None
