"""The environment of a run: cache folder, cache of compiled programs, machine and version for reports.

JAX is imported where it is needed: fetching a model (`weights.download`) does without.
"""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import pasta_jax

# Keys of /proc/cpuinfo, on x86 and on ARM, that are the same on each machine of a kind.
_PROCESSOR = (
  "vendor_id", "cpu family", "model", "stepping", "cache size", "flags",
  "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features",
)  # fmt: skip


def cache_folder() -> Path:
  """$PASTA_CACHE, else pasta-jax in $XDG_CACHE_HOME or ~/.cache: fetched models and compiled programs."""
  if chosen := os.environ.get("PASTA_CACHE"):
    return Path(chosen).expanduser()
  base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return Path(base).expanduser() / "pasta-jax"


def use_compilation_cache(folder: Path) -> None:
  """Keeps compiled programs in `folder` between runs; no error if it cannot be created."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError:
    return
  import jax

  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def offer_loops_to_command_buffers() -> None:
  """Lets XLA record loops of decode steps as CUDA graphs, where every operation in them allows it (CUDA 12.3 or later).
  Must be called before JAX starts its backends; other backends ignore it."""
  # DYNAMIC_SLICE_COPY_FUSION would be of use too, but jaxlib 0.10 and 0.11 end the process at that name.
  flag = "--xla_gpu_enable_command_buffer=+WHILE,+DYNAMIC_SLICE_FUSION"
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def version() -> str:
  """The package's version, followed by the commit if the package is in a Git checkout."""
  try:
    done = subprocess.run(
      ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
      capture_output=True,
      text=True,
      timeout=10,
    )
    commit = done.stdout.strip() if done.returncode == 0 else ""
  except (OSError, subprocess.SubprocessError):
    commit = ""
  return f"{pasta_jax.__version__} ({commit})" if commit else pasta_jax.__version__


def processor() -> tuple[str, str]:
  """(name of the CPU, what it is and can do in the words of /proc/cpuinfo; "" where there is none)."""
  name = platform.processor() or platform.machine()
  try:
    first, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")  # its cores are alike
  except OSError:
    return name, ""
  pairs = (line.partition(":") for line in first.splitlines())
  said = {key.strip(): value.strip() for key, _, value in pairs}
  return said.get("model name", name), " ".join(said[key] for key in _PROCESSOR if key in said)


def cores() -> int:
  """CPU cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Of x86, that programs for CPU are compiled for.
_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def cpu_features() -> tuple[str, ...]:
  """Those of the CPU that decide how fast matrices are multiplied; () where they are not known."""
  there = processor()[1].split()
  return tuple(feature for feature in _FEATURES if feature in there)


def installed_version(package: str) -> str:
  """Of a package; "" if it is not installed."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return ""


def machine() -> str:
  """The first device, the number of CPU cores and the version of JAX."""
  import jax

  cpu, _ = processor()
  device = jax.local_devices()[0]
  what = (
    f"{os.cpu_count()} cores of {cpu}"
    if device.platform == "cpu"
    else f"{device.device_kind}, {os.cpu_count()} CPU cores"
  )
  return f"{what}; jax {jax.__version__}"
