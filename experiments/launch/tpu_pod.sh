#!/usr/bin/env bash
# Trains one run on a Cloud TPU slice of several hosts, from your own machine by gcloud.
#
#   export TPU=my-slice ZONE=us-central2-b PROJECT=my-project
#   experiments/launch/tpu_pod.sh create v4-32            # creates the slice in about 5 minutes
#   experiments/launch/tpu_pod.sh install 10.0.0.2:/vol1  # this checkout and a share on every host
#   experiments/launch/tpu_pod.sh run --config=configs/glue.py:sst2 \
#       --workdir=/mnt/share/runs/sst2 --config.dtype=bfloat16 --config.batch_size=32
#   experiments/launch/tpu_pod.sh stop                    # saves the state, from which `run` resumes
#   experiments/launch/tpu_pod.sh delete
#
# All hosts write to one workdir, so it must be on a share: NFS, such as Filestore in the slice's
# network. A slice with a single host (v4-8, v5litepod-8) needs none: leave the argument out. Data
# and checkpoints that are not on the hub go to the share too. The processes find each other. If a
# host is lost, the others stop, and `run` resumes from the last checkpoint, on any number of hosts.
set -euo pipefail
cd "$(dirname "$0")/../.."

usage() {
  sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'
  exit 2
}

[ -n "${TPU:-}" ] && [ -n "${ZONE:-}" ] && [ -n "${PROJECT:-}" ] && [ $# -ge 1 ] || usage
vm=(gcloud compute tpus tpu-vm)
at=("$TPU" --zone="$ZONE" --project="$PROJECT")

everywhere() {
  "${vm[@]}" ssh "${at[@]}" --worker=all --command="$1"
}

install() {
  share="${1:-}"
  archive="$(mktemp)"
  trap 'rm -f "$archive"' EXIT
  git archive --format=tar.gz -o "$archive" HEAD
  "${vm[@]}" scp "$archive" "$TPU":sweet_jax.tar.gz --zone="$ZONE" --project="$PROJECT" --worker=all
  everywhere "set -e
    mkdir -p sweet_jax && tar -xzf sweet_jax.tar.gz -C sweet_jax
    python3 -m pip install -q --user uv # the image's own Python is too old
    ~/.local/bin/uv venv -q --clear --python=3.12 sweet_jax/.venv
    ~/.local/bin/uv pip install -q --python=sweet_jax/.venv/bin/python -e sweet_jax 'jax[tpu]'"
  [ -z "$share" ] || everywhere "set -e
    sudo apt-get -o DPkg::Lock::Timeout=300 install -y -q nfs-common
    sudo mkdir -p /mnt/share
    mountpoint -q /mnt/share || sudo mount -t nfs $share /mnt/share
    sudo chmod 777 /mnt/share"
}

case "$1" in
  create)
    [ $# = 2 ] || usage
    "${vm[@]}" create "${at[@]}" --accelerator-type="$2" --version="${RUNTIME:-tpu-ubuntu2204-base}"
    ;;
  install) shift && install "$@" ;;
  run)
    shift
    [ $# -ge 1 ] || usage
    everywhere "cd sweet_jax && exec .venv/bin/python -m sweet_jax.main $(printf '%q ' "$@")"
    ;;
  stop) everywhere "pkill -TERM -f '[s]weet_jax.main' || true" ;;
  delete) "${vm[@]}" delete "${at[@]}" --quiet ;;
  *) usage ;;
esac
