#!/usr/bin/env bash
# Tests PASTA on your own prompts, on this machine, offline. It writes a report; the exit code is 0 if both thresholds
# are met, 3 if not. MIN_SPEEDUP is a realised speedup (wall clock).
#   launch/pilot.sh PROMPTS_FILE RUN_FOLDER MIN_WIN_RATE MIN_SPEEDUP [flags]
#   launch/pilot.sh prompts.jsonl runs/pilot 40 1.3 --limit=50
set -euo pipefail
usage="usage: launch/pilot.sh PROMPTS_FILE RUN_FOLDER MIN_WIN_RATE MIN_SPEEDUP [flags]"
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/launch/lib.sh"
prompts=$(file "${1:?$usage}")
run=${2:?$usage} quality=${3:?$usage} speedup=${4:?$usage}
shift 4
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
"${PYTHON:-$root/.venv/bin/python}" "$root/main.py" --mode=pilot --workdir="$run" --prompts_file="$prompts" \
  --config.eval.min_quality="$quality" --config.eval.min_speedup="$speedup" "$@"
