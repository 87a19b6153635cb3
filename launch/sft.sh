#!/usr/bin/env bash
# SFT of the PASTA model, of Baseline-SFT and of APAR on the same rows, on all devices of this machine
# (--config.train.batch_size: a multiple of their number).
#   launch/sft.sh RUNS_FOLDER [flags for all runs, e.g. --config.train.data=a.jsonl,b.jsonl*2]
# Started again, the runs continue where they stopped. PYTHON selects another Python than .venv's.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/launch/lib.sh"
runs=${1:?usage: launch/sft.sh RUNS_FOLDER [flags]}
shift
for system in pasta baseline apar; do
  config=$root/configs/smollm2_135m.py
  [ "$system" = pasta ] || config+=":$system"
  "${PYTHON:-$root/.venv/bin/python}" "$root/main.py" --mode=train --config="$config" --workdir="$runs/$system" \
    --config.train.data="$root/data/seed.jsonl" "$@"
done
