#!/usr/bin/env bash
# Runs MODE (train, preference, eval or pilot) on a GKE cluster with TPUs, through XPK (pip install xpk): builds the
# image, pushes it, starts the workload.
#   CLUSTER=c IMAGE=REGION-docker.pkg.dev/PROJECT/REPO/pasta NAME=pasta TYPE=v5litepod-16 launch/gke.sh [--dry-run] \
#     RUN_FOLDER [flags of main.py]
# Environment: CLUSTER, IMAGE, NAME, TYPE; MODE (train); STORAGE, the name of a volume that xpk storage attached to the cluster, which
# contains RUN_FOLDER; ZONE and PROJECT (gcloud's own if unset), SLICES (1), RESTARTS (10). Started again, it replaces a
# workload of the same name, and the run continues from its last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/lib.sh
[ "${1:-}" != --dry-run ] || { DRY_RUN=1; shift; }
usage="usage: CLUSTER=… IMAGE=… NAME=… TYPE=… launch/gke.sh [--dry-run] RUN_FOLDER [flags]"
: "${CLUSTER:?$usage}" "${IMAGE:?$usage}" "${NAME:?$usage}" "${TYPE:?$usage}" "${1:?$usage}"
workdir=$1
shift
[[ $workdir = /* ]] || { echo "RUN_FOLDER is a folder in the container: give an absolute path, not $workdir" >&2; exit 1; }
where=(--cluster="$CLUSTER")
[ -z "${ZONE:-}" ] || where+=(--zone="$ZONE")
[ -z "${PROJECT:-}" ] || where+=(--project="$PROJECT")
tag="$IMAGE:$(git rev-parse --short HEAD)"
run docker build -f launch/Dockerfile --build-arg EXTRA=tpu -t "$tag" .
run docker push "$tag"
if holds xpk workload list "${where[@]}" --filter-by-job="^$NAME\$"; then
  run xpk workload delete --workload="$NAME" "${where[@]}" --force
fi
train=$(words python main.py --mode="${MODE:-train}" --distributed --workdir="$workdir" "$@")
run xpk workload create --workload="$NAME" "${where[@]}" --tpu-type="$TYPE" --num-slices="${SLICES:-1}" \
  --docker-image="$tag" ${STORAGE:+--storage="$STORAGE"} --max-restarts="${RESTARTS:-10}" --restart-on-exit-codes=75 --command="$train"
