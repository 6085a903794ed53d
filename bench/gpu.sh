#!/usr/bin/env bash
# Everything that only a GPU can show: bash bench/gpu.sh [PART[=SECONDS][+PART[=SECONDS] ...] ...]; all parts by default.
#
# Runs with the interpreter at hand (PYTHON=python3), without network or virtual environment, and builds the extension
# first (the part `build`, which may be named to run it beside another). Parts joined by + run side by side: only where
# their times do not matter. Each part ends within its SECONDS (470) by itself and says what it left out. Results go to
# $OUT (bench/results), what a part printed to $OUT/log_PART.txt, its last lines to the screen. KERNELS, SWEEP, STEP,
# PROFILE, STAGES, E2E, SPEED, TRAIN and QUALITY are further options of these parts' commands.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results}
ALL=(build tests kernels sweep kv step profile stages e2e speed quality)
LIMIT=470
# Until the package is installed, and where it cannot be: it alone, since kernels/ would hide another package.
alone=$(mktemp -d)
trap 'rm -rf "$alone"' EXIT
trap 'kill $(descendants $$) 2> /dev/null; exit 130' INT TERM
ln -s "$PWD/trsp_fast" "$alone/trsp_fast"
export PYTHONPATH=$alone${PYTHONPATH:+:$PYTHONPATH}

# Parts run in the background, where Ctrl-C does not reach them.
descendants() {
    local child
    for child in $(pgrep -P "$1"); do
        descendants "$child"
        echo "$child"
    done
}

# What is left of a part's limit, in $left; fails where that is too little to begin anything.
time_left() {
    left=$(($1 - SECONDS))
    [ $left -ge 5 ] || { echo "no time is left for $2"; return 124; }
}

# -P: not the repository root on sys.path, where the folder kernels/ would hide another package of that name.
install() {
    time_left "$1" "the build" && timeout $left "$PYTHON" -P -m pip install --quiet --no-build-isolation --no-deps --disable-pip-version-check --editable .
}

part_build() {
    if [ -z "${CUDA_HOME:-}" ] && command -v nvcc > /dev/null; then
        export CUDA_HOME
        CUDA_HOME=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")
    fi
    install "$1" && return
    echo "gpu.sh: no build with the CUDA kernel (messages above); trying without it"
    TRSP_FAST_CUDA=0 install "$1" && return
    echo "gpu.sh: no extension could be built (messages above); going on without it, the CPU kernels are not tested"
    TRSP_FAST_NO_EXTENSIONS=1 install "$1" && return
    echo "gpu.sh: nor can the package be installed; using the source tree"
}

name_gpu() {
    "$PYTHON" -P -c 'import re, sys, torch
if not torch.cuda.is_available(): sys.exit("gpu.sh: no CUDA GPU is visible to torch " + torch.__version__ + ".")
print(re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower().replace("nvidia", "")).strip("_"))'
}

# The ops first, slow ones too; the rest of the suite in the time that is left.
part_tests() {
    local status=0 pytest=("$PYTHON" -P -m pytest -v -rfE -p no:cacheprovider --tb=short -W ignore)
    "$PYTHON" -c 'import xdist' 2> /dev/null && pytest+=(-n 8 --dist worksteal)
    export OMP_NUM_THREADS=1
    timeout "$1" "${pytest[@]}" tests/ops tests/models/test_kv_cache.py || status=$?
    time_left "$1" "the rest of the suite" || return
    timeout $left "${pytest[@]}" tests --ignore tests/ops --ignore tests/models/test_kv_cache.py -m "not slow" || status=$?
    return $status
}

part_kernels() {
    timeout "$1" "$PYTHON" bench/bench_gated_residual.py --device cuda --seconds 0.2 --budget $(($1 - 10)) ${KERNELS:-} \
        --json "$OUT/kernels_$gpu.json"
}

part_sweep() {
    timeout "$1" "$PYTHON" bench/sweep_kernels.py --seconds 0.5 ${SWEEP:-} --json "$OUT/sweep_kernels_$gpu.json"
}

part_kv() {
    timeout "$1" "$PYTHON" bench/bench_kv_cache.py --device cuda --json "$OUT/kv_cache_$gpu.json"
}

# Two pairs of 1B, then of 7B, whose plain port needs more than 108 GB: a GPU with less says so and measures ours.
part_step() {
    timeout "$1" "$PYTHON" bench/bench_step.py --device cuda --shapes 1B,7B --pairs 2 ${STEP:-} \
        --json "$OUT/step_$gpu.json"
}

# Where the time of a step of 7B goes.
part_profile() {
    timeout "$1" "$PYTHON" bench/bench_step.py --device cuda --shapes 7B --samples 16 --profile ${PROFILE:-}
}

