#!/usr/bin/env bash
# The README's table: four systems over a file of prompts, some of them by the clock, judged, and reported. More systems:
# --config.eval.systems=pasta,baseline,apar,sot,sequential,base.
#   launch/eval.sh PROMPTS_FILE TIMED_PROMPTS_FILE RUN_FOLDER [flags]
# Prompts by the clock are those of PROMPTS_FILE that stand in TIMED_PROMPTS_FILE too. Leave the machine alone
# while they run, or give --config.eval.timed=0 first and take the flag away later: what was answered is kept.
# Started again, it goes on where it stopped. --limit=7 tries all of it in ten minutes (two cores, nothing compiled
# before: 10 min 28 s for 8 prompts). PYTHON names another Python than the checkout's own .venv.
set -euo pipefail
usage="usage: launch/eval.sh PROMPTS_FILE TIMED_PROMPTS_FILE RUN_FOLDER [flags]"
prompts=$(realpath "${1:?$usage}") timed=$(realpath "${2:?$usage}") run=$(realpath -m "${3:?$usage}")
shift 3
cd "$(dirname "$0")/.."
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
"${PYTHON:-.venv/bin/python}" main.py --mode=eval --workdir="$run" --config.eval.prompts="$prompts" \
  --config.eval.systems=pasta,baseline,apar,sot \
  --config.eval.timed=-1 --config.eval.timed_prompts="$timed" "$@"
