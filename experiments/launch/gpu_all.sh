#!/usr/bin/env bash
# Runs all benchmarks that need a GPU, and appends the result of each to OUT/gpu.md as it ends.
#
#   experiments/launch/gpu_all.sh DATA_DIR CHECKPOINT             # all parts
#   experiments/launch/gpu_all.sh DATA_DIR CHECKPOINT step cell   # only these, appended to the file
#
# DATA_DIR has <task>/{train,validation}.parquet of GLUE's sst2 and mrpc. CHECKPOINT is the folder of
# a base-size encoder, such as the one that `python -m experiments.mpnet_checkpoint` prints. Nothing
# is downloaded. The parts, in their order:
#   step       a training step of BERT-base compared with torch, eager and compiled
#   sweep      15 replicas in one program compared with one after another
#   attention  cuDNN's attention compared with this project's
#   cell       the paper's SST-2 cell, SWEET, 5 learning rates x 3 seeds, as one command
#   inference  the model of that cell with batches of 1, 8, 64 and 256, with and without pooling
#   panel      SST-2 and MRPC, every method, 5 seeds x 2 rates, two jobs at a time: OUT/panel
#   memory     temporaries of a training step of SWEET and Early-Exit; only if it is named
#
# Most of the time is spent compiling: a program of BERT-base took 55 seconds on an H100 machine with
# 16 cores (jax 0.11.2). There, `step` takes four minutes for its first size and two for each other
# one, and `sweep` three. `cell` had trained after 140 seconds and had not ended after 280.
#
# Needs: pip install -e ".[torch]" && pip install "jax[cuda13]".
#
# Environment variables: OUT is the folder of the results (default experiments/results/benchmarks).
# PART_SECONDS limits each benchmark (default 600); one that fails or takes longer is noted, the
# others still run, and the exit status is then 1. SCRATCH is a folder for runs (default a temporary
# one; /dev/shm is fast). TINY=1 tries the script out on tiny shapes, without a GPU.
set -uo pipefail
usage() {
  sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'
  exit 2
}
[ $# -ge 2 ] || usage
data="$(realpath -e "$1")" && checkpoint="$(realpath -e "$2")" || exit 2
out="$(realpath -m "${OUT:-$(dirname "$0")/../results/benchmarks}")"
shift 2
chosen=("$@")
[ $# -gt 0 ] || chosen=(step sweep attention cell inference panel)
python="$(command -v python || command -v python3)"
scratch="$(mktemp -d -p "${SCRATCH:-${TMPDIR:-/tmp}}")"
trap 'rm -rf "$scratch"' EXIT
cell="$scratch/cell" # the part inference uses its model
export JAX_COMPILATION_CACHE_MAX_SIZE=-1

step=(train_step --shape=bert-base --method=sweet)
sweep=(sweep --shape=bert-base --dtype=bfloat16 --size=16x128)
panel=(--seeds=0,1,2,3,4 --learning_rates=2e-5,5e-5 --set=dtype=bfloat16)
trained=(--dtype=bfloat16)
pools=()
if [ -n "${TINY:-}" ]; then
  step=(train_step --shape=tiny --method=sweet --rounds=1 --steps=1 --no_compile)
  sweep=(sweep --shape=tiny --size=2x8 --replicas=2 --rounds=1 --steps=1)
  trained=(--shape=tiny --rows=60 --seeds=1 --learning_rates=1e-3 --max_length=16)
  pools=(--batch=1 --batch=8 --batches=2 --rounds=1)
  panel=(--seeds=0 --learning_rates=1e-3 --exits=1,2 --train_size=60 --max_length=16)
fi

commands() { # prints the benchmarks of a part, one per line
  local large=--size=32x256
  [ -z "${TINY:-}" ] || large=--size=2x12
  local small=${large/256/128}
  case "$1" in
  step)
    echo "${step[*]} --dtype=bfloat16 $small $large"
    echo "${step[*]} --dtype=float32 $small"
    ;;
  sweep) echo "${sweep[*]}" ;;
  attention) echo attention --dtype=bfloat16 ;;
  cell) echo "paper_cell --data_dir=DATA_DIR --checkpoint=CHECKPOINT --keep=CELL ${trained[*]}" ;;
  inference) echo "pools --model=CELL/model --data_dir=DATA_DIR --dtype=bfloat16 ${pools[*]}" ;;
  memory) echo memory ;;
  *) return 1 ;;
  esac
}

