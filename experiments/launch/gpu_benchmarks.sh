#!/usr/bin/env bash
# Every figure that needs a GPU, in one command, into experiments/results/benchmarks/gpu.md.
#
#   experiments/launch/gpu_benchmarks.sh DATA_DIR      # one GPU; about 30 minutes on an H200
#
# Run in the environment of:  pip install -e ".[torch]" && pip install "jax[cuda13]" &&
# pip install --no-deps -r configs/quickstart-data.txt. DATA_DIR has sst2/{train,validation}.parquet.
# A part that fails is noted, and the others still run.
set -uo pipefail
cd "$(dirname "$0")/../.."
if [ $# != 1 ]; then
  sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'
  exit 2
fi
unset JAX_COMPILATION_CACHE_DIR # compile times are among the figures
out="${OUT:-experiments/results/benchmarks}/gpu.md"
mkdir -p "$(dirname "$out")"
echo "# GPU, $(date +%F)" >"$out"
errors="$(mktemp)"
trap 'rm -f "$errors"' EXIT

part() {
  printf '\n`python -m experiments.benchmarks.%s`\n\n' "$*" >>"$out"
  # shellcheck disable=SC2068 # the words of a command line
  python -m experiments.benchmarks.$@ 2>"$errors" >>"$out" ||
    echo "failed: $(tail -n 1 "$errors")" >>"$out"
}

part train_step --shape=bert-base --dtype=bfloat16 --size=16x128 --size=32x256
part sweep --shape=bert-base --dtype=bfloat16 --size=16x128
part paper_cell --data_dir="$1" --dtype=bfloat16
part attention --dtype=bfloat16
part train_step --shape=bert-large --shape=deberta-base --dtype=bfloat16 --size=16x128 --size=32x256
part train_step --shape=bert-base --size=16x128
part memory
cat "$out"
