"""The launchers: what they would run, read from a dry run; and SLURM's batch script, run with stand-ins."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(p.name for p in (ROOT / "launch").glob("*.sh"))
CLOUD = {
  "tpu.sh": dict(NAME="pasta", ZONE="us-west4-a", TYPE="v5litepod-16", BUCKET="b", SPOT="1", PROJECT="p"),
  "gke.sh": dict(CLUSTER="c", IMAGE="eu/p/pasta", NAME="pasta", TYPE="v5litepod-16", STORAGE="s", SLICES="2"),
  "slurm.sh": dict(NODES="2", GPUS="8", PARTITION="gpu"),
}
ODD = "--config.train.data=a file's.jsonl,b.jsonl"


def dry(script: str, *arguments: str, **environment: str) -> list[list[str]]:
  """The words of each command that a script would run."""
  own = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
  done = subprocess.run(
    ["bash", str(ROOT / "launch" / script), "--dry-run", *arguments],
    capture_output=True,
    text=True,
    env=own | environment,
    timeout=60,
  )
  assert done.returncode == 0, done.stderr
  return [shlex.split(line) for line in _whole(done.stdout)]


def _whole(text: str) -> list[str]:
  """Commands; a word with line breaks is written by bash as $'…' in one line."""
  lines = []
  for line in text.splitlines():
    if "$'" in line:  # shlex knows no $'…'
      line = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
      ).stdout
      line = shlex.join(line.split("\0")[:-1])
    lines.append(line)
  return lines


def training(command: str) -> list[str]:
  """The words of main.py in a command of a shell."""
  words = shlex.split(command.split("&& break")[0].split("while :; do ")[-1].replace("&\n", "\n"))
  return words[words.index("main.py") :]


@pytest.fixture
def stand_in(tmp_path: Path):
  """Makes a program that is found before the real one."""
  (tmp_path / "bin").mkdir()

  def make(name: str, body: str) -> dict[str, str]:
    """The environment in which it is found."""
    (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
    (tmp_path / "bin" / name).chmod(0o755)
    return os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": name}

  return make


def launch(script: str, *arguments: str, **how) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    ["bash", str(ROOT / "launch" / script), *arguments], capture_output=True, text=True, timeout=60, **how
  )


@pytest.mark.parametrize(
  "script, files, more", [("eval.sh", 2, []), ("preference.sh", 2, []), ("pilot.sh", 1, ["40", "1.3"])]
)
def test_files_are_those_of_the_folder_one_is_in(script, files, more, tmp_path: Path, stand_in):
  """Whichever is missing or empty is named, before anything runs."""
  environment = stand_in("python-stand-in", 'pwd; printf "%s\\n" "$@"')
  (tmp_path / "a b.jsonl").write_text("{}\n")
  good = ["a b.jsonl"] * files
  done = launch(script, *good, "runs/x", *more, "--config.train.data=c.jsonl", cwd=tmp_path, env=environment)
  lines = done.stdout.splitlines()
  assert done.returncode == 0, done.stderr
  assert lines[:2] == [str(tmp_path), str(ROOT / "main.py")] and "--workdir=runs/x" in lines
  assert sum(line.endswith(f"={tmp_path / 'a b.jsonl'}") for line in lines) == files
  for i in range(files):
    for wrong, message in (("none.jsonl", "no such file: none.jsonl"), ("", "usage:")):
      done = launch(script, *good[:i], wrong, *good[i + 1 :], "runs/x", *more, cwd=tmp_path, env=environment)
      assert done.returncode != 0 and message in done.stderr and not done.stdout


def test_sft_runs_three_systems_in_the_folder_one_is_in(tmp_path: Path, stand_in):
  environment = stand_in("python-stand-in", 'pwd; printf "%s\\n" "$@"')
  done = launch("sft.sh", "runs", "--config.train.data=c.jsonl", cwd=tmp_path, env=environment)
  lines = done.stdout.splitlines()
  assert [line for line in lines if line.startswith("--workdir")] == [
    f"--workdir=runs/{s}" for s in ("pasta", "baseline", "apar")
  ]
  assert lines.count(str(tmp_path)) == 3
  data = [line for line in lines if line.startswith("--config.train.data")]
  assert data[:2] == [f"--config.train.data={ROOT / 'data/seed.jsonl'}", "--config.train.data=c.jsonl"]


def test_a_slice_that_cannot_be_described_is_given_up(stand_in):
  environment = stand_in("gcloud", 'case "$*" in *describe*) echo "no permission" >&2; exit 1;; esac')
  environment |= CLOUD["tpu.sh"] | {"POLL_SECONDS": "0"}
  done = launch("tpu.sh", "run", env=environment)
  assert done.returncode == 1 and "could not describe the slice pasta five times" in done.stderr


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_words_are_quoted_for_any_shell(shell: str):
  """Debian's sh is dash, in which sbatch runs its script."""
  odd = ["a b", "it's", "$HOME", "new\nline", "tab\t", "ü", "", '"', "*", "\\", "--a=b,c:d/e"]
  line = subprocess.run(
    ["bash", "-c", f'. {ROOT}/launch/lib.sh; words "$@"', "-", *odd],
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  back = subprocess.run(
    [shell, "-c", f"printf '%s|' {line}"], capture_output=True, text=True, check=True
  ).stdout
  assert back.split("|")[:-1] == odd


def test_a_run_folder_in_a_container_is_absolute():
  done = launch("gke.sh", "--dry-run", "runs/x", env={"PATH": os.environ["PATH"], **CLOUD["gke.sh"]})
  assert done.returncode == 1 and "absolute path, not runs/x" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_bash(script: str):
  subprocess.run(["bash", "-n", str(ROOT / "launch" / script)], check=True)
  if shutil.which("shellcheck"):
    subprocess.run(["shellcheck", "-x", str(ROOT / "launch" / script)], check=True, cwd=ROOT)


@pytest.mark.parametrize("script", CLOUD)
def test_what_is_missing_is_named(script: str):
  done = subprocess.run(
    ["bash", str(ROOT / "launch" / script), "--dry-run"],
    capture_output=True,
    text=True,
    env={"PATH": os.environ["PATH"]},
    timeout=60,
  )
  assert done.returncode != 0 and "usage:" in done.stderr and not done.stdout


def test_tpu_asks_copies_installs_mounts_and_starts():
  commands = dry("tpu.sh", "run", ODD, "--config.train.steps=3", **CLOUD["tpu.sh"])
  assert [c[:5] for c in commands] == [
    ["gcloud", "compute", "tpus", "queued-resources", "create"],
    ["git", "archive", "--format=tar.gz", "-o", commands[1][4]],
    ["gcloud", "compute", "tpus", "tpu-vm", "scp"],
    *[["gcloud", "compute", "tpus", "tpu-vm", "ssh"]] * 3,
  ]
  assert {"--accelerator-type=v5litepod-16", "--spot", "--zone=us-west4-a", "--project=p"} <= set(commands[0])
  assert all("--worker=all" in c for c in commands[2:])
  *_, install, mount, start = (c[-1].removeprefix("--command=") for c in commands)
  assert "pip install -q -e '.[tpu]'" in install
  assert "gcsfuse --implicit-dirs --rename-dir-limit=10000 b ~/bucket" in mount
  for command in (install, mount, start):
    subprocess.run(["bash", "-n", "-c", command], check=True)
  # What tmux would be given, as its shell would read it.
  stand_ins = 'tmux() { [ $1 != has-session ] && printf %s "${@: -1}"; }; cd() { :; }; '
  inner = subprocess.run(["bash", "-c", stand_ins + start], capture_output=True, text=True, check=True).stdout
  assert training(inner) == [
    "main.py",
    "--mode=train",
    "--distributed",
    "--workdir=../bucket/run",
    ODD,
    "--config.train.steps=3",
  ]
  assert len(dry("tpu.sh", "/shared/run", **{k: v for k, v in CLOUD["tpu.sh"].items() if k != "BUCKET"})) == 5


@pytest.mark.parametrize("codes, last", [((75, 75, 0), 0), ((75, 1, 0), 1), ((0,), 0)])
def test_a_stopped_training_is_started_again(codes, last: int, tmp_path: Path):
  """The loop that tmux runs, with a training that ends as told."""
  (tmp_path / "codes").write_text("".join(f"{c}\n" for c in codes))
  train = "next() { code=$(head -1 codes); sed -i 1d codes; return $code; }; "
  loop = subprocess.run(
    ["bash", "-c", f". {ROOT}/launch/lib.sh; until_done next"], capture_output=True, text=True, check=True
  )
  done = subprocess.run(["bash", "-c", train + loop.stdout], cwd=tmp_path, timeout=60)
  assert done.returncode == last
  assert len((tmp_path / "codes").read_text().split()) == (1 if last else 0)


def test_gke_builds_pushes_and_starts():
  commands = dry("gke.sh", "/data/run", ODD, **CLOUD["gke.sh"])
  assert [c[:3] for c in commands] == [
    ["docker", "build", "-f"],
    ["docker", "push", commands[1][2]],
    ["xpk", "workload", "create"],
  ]
  tag = commands[1][2]
  assert tag.startswith("eu/p/pasta:") and tag in commands[0] and "EXTRA=tpu" in commands[0]
  create = commands[2]
  assert {"--num-slices=2", "--storage=s", "--restart-on-exit-codes=75", f"--docker-image={tag}"} <= set(
    create
  )
  assert training(create[-1].removeprefix("--command=")) == [
    "main.py",
    "--mode=train",
    "--distributed",
    "--workdir=/data/run",
    ODD,
  ]


def test_slurm_queues_a_job_that_starts_a_process_a_gpu(tmp_path: Path):
  made, batch = dry("slurm.sh", str(tmp_path / "run"), ODD, **CLOUD["slurm.sh"])
  assert made == ["mkdir", "-p", str(tmp_path / "run")] and batch[0] == "sbatch"
  assert {
    "--nodes=2",
    "--ntasks-per-node=8",
    "--gpus-per-node=8",
    "--partition=gpu",
    "--requeue",
    "--signal=B:TERM@120",
  } <= set(batch)
  script = batch[-1].removeprefix("--wrap=")
  words = shlex.split(script.replace("&\n", "\n"))
  start = words.index(str(ROOT / "main.py"))
  assert words[start + 1 : start + 6] == [
    "--mode=train",
    "--distributed",
    f"--workdir={tmp_path / 'run'}",
    f"--config.train.data={ROOT / 'data/seed.jsonl'}",
    ODD,
  ]


@pytest.mark.parametrize("script", CLOUD)
def test_other_modes_are_started_too(script: str, tmp_path: Path):
  """`MODE` is the mode; the data of trainings is left out of others."""
  *_, start = dry(script, str(tmp_path / "run"), **CLOUD[script], MODE="preference")
  assert "--mode=preference --distributed" in start[-1]
  assert "--mode=train" not in start[-1] and "train.data" not in start[-1]


@pytest.mark.parametrize("code, queued", [(0, False), (1, False), (75, True)])
def test_slurms_batch_script_passes_the_signal_on_and_queues_again(code: int, queued: bool, tmp_path: Path):
  """SIGTERM to the batch script reaches the step; exit code 75 of the step queues the job again."""
  (_, batch) = dry("slurm.sh", str(tmp_path / "run"), **CLOUD["slurm.sh"])
  stand_ins = {
    "srun": f"trap 'exit {code}' TERM; echo $$ > started; for i in $(seq 300); do sleep 0.1; done; exit 9",
    # The step is gone before the signal's handler is through.
    "scancel": 'echo "$@" > cancelled; kill -TERM $(cat started); '
    "for i in $(seq 100); do kill -0 $(cat started) 2>/dev/null || break; sleep 0.05; done",
    "scontrol": 'echo "$@" > queued',
  }
  (tmp_path / "bin").mkdir()
  for name, body in stand_ins.items():
    (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (tmp_path / "bin" / name).chmod(0o755)
  environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
  job = subprocess.Popen(["sh", "-c", batch[-1].removeprefix("--wrap=")], cwd=tmp_path, env=environment)
  for _ in range(300):
    if (tmp_path / "started").exists() and (tmp_path / "started").read_text():
      break
    try:
      job.wait(0.1)
    except subprocess.TimeoutExpired:
      pass
  job.terminate()
  assert job.wait(60) == code
  assert (tmp_path / "cancelled").read_text() == "--signal=TERM 42.0\n"
  assert (tmp_path / "queued").exists() == queued
