#!/usr/bin/env bash
# One machine with several GPUs: one process, which spreads replicas and rows over all of them.
#
#   experiments/launch/gpu_box.sh --config=configs/glue.py:sst2 --workdir=runs/sst2 \
#       --config.seeds=0,1,2 --config.learning_rates=1e-5,2e-5,3e-5,5e-5,1e-4 --config.dtype=bfloat16
#
# Run in the Python environment of:  pip install -e . && pip install "jax[cuda13]"
# GPUS=0,2 takes some of them. Replicas (seeds x learning rates) are spread first, then the rows of
# a batch: a number of replicas, or a batch_size, that is a multiple of the GPUs uses all of them.
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ $# = 0 ]; then
  sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'
  exit 2
fi
[ -z "${GPUS:-}" ] || export CUDA_VISIBLE_DEVICES="$GPUS"
python - <<'PY'
import jax

assert jax.default_backend() == "gpu", f"jax sees no GPU here, only {jax.devices()}"
print(f"{len(jax.devices())} x {jax.devices()[0].device_kind}")
PY
exec python -m sweet_jax.main "$@"
