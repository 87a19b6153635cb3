#!/usr/bin/env bash
# Preference optimisation in rounds, for several weights of quality, with an evaluation behind each round.
#   launch/preference.sh PROMPTS_FILE EVALUATION_PROMPTS_FILE RUN_FOLDER [flags, e.g. --config.preference.weights=1,4,inf]
# Started again, it goes on where it stopped. Stages can run on several machines, the folder carried between them:
# --config.preference.stages=sample (then judge, train, eval). PYTHON names another Python than .venv's.
set -euo pipefail
usage="usage: launch/preference.sh PROMPTS_FILE EVALUATION_PROMPTS_FILE RUN_FOLDER [flags]"
prompts=$(realpath "${1:?$usage}") held_out=$(realpath "${2:?$usage}") run=$(realpath -m "${3:?$usage}")
shift 3
cd "$(dirname "$0")/.."
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
"${PYTHON:-.venv/bin/python}" main.py --mode=preference --workdir="$run" --config.preference.prompts="$prompts" \
  --config.eval.prompts="$held_out" "$@"
