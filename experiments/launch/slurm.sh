#!/usr/bin/env bash
# Trains one run on several nodes of a Slurm cluster, with a process for each GPU.
#
#   sbatch --nodes=2 --gpus-per-node=4 --ntasks-per-node=4 --cpus-per-task=8 --time=2:00:00 \
#       experiments/launch/slurm.sh --config=configs/glue.py:sst2 --workdir=/shared/runs/sst2 \
#       --config.batch_size=32 --config.dtype=bfloat16
#
# All nodes must see the checkout, its Python environment (pip install -e . && pip install
# "jax[cuda13]", activated where sbatch is called), --workdir and the data under the same paths. The
# processes find each other by Slurm's variables. 120 seconds before its time limit, a job gets
# SIGTERM, saves its state and is requeued; it then resumes. Do not change --output, because this
# script reads the log to see how a job ended.
#SBATCH --job-name=sweet_jax
#SBATCH --output=%x-%j.log
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
if [ $# = 0 ] || [ -z "${SLURM_JOB_ID:-}" ]; then
  sed -n '2,/^#SBATCH/p' "$0" | sed '$d; s/^# \{0,1\}//'
  exit 2
fi
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun does not inherit it from sbatch
cd "$SLURM_SUBMIT_DIR" # sbatch runs a copy of this file
log="$SLURM_JOB_NAME-$SLURM_JOB_ID.log"
before="$(stat -c %s "$log" 2>/dev/null || echo 0)" # written by earlier starts of this job
status=0
# A task that is lost ends the step; tasks that get SIGTERM save their state first.
srun --kill-on-bad-exit=1 --label python -m sweet_jax.main "$@" || status=$?
stopped() { tail -c "+$((before + 1))" "$log" | grep "stopped by SIGTERM" >/dev/null; }
# 143 = 128 + SIGTERM: outside the training loop, a single task ends without saving its state.
if [ "$status" = 143 ] || { [ "$status" != 0 ] && stopped; }; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
