#!/usr/bin/env bash
# Runs MODE (train, preference, eval or pilot) on GPUs under SLURM, one process a GPU, in a folder that all nodes
# see. The checkout needs its .venv
# (pip install -e ".[cuda]"), on a file system that all nodes see too.
#   NODES=2 GPUS=8 launch/slurm.sh [--dry-run] RUN_FOLDER [flags of main.py]
# Environment: MODE (train), NODES (1), GPUS a node (1), TIME (24:00:00), PARTITION, ACCOUNT, NAME (pasta). Two minutes before the time
# limit, or when the job is pre-empted, the run saves a checkpoint and the job is queued again; the same command by hand
# does the same.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/launch/lib.sh"
[ "${1:-}" != --dry-run ] || { DRY_RUN=1; shift; }
usage="usage: [NODES=… GPUS=…] launch/slurm.sh [--dry-run] RUN_FOLDER [flags]"
workdir=$(realpath -m "${1:?$usage}")
shift
gpus=${GPUS:-1} mode=${MODE:-train}
data=()
[ "$mode" != train ] || data=(--config.train.data="$root/data/seed.jsonl")
train=$(words srun --kill-on-bad-exit=1 "${PYTHON:-$root/.venv/bin/python}" "$root/main.py" --mode="$mode" --distributed \
  --workdir="$workdir" ${data[@]+"${data[@]}"} "$@")
# The batch script forwards SIGTERM to all processes and queues the job again if they exit with 75. (The signal ends
# `wait` without the step's exit code; another `wait` returns it, even if the step has ended by then.)
script="trap 'told=1; scancel --signal=TERM \$SLURM_JOB_ID.0' TERM
$train &
told=; wait \$!; code=\$?
while [ -n \"\$told\" ]; do told=; wait \$!; code=\$?; done
[ \$code != 75 ] || scontrol requeue \$SLURM_JOB_ID
exit \$code"
run mkdir -p "$workdir"
run sbatch --job-name="${NAME:-pasta}" --nodes="${NODES:-1}" --ntasks-per-node="$gpus" --gpus-per-node="$gpus" \
  --time="${TIME:-24:00:00}" ${PARTITION:+--partition="$PARTITION"} ${ACCOUNT:+--account="$ACCOUNT"} --requeue \
  --signal=B:TERM@120 --open-mode=append --output="$workdir/slurm.log" --chdir="$PWD" --wrap="$script"
