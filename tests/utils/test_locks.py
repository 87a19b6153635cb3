"""One process at a time writes in a folder, and a killed one is in nobody's way."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pasta_jax.utils.locks import LOCK, LockedError, locked

HOLDER = (
  "import sys, pathlib, time\n"
  "from pasta_jax.utils.locks import locked\n"
  "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)\n"
)


@pytest.fixture
def holder(tmp_path):
  """Another process that holds the lock of the folder."""
  process = subprocess.Popen(
    [sys.executable, "-c", HOLDER, tmp_path / LOCK],
    stdout=subprocess.PIPE,
    text=True,
    cwd=Path(__file__).parents[2],
  )
  assert process.stdout.readline() == "held\n"
  yield process
  process.kill()
  process.wait()


def test_the_second_is_refused_by_name_of_the_first(tmp_path: Path, holder):
  with pytest.raises(LockedError, match=r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d") as error, locked(tmp_path / LOCK):
    pass
  message = str(error.value)
  assert f"process {holder.pid} on {socket.gethostname()}" in message and str(tmp_path) in message
  assert "\n" not in message
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  with locked(tmp_path / LOCK):  # the note of the dead process is not in the way
    assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
  assert not (tmp_path / LOCK).exists()


def test_the_folder_is_made_and_left_clean(tmp_path: Path):
  folder = tmp_path / "a" / "b"
  with pytest.raises(RuntimeError), locked(folder / LOCK):
    raise RuntimeError
  assert not folder.exists()
  with locked(folder / LOCK):
    (folder / "row").touch()
  assert [p.name for p in folder.iterdir()] == ["row"]


def test_one_of_many_at_once_holds_it(tmp_path: Path):
  holds, most, refused = [0], [0], [0]
  start = threading.Barrier(8)

  def work():
    start.wait()
    for _ in range(200):
      try:
        with locked(tmp_path / LOCK):
          holds[0] += 1
          most[0] = max(most[0], holds[0])
          holds[0] -= 1
      except LockedError:
        refused[0] += 1

  threads = [threading.Thread(target=work) for _ in range(8)]
  for t in threads:
    t.start()
  for t in threads:
    t.join()
  assert most[0] == 1 and refused[0] > 0


def test_a_note_from_another_host_is_told(tmp_path: Path, capsys):
  (tmp_path / LOCK).write_text(json.dumps({"host": "elsewhere", "process": 7, "start": "then"}))
  with locked(tmp_path / LOCK):
    pass
  assert "process 7 on elsewhere" in capsys.readouterr().err
  (tmp_path / LOCK).write_bytes(b"\xff")  # damaged
  with locked(tmp_path / LOCK):
    pass
  assert capsys.readouterr().err == ""
