#!/usr/bin/env bash
# SFT of the PASTA model and of Baseline-SFT on the same rows, on the first device of this machine.
#   launch/sft.sh RUNS_FOLDER [flags for both runs, e.g. --config.train.data=a.jsonl,b.jsonl*2]
# Both resume where they stopped when the script is started again. PYTHON names another Python than .venv's.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:?usage: launch/sft.sh RUNS_FOLDER [flags]}
shift
"${PYTHON:-.venv/bin/python}" main.py --mode=train --config=configs/smollm2_135m.py --workdir="$runs/pasta" "$@"
"${PYTHON:-.venv/bin/python}" main.py --mode=train --config=configs/smollm2_135m.py:baseline --workdir="$runs/baseline" "$@"
