#!/usr/bin/env bash
# Trains on a Cloud TPU slice: a queued resource, one process on each of its hosts.
#
#   export NAME=vlm ZONE=us-west4-a BUCKET=my-bucket
#   bash scripts/launch/tpu_vm.sh create             # asks for the slice; state: tpu_vm.sh state
#   bash scripts/launch/tpu_vm.sh setup              # installs, mounts the bucket at ~/bucket
#   bash scripts/launch/tpu_vm.sh train --config bucket/run.yaml --resume=auto
#   bash scripts/launch/tpu_vm.sh log                # of the first host; Ctrl-C leaves it running
#   bash scripts/launch/tpu_vm.sh stop               # saves a checkpoint, then ends
#   bash scripts/launch/tpu_vm.sh delete             # gives the slice back
#
# TYPE (v5litepod-16), RUNTIME (v2-alpha-tpuv5-lite) and SPOT (1; 0: on demand) may be set too.
# The hosts get what is committed in this checkout. docs/PODS.md goes through it from nothing.
set -euo pipefail

: "${NAME:?set NAME, what the slice is called}" "${ZONE:?set ZONE, as us-west4-a}"
: "${BUCKET:?set BUCKET, the Cloud Storage bucket of data, base checkpoint and results}"
TYPE=${TYPE:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
SPOT=${SPOT:-1}

# on WORKER COMMAND: runs a command on one host, or on all of them.
on() {
    gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" --command="$2"
}

create() {
    local spot=()
    [ "$SPOT" = 0 ] || spot=(--spot)
    gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
        --accelerator-type="$TYPE" --runtime-version="$RUNTIME" "${spot[@]}"
}

state() {
    gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" \
        --format="value(state.state)"
}

setup() {
    git -C "$(dirname "${BASH_SOURCE[0]}")/../.." archive --format=tar.gz HEAD |
        gcloud storage cp - "gs://$BUCKET/vlm_jax.tar.gz"
    on all "
        set -eu
        command -v gcsfuse >/dev/null || {
            echo 'gcsfuse is not on this host: see https://cloud.google.com/storage/docs/cloud-storage-fuse/install' >&2
            exit 2
        }
        mkdir -p ~/bucket ~/vlm_jax
        mountpoint -q ~/bucket || gcsfuse --implicit-dirs '$BUCKET' ~/bucket
        [ -x ~/venv/bin/pip ] || python3 -m venv ~/venv
        tar -xzf ~/bucket/vlm_jax.tar.gz -C ~/vlm_jax
        ~/venv/bin/pip install --quiet ~/vlm_jax'[tpu,gcs]'
    "
}

# JAX finds the other hosts of the slice itself. setsid: the processes outlive the connection.
train() {
    local arguments
    printf -v arguments ' %q' "$@"
    on all "
        JAX_COMPILATION_CACHE_DIR=~/bucket/compiled setsid nohup \
            ~/venv/bin/vlm-jax train$arguments >~/train.log 2>&1 </dev/null &
    "
}

log() {
    on 0 "tail -n 40 -f ~/train.log"
}

# One process that is told suffices: all of them save and stop at the same step.
stop() {
    # The brackets keep the pattern from matching the command that holds it.
    on 0 "pkill -TERM -f '[v]lm-jax train' && while pkill -0 -f '[v]lm-jax train'; do sleep 2; done"
}

delete() {
    gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
}

case "${1:-}" in
create | state | setup | train | log | stop | delete) "$@" ;;
*)
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
