"""Scripts of this folder on eight virtual devices, and on two processes; what a script says of a case."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def on_eight(script: str, *arguments: str) -> list[str]:
  """The lines that a script prints on eight virtual CPU devices; fails if it does."""
  environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, str(ROOT / "tests" / "helpers" / script), *arguments]
  done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stdout + done.stderr[-3000:]
  return done.stdout.splitlines()


def start_two(script: str, folder: Path, *more: str, **environment: str) -> list[subprocess.Popen[str]]:
  """A script as two processes on one machine: it gets the folder, the coordinator's port, its index, and `more`."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  command = [sys.executable, str(ROOT / "tests" / "helpers" / script), str(folder), str(port)]
  return [
    subprocess.Popen(
      [*command, str(i), *more],
      env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
      cwd=ROOT,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    for i in (0, 1)
  ]


def verdict(case: Callable[[], float], largest: float) -> tuple[str, bool]:
  """What to print of a case that returns a relative error, and whether it is wrong: too large, or the case fails. One
  must not hide the others."""
  try:
    error = case()
  except Exception as failure:
    return f"FAILED {type(failure).__name__}: {' '.join(str(failure).split())[:300]}", True
  bad = not error <= largest
  return f"{error:.1e}{'  WRONG' if bad else ''}", bad
