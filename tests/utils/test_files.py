"""Atomic writes: a kill or an error at any point leaves the old content, and the next write clears up."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pasta_jax.utils.files import atomic_folder, atomic_path, write_atomic, write_json_atomic

KILLED = """
import os, signal, sys
from pathlib import Path
from pasta_jax.utils import files
Path.replace = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)  # between the write and the rename
{write}
"""
WRITES = {
  "file": "files.write_atomic(Path(sys.argv[1]) / 'x', 'new')",
  "folder": "with files.atomic_folder(Path(sys.argv[1]) / 'x') as f: (f / 'part').write_text('new')",
}


def listing(folder: Path) -> list[str]:
  return sorted(p.name for p in folder.iterdir())


def test_text_bytes_and_json(tmp_path: Path):
  write_atomic(tmp_path / "x", "é\n")
  assert (tmp_path / "x").read_bytes() == b"\xc3\xa9\n"
  write_atomic(tmp_path / "x", b"\xff")
  assert (tmp_path / "x").read_bytes() == b"\xff"
  write_json_atomic(tmp_path / "x", {"a": [1]})
  assert (tmp_path / "x").read_text() == '{\n  "a": [\n    1\n  ]\n}\n'
  assert listing(tmp_path) == ["x"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_follow_the_umask(tmp_path: Path, mask: int):
  before = os.umask(mask)
  try:
    write_atomic(tmp_path / "x", "")
  finally:
    os.umask(before)
  assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o666 & ~mask


def test_a_kill_before_the_rename_leaves_the_old_file(tmp_path: Path):
  write_atomic(tmp_path / "x", "old")
  done = subprocess.run(
    [sys.executable, "-c", KILLED.format(write=WRITES["file"]), str(tmp_path)], check=False
  )
  assert done.returncode == -signal.SIGKILL
  assert (tmp_path / "x").read_text() == "old" and listing(tmp_path) == ["x", "x.tmp"]
  write_atomic(tmp_path / "x", "newer")
  assert (tmp_path / "x").read_text() == "newer" and listing(tmp_path) == ["x"]


def test_a_kill_before_the_rename_leaves_no_partial_folder(tmp_path: Path):
  done = subprocess.run(
    [sys.executable, "-c", KILLED.format(write=WRITES["folder"]), str(tmp_path)], check=False
  )
  assert done.returncode == -signal.SIGKILL
  assert listing(tmp_path) == ["x.tmp"]
  with atomic_folder(tmp_path / "x") as folder:
    assert listing(folder) == []
    (folder / "other").write_text("")
  assert listing(tmp_path) == ["x"] and listing(tmp_path / "x") == ["other"]


def test_an_error_keeps_the_old_file_and_deletes_the_temporary(tmp_path: Path):
  write_atomic(tmp_path / "x", "old")
  with pytest.raises(OSError, match="disk full"), atomic_path(tmp_path / "x") as temporary:
    temporary.write_text("half")
    raise OSError("disk full")
  assert (tmp_path / "x").read_text() == "old" and listing(tmp_path) == ["x"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path):
  (tmp_path / "x").mkdir()
  (tmp_path / "x" / "old").write_text("")
  with pytest.raises(OSError, match="disk full"), atomic_folder(tmp_path / "x") as folder:
    (folder / "half").write_text("")
    raise OSError("disk full")
  assert listing(tmp_path) == ["x"] and listing(tmp_path / "x") == ["old"]
  with atomic_folder(tmp_path / "x") as folder:
    (folder / "new").write_text("")
  assert listing(tmp_path) == ["x"] and listing(tmp_path / "x") == ["new"]


def test_a_kill_between_the_renames_of_a_folder_loses_nothing(tmp_path: Path, monkeypatch):
  (tmp_path / "x").mkdir()
  (tmp_path / "x" / "old").write_text("")
  replace = Path.replace

  def killed(path: Path, target: Path):
    replace(path, target)
    raise KeyboardInterrupt  # after the old folder was put aside; a kill would not tidy up

  monkeypatch.setattr(Path, "replace", killed)
  monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
  with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "x") as folder:
    (folder / "new").write_text("")
  monkeypatch.undo()
  if not (tmp_path / "x").exists():
    assert listing(tmp_path / "x.old") == ["old"]
  with pytest.raises(OSError, match="disk full"), atomic_folder(tmp_path / "x"):
    raise OSError("disk full")
  assert listing(tmp_path) == ["x"] and listing(tmp_path / "x") == ["old"]


def test_a_shared_file_has_a_temporary_for_each_process(tmp_path: Path):
  with atomic_path(tmp_path / "x") as one, atomic_path(tmp_path / "x", shared=True) as other:
    assert one != other and str(os.getpid()) in other.name
    one.write_text("one")
    other.write_text("other")
  assert (tmp_path / "x").read_text() == "one" and listing(tmp_path) == ["x"]


def test_an_unwritable_target_is_an_error_of_one_line(tmp_path: Path):
  (tmp_path / "file").write_text("")
  for target in (tmp_path / "none" / "x", tmp_path / "file" / "x"):
    with pytest.raises(OSError) as error:
      write_atomic(target, "")
    assert str(target) in str(error.value) and "\n" not in str(error.value)
