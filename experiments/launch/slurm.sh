#!/usr/bin/env bash
# One run on several nodes of a Slurm cluster, a process for each GPU.
#
#   sbatch --nodes=2 --gpus-per-node=4 --ntasks-per-node=4 --cpus-per-task=8 --time=2:00:00 \
#       experiments/launch/slurm.sh --config=configs/glue.py:sst2 --workdir=/shared/runs/sst2 \
#       --config.batch_size=32 --config.dtype=bfloat16
#
# The checkout, its Python environment (pip install -e . && pip install "jax[cuda13]", activated where
# sbatch is called), --workdir and the data lie on storage that all nodes mount. The processes find
# each other by Slurm's variables. A job that is ended by its time limit saves its state first
# (SIGTERM comes 120 seconds before), is put back into the queue, and goes on from there: leave
# --output as it is here, where the end of a job is read off.
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
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # which srun does not take from sbatch
cd "$SLURM_SUBMIT_DIR" # sbatch runs a copy of this file
log="$SLURM_JOB_NAME-$SLURM_JOB_ID.log"
before="$(stat -c %s "$log" 2>/dev/null || echo 0)" # what earlier starts of this job wrote
status=0
# A task that is lost ends the step; tasks that were asked to stop save first.
srun --kill-on-bad-exit=1 --label python -m sweet_jax.main "$@" || status=$?
stopped() { tail -c "+$((before + 1))" "$log" | grep "stopped by SIGTERM" >/dev/null; }
# 143 = 128 + SIGTERM: a single task saves its state in the training loop only; elsewhere it just ends.
if [ "$status" = 143 ] || { [ "$status" != 0 ] && stopped; }; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
