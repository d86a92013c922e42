#!/usr/bin/env bash
# Runs a grid on several machines: start this script on each, on the head first.
#
#   experiments/launch/ray_grid.sh head --model=bert-base --output=DIR --workdir=DIR
#   experiments/launch/ray_grid.sh worker HEAD:6379
#   srun --ntasks-per-node=1 experiments/launch/ray_grid.sh slurm --model=bert-base ...
#
# All machines must see the checkout, its Python environment (pip install -e '.[cluster]', and jax
# for the accelerator, such as "jax[cuda13]" or "jax[tpu]"), --output, --workdir and the data under
# the same paths. Ray finds GPUs and TPU chips by itself. `slurm` needs an allocation of whole nodes:
# sbatch --nodes=4 --exclusive. RAY_PORT is the port of the head (default 6379), and RAY_WAIT the
# seconds that the head waits for other machines before it starts the grid.
set -euo pipefail
cd "$(dirname "$0")/../.."
export RAY_USAGE_STATS_ENABLED=0 HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-0}"
port="${RAY_PORT:-6379}"

usage() {
  sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'
  exit 2
}

# Newer versions of Ray require a token, ~/.ray/auth_token, which must be the same on all machines.
token() {
  if [ -z "${RAY_AUTH_MODE:-}" ] && ray get-auth-token --help >/dev/null 2>&1; then
    export RAY_AUTH_MODE=token
    [ "$1" = worker ] || ray get-auth-token --generate >/dev/null
  fi
}

start_head() {
  token head
  ray start --head --port="$port" --include-dashboard=false
  trap 'ray stop >/dev/null' EXIT
  sleep "${RAY_WAIT:-0}" # machines that join later are used too
  python -m experiments.grid --engine=ray --address="127.0.0.1:$port" "$@"
}

start_worker() {
  token worker
  exec ray start --address="$1" --block # until the head stops
}

case "${1:-}" in
  head) shift && start_head "$@" ;;
  worker)
    [ $# = 2 ] || usage
    start_worker "$2"
    ;;
  slurm)
    shift
    first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"
    if [ "$SLURM_NODEID" = 0 ]; then
      RAY_WAIT="${RAY_WAIT:-60}" start_head "$@"
    else
      sleep 20 # until the head has started
      (start_worker "$first:$port") || true # it fails when the head stops
    fi
    ;;
  *) usage ;;
esac
