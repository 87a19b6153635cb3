#!/usr/bin/env bash
# Trains on a Cloud TPU VM: copies this checkout there, installs it, starts the run in tmux.
#   launch/tpu.sh TPU_NAME ZONE WORKDIR [flags]
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:?usage: launch/tpu.sh TPU_NAME ZONE WORKDIR [flags]} zone=${2:?} workdir=${3:?}
shift 3
flags=$(printf ' %q' "$@")
git archive HEAD | gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --command="mkdir -p pasta-jax && tar x -C pasta-jax"
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --command="
  cd pasta-jax && python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu]' &&
  tmux new-session -d -s pasta '.venv/bin/python main.py --mode=train --workdir=$workdir$flags 2>&1 | tee train.log'"
