#!/usr/bin/env bash
# Trains on one machine with several GPUs: one process distributes replicas and rows over them.
#
#   experiments/launch/gpu_box.sh --config=configs/glue.py:sst2 --workdir=runs/sst2 \
#       --config.seeds=0,1,2 --config.learning_rates=1e-5,2e-5,3e-5,5e-5,1e-4 --config.dtype=bfloat16
#
# Needs: pip install -e . && pip install "jax[cuda13]"
# GPUS=0,2 uses only these GPUs. Replicas (seeds x learning rates) are distributed first, and then
# the rows of a batch. All GPUs are used if the number of replicas, or batch_size, is a multiple of
# their number.
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ $# = 0 ]; then
  sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'
  exit 2
fi
[ -z "${GPUS:-}" ] || export CUDA_VISIBLE_DEVICES="$GPUS"
python - <<'PY'
import sys

import jax

if jax.default_backend() != "gpu":
    print(f"error: jax finds no GPU, only {jax.devices()}: install jax[cuda13]", file=sys.stderr)
    sys.exit(2)
print(f"{len(jax.devices())} x {jax.devices()[0].device_kind}")
PY
exec python -m sweet_jax.main "$@"
