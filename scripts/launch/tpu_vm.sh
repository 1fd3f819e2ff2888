#!/usr/bin/env bash
# Trains on a Cloud TPU slice: a queued resource, one process on each of its hosts.
#
#   export NAME=vlm ZONE=us-west4-a SHARE=10.0.0.2:/share
#   bash scripts/launch/tpu_vm.sh create             # asks for the slice; state: tpu_vm.sh state
#   bash scripts/launch/tpu_vm.sh setup              # installs, mounts the share at ~/share if SHARE is set
#   bash scripts/launch/tpu_vm.sh train --config share/run.yaml --resume=auto
#   bash scripts/launch/tpu_vm.sh log                # of the first host; Ctrl-C leaves it running
#   bash scripts/launch/tpu_vm.sh stop               # saves a checkpoint, then ends
#   bash scripts/launch/tpu_vm.sh delete             # gives the slice back
#
# TYPE (v5litepod-16), RUNTIME (v2-alpha-tpuv5-lite) and SPOT (1; 0: on demand) may be set too. SHARE
# is an NFS share of data, base checkpoint and results; without it training.checkpoint_dir must be set.
# The hosts get what is committed in this checkout. docs/PODS.md goes through it from nothing.
set -euo pipefail

: "${NAME:?set NAME, what the slice is called}" "${ZONE:?set ZONE, as us-west4-a}"
SHARE=${SHARE:-}
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
    local archive
    archive=$(mktemp --suffix=.tar.gz)
    git -C "$(dirname "${BASH_SOURCE[0]}")/../.." archive --format=tar.gz HEAD >"$archive"
    gcloud compute tpus tpu-vm scp "$archive" "$NAME":vlm_jax.tar.gz --zone="$ZONE" --worker=all
    rm "$archive"
    # uv brings a Python that is new enough.
    on all "
        set -eu
        mkdir -p ~/share ~/vlm_jax
        if [ -n '$SHARE' ] && ! mountpoint -q ~/share; then
            command -v mount.nfs >/dev/null || sudo apt-get install -y -qq nfs-common
            sudo mount -t nfs '$SHARE' ~/share
        fi
        tar -xzf ~/vlm_jax.tar.gz -C ~/vlm_jax
        python3 -m pip install --quiet --user uv
        [ -x ~/venv/bin/python ] || python3 -m uv venv --quiet --python 3.12 ~/venv
        python3 -m uv pip install --quiet --python ~/venv/bin/python ~/vlm_jax'[tpu,gcs]'
    "
}

# JAX finds the other hosts of the slice itself. setsid: the processes outlive the connection.
train() {
    local arguments
    printf -v arguments ' %q' "$@"
    on all "
        JAX_COMPILATION_CACHE_DIR=~/share/compiled setsid nohup \
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