# What choosing and training take beside training on the language modelling loss.
part_stages() {
    timeout "$1" "$PYTHON" bench/bench_stages.py --device cuda --shape 1B ${STAGES:-} --json "$OUT/stages_$gpu.json"
}

# From a 7B in memory to the checkpoint; all weights in stage 2 need 108 GB, so a smaller GPU trains the neighbours.
part_e2e() {
    local few=()
    "$PYTHON" -P -c 'import sys, torch; sys.exit(torch.cuda.get_device_properties(0).total_memory < 130e9)' ||
        few=(--set transfer.trainable=neighbours)
    timeout "$1" "$PYTHON" bench/bench_e2e.py --device cuda --shape 7B "${few[@]}" ${E2E:-} --json "$OUT/e2e_$gpu.json"
}

# The paper's table 2, dense and without 25% and 50% of the layers: random weights, so nothing is fetched. 26 GB of
# weights in bf16, shared by the three, and up to 14 GB of KV cache.
part_speed() {
    local shape shapes=() status=0
    for shape in ${SPEED_SHAPES:-opt-13b llama2-13b}; do
        time_left "$1" "$shape" || { status=124; break; }
        if timeout $left "$PYTHON" -P -m trsp_fast speed --device cuda --shape "$shape" --ratio 0.25,0.5 \
            ${SPEED:-} --json > "$OUT/.speed_$shape.json"; then
            shapes+=("$OUT/.speed_$shape.json")
        else
            status=$?
            echo "speed: $shape ended with $status (124: the time was over); it is left out"
        fi
    done
    [ ${#shapes[@]} -gt 0 ] || return $status
    "$PYTHON" -P -c 'import json, sys
runs = [json.load(open(name)) for name in sys.argv[2:]]
open(sys.argv[1], "w").write(json.dumps({"runs": runs}, indent=1) + "\n")
for run in runs:
    for one in run["models"]:
        fast = *((name, g["times_first"]) for name, g in one["generation"].items()), ("latency", one["latency"]["times_first"])
        print(one["model"] + ": times the first: " + ", ".join(f"{name} {times:.2f}" for name, times in fast))
' "$OUT/speed_$gpu.json" "${shapes[@]}"
    rm -f "$OUT"/.speed_*.json
    return $status
}

# A Llama of 27 M parameters and 16 layers, trained here on as many passes over its text as the demo model, then the core
# arms of the comparison, some side by side; what is not finished in time is left out.
part_quality() {
    local model="${TMPDIR:-/tmp}/trsp_fast_l16"
    [ -d "$model" ] || timeout "$1" "$PYTHON" examples/train_small_model.py --family llama --layers 16 --width 384 \
        --batch 64 --steps 1000 --out "$model" ${TRAIN:-} || return
    time_left "$1" "the comparison" || return
    timeout $left "$PYTHON" bench/compare_all.py --subjects "" --model "llama-16=$model" --arms core \
        --seeds 0,1,2,3,4 --ratio 0.125,0.25,0.375,0.5 --jobs 5 --budget $((left > 60 ? left - 30 : left / 2)) --suffix "_$gpu" ${QUALITY:-} || return
    [ bench/results -ef "$OUT" ] || cp bench/results/compare_llama-16_*"$gpu"*.json "$OUT"
}

# One part with its limit, its output in its own file.
run_part() {
    local part=${1%%=*} limit=$LIMIT status=0
    [[ $1 == *=* ]] && limit=${1#*=}
    SECONDS=0
    "part_$part" "$limit" > "$OUT/log_$part.txt" 2>&1 || status=$?
    echo "=== $part: $SECONDS s, ended with $status$([ $status -eq 124 ] && echo ": stopped, what was measured is kept") ==="
    tail -n "${LINES_SHOWN:-30}" "$OUT/log_$part.txt" | cut -c 1-200
    return $status
}

groups=("$@")
[ ${#groups[@]} -eq 0 ] && groups=("${ALL[@]}")
for group in "${groups[@]}"; do
    for part in ${group//+/ }; do
        [[ " ${ALL[*]} " == *" ${part%%=*} "* && $part =~ ^[a-z0-9]+(=[0-9]+)?$ ]] ||
            { echo "gpu.sh: no part '$part'; choose of: ${ALL[*]}" >&2; exit 2; }
    done
done
mkdir -p "$OUT"
gpu=$(name_gpu) || exit 1
[[ " ${groups[*]//[=+]/ } " == *" build "* ]] || groups=(build "${groups[@]}")
failed=()
for group in "${groups[@]}"; do
    running=()
    for part in ${group//+/ }; do
        run_part "$part" &
        running+=("$!:${part%%=*}")
    done
    for one in "${running[@]}"; do
        wait "${one%%:*}" || failed+=("${one#*:}")
    done
done
[ ${#failed[@]} -eq 0 ] || { echo "gpu.sh: failed: ${failed[*]}" >&2; exit 1; }
