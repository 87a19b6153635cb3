#!/usr/bin/env bash
# Preference optimisation in rounds, for several quality weights, with an evaluation after each round.
#   launch/preference.sh PROMPTS_FILE EVALUATION_PROMPTS_FILE RUN_FOLDER [flags, e.g. --config.preference.weights=1,4,inf]
# Started again, it continues where it stopped. Stages can run on different machines if the folder is copied between
# them: --config.preference.stages=sample (then judge, train, eval). PYTHON selects another Python than .venv's.
set -euo pipefail
usage="usage: launch/preference.sh PROMPTS_FILE EVALUATION_PROMPTS_FILE RUN_FOLDER [flags]"
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/launch/lib.sh"
prompts=$(file "${1:?$usage}")
held_out=$(file "${2:?$usage}")
run=${3:?$usage}
shift 3
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
"${PYTHON:-$root/.venv/bin/python}" "$root/main.py" --mode=preference --workdir="$run" --config.preference.prompts="$prompts" \
  --config.eval.prompts="$held_out" "$@"
