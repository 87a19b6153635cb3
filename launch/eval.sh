#!/usr/bin/env bash
# The table of docs/results.md: four systems over a file of prompts, some of them timed, judged, and reported. More systems:
# --config.eval.systems=pasta,baseline,apar,sot,sequential,base.
#   launch/eval.sh PROMPTS_FILE TIMED_PROMPTS_FILE RUN_FOLDER [flags]
# Timed prompts are those of PROMPTS_FILE that TIMED_PROMPTS_FILE contains too. Run no other jobs while they are timed,
# or pass --config.eval.timed=0 first and omit it later: existing answers are kept. Started again, it continues where it
# stopped. --limit=7 tries everything in ten minutes (two cores, nothing compiled before: 10 min 28 s for 8 prompts).
# PYTHON selects another Python than the checkout's own .venv.
set -euo pipefail
usage="usage: launch/eval.sh PROMPTS_FILE TIMED_PROMPTS_FILE RUN_FOLDER [flags]"
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/launch/lib.sh"
prompts=$(file "${1:?$usage}")
timed=$(file "${2:?$usage}")
run=${3:?$usage}
shift 3
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
"${PYTHON:-$root/.venv/bin/python}" "$root/main.py" --mode=eval --workdir="$run" --config.eval.prompts="$prompts" \
  --config.eval.systems=pasta,baseline,apar,sot \
  --config.eval.timed=-1 --config.eval.timed_prompts="$timed" "$@"
