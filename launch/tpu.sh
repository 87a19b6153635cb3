#!/usr/bin/env bash
# Runs MODE (train, preference, eval or pilot) on Cloud TPU VMs, a slice of one host or of many: requests the slice
# (a queued resource), waits for it, copies
# this checkout to every host, installs it, and starts the same command on all of them in tmux.
#   NAME=pasta ZONE=us-west4-a TYPE=v5litepod-16 BUCKET=my-bucket launch/tpu.sh [--dry-run] RUN [flags of main.py]
# Environment: NAME, ZONE, TYPE; MODE (train); BUCKET, which every host mounts with gcsfuse and which contains the folder RUN (without
# BUCKET, all hosts must see RUN by other means); PROJECT (gcloud's own if unset), RUNTIME (v2-alpha-tpuv5-lite), SPOT=1
# for a pre-emptible slice, POLL_SECONDS (30). Started again, it reuses what exists: it requests a slice that was taken away once more,
# leaves a running training alone, and continues a stopped one from its last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/lib.sh
[ "${1:-}" != --dry-run ] || { DRY_RUN=1; shift; }
usage="usage: NAME=… ZONE=… TYPE=… [BUCKET=…] launch/tpu.sh [--dry-run] RUN [flags]"
: "${NAME:?$usage}" "${ZONE:?$usage}" "${TYPE:?$usage}" "${1:?$usage}"
workdir=$1
shift
where=(--zone="$ZONE")
[ -z "${PROJECT:-}" ] || where+=(--project="$PROJECT")
tpu=(gcloud compute tpus)

state() { "${tpu[@]}" queued-resources describe "$NAME" "${where[@]}" --format="value(state.state)"; }
on_all() { run "${tpu[@]}" tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command="$1"; }

if [ "${DRY_RUN:-0}" != 1 ] && [[ "$(state 2>/dev/null || true)" =~ ^(FAILED|SUSPENDED)$ ]]; then
  run "${tpu[@]}" queued-resources delete "$NAME" "${where[@]}" --quiet --force
fi
if ! holds state; then
  run "${tpu[@]}" queued-resources create "$NAME" --node-id="$NAME" "${where[@]}" --accelerator-type="$TYPE" \
    --runtime-version="${RUNTIME:-v2-alpha-tpuv5-lite}" ${SPOT:+--spot}
fi
if [ "${DRY_RUN:-0}" != 1 ]; then
  failures=0
  while :; do
    if now=$(state); then failures=0; else now=unknown failures=$((failures + 1)); fi
    case $now in
      ACTIVE) break ;;
      FAILED | SUSPENDED) echo "the slice $NAME is $now: start this script again" >&2 && exit 1 ;;
    esac
    [ "$failures" -lt 5 ] || { echo "gcloud could not describe the slice $NAME five times: see above" >&2; exit 1; }
    sleep "${POLL_SECONDS:-30}"
  done
fi

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
running="tmux has-session -t pasta 2>/dev/null"
run git archive --format=tar.gz -o "$archive" HEAD
run "${tpu[@]}" tpu-vm scp "$archive" "$NAME:pasta-jax.tar.gz" "${where[@]}" --worker=all
on_all "$running || { mkdir -p pasta-jax && tar xzf pasta-jax.tar.gz -C pasta-jax && cd pasta-jax && \
{ [ -x .venv/bin/python ] || python3 -m venv .venv; } && .venv/bin/pip install -q -e '.[tpu]'; }"
if [ -n "${BUCKET:-}" ]; then
  source="https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -c -s) main"
  key=/usr/share/keyrings/cloud.google.asc
  on_all "command -v gcsfuse >/dev/null || { curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | \
sudo tee $key >/dev/null && echo \"deb [signed-by=$key] $source\" | sudo tee /etc/apt/sources.list.d/gcsfuse.list && \
sudo apt-get update -q && sudo apt-get install -qy gcsfuse; }; mkdir -p ~/bucket && { mountpoint -q ~/bucket || \
gcsfuse --implicit-dirs --rename-dir-limit=10000 $(words "$BUCKET") ~/bucket; }"
  workdir="../bucket/$workdir"
fi
train=$(words .venv/bin/python main.py --mode="${MODE:-train}" --distributed --workdir="$workdir" "$@")
on_all "$running || { cd pasta-jax && tmux new-session -d -s pasta \
$(words "{ $(until_done "$train"); } 2>&1 | tee -a train.log"); }"
echo "follow it: gcloud compute tpus tpu-vm ssh $NAME ${where[*]} --worker=0 --command='tail -f pasta-jax/train.log'" >&2