fill() { # prints a command with paths in place of DATA_DIR, CHECKPOINT and CELL
  local line="${1//DATA_DIR/$data}"
  line="${line//CHECKPOINT/$checkpoint}"
  echo "${line//CELL/$cell}"
}

measure() { # runs one benchmark, and appends its output to the file
  local words errors ended
  read -ra words < <(fill "$1")
  errors="$(mktemp -p "$scratch")"
  printf '\n`python -m experiments.benchmarks.%s`\n\n' "$1" >>"$out/gpu.md"
  timeout "${PART_SECONDS:-600}" "$python" -m "experiments.benchmarks.${words[0]}" \
    "${words[@]:1}" >>"$out/gpu.md" 2>"$errors"
  ended=$?
  [ $ended = 0 ] && return
  echo "failed with status $ended: $(tail -n 1 "$errors")" >>"$out/gpu.md"
  return 1
}

panel_job() { # runs one task and method of the panel: TASK METHOD OPTION...
  timeout "${PART_SECONDS:-600}" "$python" -m experiments.grid --model=mpnet-base "${@:3}" \
    --checkpoint="$checkpoint" --data_dir="$data" --tasks="$1" --methods="$2" \
    --workdir="$scratch/$1-$2" --output="$scratch/scores/$1-$2" >"$scratch/$1-$2.log" 2>&1
  local ended=$?
  mkdir -p "$out/panel"
  cp -r "$scratch/$1-$2/outputs/." "$out/panel/" 2>/dev/null
  [ $ended = 0 ] && echo "$1 $2: done after $SECONDS s" >>"$out/gpu.md" && return
  echo "$1 $2: failed with status $ended: $(tail -n 1 "$scratch/$1-$2.log")" >>"$out/gpu.md"
  return 1
}

run_panel() {
  printf '\nThe panel, two jobs at a time: `python -m experiments.grid --model=mpnet-base %s`\n\n' \
    "${panel[*]}" >>"$out/gpu.md"
  export -f panel_job
  export out data checkpoint scratch python JAX_COMPILATION_CACHE_DIR="$scratch/xla"
  export XLA_PYTHON_CLIENT_MEM_FRACTION=0.46
  for task in sst2 mrpc; do
    for method in sweet early_exit multi_model; do echo "$task $method"; done
  done | xargs -P 2 -L 1 bash -c 'panel_job "${@: -2}" "${@:1:$(($# - 2))}"' panel "${panel[@]}"
}

for part in "${chosen[@]}"; do
  [ "$part" = panel ] || commands "$part" >/dev/null || usage
done
cd "$(dirname "$0")/../.." || exit 2
unset JAX_COMPILATION_CACHE_DIR # compile times are measured too
mkdir -p "$out"
[ $# -gt 0 ] && [ -e "$out/gpu.md" ] || : >"$out/gpu.md"
echo "# GPU, $(date +%F)" >>"$out/gpu.md"
status=0
for part in "${chosen[@]}"; do
  if [ "$part" = panel ]; then
    run_panel || status=1
    continue
  fi
  # Only in the part step, torch shares the device with JAX.
  [ "$part" = step ] || export XLA_PYTHON_CLIENT_MEM_FRACTION=0.9
  while read -r line; do measure "$line" || status=1; done < <(commands "$part")
done
cat "$out/gpu.md"
exit $status
