"""Cache folder, version and machine."""

import subprocess
import sys
from pathlib import Path

import pytest

from pasta_jax import __version__
from pasta_jax.utils import environment


def test_cache_folder(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setenv("HOME", "/home/someone")
  for variables, folder in (
    ({}, "/home/someone/.cache/pasta-jax"),
    ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/pasta-jax"),
    ({"XDG_CACHE_HOME": "/xdg", "PASTA_CACHE": "~/own"}, "/home/someone/own"),
  ):
    for name in ("XDG_CACHE_HOME", "PASTA_CACHE"):
      monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
      monkeypatch.setenv(name, value)
    assert environment.cache_folder() == Path(folder)


def test_a_cache_that_cannot_be_made_is_no_error(tmp_path: Path):
  import jax

  before = jax.config.jax_compilation_cache_dir
  (tmp_path / "file").write_text("")
  environment.use_compilation_cache(tmp_path / "file" / "compiled")
  assert jax.config.jax_compilation_cache_dir == before


def test_version_without_git(monkeypatch: pytest.MonkeyPatch):
  assert environment.version().startswith(__version__)

  def missing(*args, **kwargs):
    raise FileNotFoundError("git")

  monkeypatch.setattr(subprocess, "run", missing)
  assert environment.version() == __version__


def test_machine_names_device_and_jax():
  import jax

  assert environment.machine().endswith(f"; jax {jax.__version__}") and "cores" in environment.machine()


def test_processor_and_cores(monkeypatch: pytest.MonkeyPatch):
  """What is the same on machines of a kind; the speed of the moment is not."""
  said = "processor : {}\nmodel name\t: A chip: fast\ncpu MHz : 25{}0\nflags : avx2{}\n\n"
  read = lambda *cores: monkeypatch.setattr(Path, "read_text", lambda self: "".join(cores))
  read(said.format(0, 1, ""), said.format(1, 7, ""))
  first = environment.processor()
  assert first == ("A chip: fast", "avx2")
  read(said.format(0, 9, ""))
  assert environment.processor() == first
  read(said.format(0, 1, " amx_bf16"))
  assert environment.processor() == ("A chip: fast", "avx2 amx_bf16")
  read("CPU implementer : 0x41\nFeatures : asimd bf16\n")
  name, features = environment.processor()
  assert name and features == "0x41 asimd bf16"

  def missing(self):
    raise FileNotFoundError(self)

  monkeypatch.setattr(Path, "read_text", missing)
  assert environment.processor() == (name, "") and environment.cores() >= 1


def test_features_and_versions(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(Path, "read_text", lambda path: "flags\t\t: fpu avx avx2 avx512f avx512_bf16\n")
  assert environment.cpu_features() == ("avx2", "avx512f", "avx512_bf16")
  monkeypatch.undo()
  assert environment.installed_version("jax") and environment.installed_version("no-such-package") == ""


def test_download_does_without_jax():
  code = "import sys, pasta_jax.weights.download; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
