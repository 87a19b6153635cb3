#!/usr/bin/env bash
# Checks the kernels on this machine's GPU or TPU, measures decode steps and training, and prints one table last.
#   launch/accelerator.sh FOLDER [--tiny]
# FOLDER gets the figures (JSON) and the logs. --tiny tries everything but the kernels on any machine.
# Exit code 1 if a kernel is wrong. PYTHON selects another Python than .venv's.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:?usage: launch/accelerator.sh FOLDER [--tiny]}
tiny=${2:-}
python=${PYTHON:-$root/.venv/bin/python}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$root"
failed=0 files=()

part() { # part NAME command …: its log is FOLDER/NAME.log
  local name=$1
  shift
  echo "$name …" >&2
  if ! "$@" >"$out/$name.log" 2>&1; then
    echo "$name failed; the end of $out/$name.log:" >&2
    tail -n 5 "$out/$name.log" >&2
    failed=1
    return 1
  fi
}

decode=("$python" -m pasta_jax.evaluate.accelerator)
training=("$python" -m pasta_jax.train.benchmark)
if [ "$tiny" = --tiny ]; then
  decode+=(--tiny --model=tiny --rounds=1 --steps=8)
  training+=(--config=configs/tiny.py --lengths=512 --kinds=chunked --data=data/seed.jsonl --rounds=1 "--steps=lora bfloat16" --rows=1 --length=512)
else
  if "$python" -c 'import jax, sys; sys.exit(jax.default_backend() != "gpu")'; then
    part kernels_of_training "$python" tests/gpu_kernels.py
  fi
  part kernels_of_decoding "$python" tests/decode_kernels.py
  training+=(--lengths=2048,8192,32768 --dense_up_to=8192 "--steps=lora bfloat16" --rows=16 --length=1024)
fi
part steps "${decode[@]}" --json="$out/steps.json" && files+=("$out/steps.json")
part steps_in_command_buffers "${decode[@]}" --command_buffers --json="$out/steps_in_command_buffers.json" &&
  files+=("$out/steps_in_command_buffers.json")
part training "${training[@]}" --json="$out/training.json" && files+=("$out/training.json")
[ ${#files[@]} -gt 0 ] && "$python" -m pasta_jax.evaluate.accelerator --show="$(IFS=,; echo "${files[*]}")"
exit $failed
