#!/usr/bin/env bash
# Every figure that needs a GPU, in one command, into experiments/results/benchmarks/gpu.md.
#
#   experiments/launch/gpu_benchmarks.sh DATA_DIR            # one GPU; about 30 minutes on an H200
#   experiments/launch/gpu_benchmarks.sh DATA_DIR step cell  # these parts only, added to the file
#
# Parts: step, sweep, cell, attention, large, float32, memory. Run in the environment of:
# pip install -e ".[torch]" && pip install "jax[cuda13]" &&
# pip install --no-deps -r configs/quickstart-data.txt. DATA_DIR has sst2/{train,validation}.parquet.
# A part that fails, or takes more than PART_SECONDS (1800), is noted, and the others still run; the
# exit status is then 1. OUT is another folder for the file.
set -uo pipefail
usage() {
  sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'
  exit 2
}
[ $# -ge 1 ] || usage
data="$(realpath -e "$1")" || exit 2
out="$(realpath -m "${OUT:-$(dirname "$0")/../results/benchmarks}")/gpu.md"
shift
chosen=("$@")
[ $# -gt 0 ] || chosen=(step sweep cell attention large float32 memory)
python="$(command -v python || command -v python3)"

words() { # the benchmark of a part, one word a line
  case "$1" in
  step) printf '%s\n' train_step --shape=bert-base --dtype=bfloat16 --size=16x128 --size=32x256 ;;
  sweep) printf '%s\n' sweep --shape=bert-base --dtype=bfloat16 --size=16x128 ;;
  cell) printf '%s\n' paper_cell "--data_dir=$data" --dtype=bfloat16 ;;
  attention) printf '%s\n' attention --dtype=bfloat16 ;;
  large)
    printf '%s\n' train_step --shape=bert-large --shape=deberta-base --dtype=bfloat16 \
      --size=16x128 --size=32x256
    ;;
  float32) printf '%s\n' train_step --shape=bert-base --size=16x128 ;;
  memory) printf '%s\n' memory ;;
  *) return 1 ;;
  esac
}

for part in "${chosen[@]}"; do
  words "$part" >/dev/null || usage
done
cd "$(dirname "$0")/../.." || exit 2
unset JAX_COMPILATION_CACHE_DIR # compile times are among the figures
mkdir -p "$(dirname "$out")"
[ $# -gt 0 ] && [ -e "$out" ] || : >"$out"
echo "# GPU, $(date +%F)" >>"$out"
errors="$(mktemp)"
trap 'rm -f "$errors"' EXIT
status=0
for part in "${chosen[@]}"; do
  mapfile -t line < <(words "$part")
  printf '\n`python -m experiments.benchmarks.%s`\n\n' "${line[*]/$data/DATA_DIR}" >>"$out"
  timeout "${PART_SECONDS:-1800}" "$python" -m "experiments.benchmarks.${line[0]}" \
    "${line[@]:1}" >>"$out" 2>"$errors"
  ended=$?
  if [ $ended != 0 ]; then
    echo "failed with status $ended: $(tail -n 1 "$errors")" >>"$out"
    status=1
  fi
done
cat "$out"
exit $status
