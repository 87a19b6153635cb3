#!/usr/bin/env bash
# The README's table: every system over a file of prompts, with the default settings and plainly greedy, then
# PASTA against sequential decoding by the clock. Leave the machine alone during the last part.
#   launch/eval.sh PROMPTS_FILE RUNS_FOLDER [flags for all runs]
# Started again, it goes on where it stopped. PYTHON names another Python than the checkout's own .venv.
set -euo pipefail
usage="usage: launch/eval.sh PROMPTS_FILE RUNS_FOLDER [flags]"
prompts=$(realpath "${1:?$usage}") runs=$(realpath -m "${2:?$usage}")
shift 2
cd "$(dirname "$0")/.."
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
evaluate() {
  local name=$1
  shift
  "${PYTHON:-.venv/bin/python}" main.py --mode=eval --workdir="$runs/$name" --config.eval.prompts="$prompts" "$@"
}
all=--config.eval.systems=pasta,sequential,baseline,base
evaluate default $all --config.eval.timed=False "$@"
evaluate greedy $all --config.eval.timed=False --config.decode.repetition_penalty=1.0 --config.decode.no_repeat=0 \
  --config.decode.promise_bias=0.0 "$@"
evaluate timed --config.eval.systems=pasta,sequential "$@"
