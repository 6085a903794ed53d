#!/usr/bin/env bash
# Everything that only a GPU can show: bash bench/gpu.sh [tests] [kernels] [sweep] [kv] [step] [e2e] [speed] [quality]; all parts by
# default.
#
# Runs with the interpreter at hand (PYTHON=python3), without network or virtual environment, and builds the extension
# first. Each part ends within 8 minutes by itself and says what it left out. Results go to $OUT (bench/results).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results}
ALL=(tests kernels sweep kv step e2e speed quality)
LIMIT=470

# -P: not the repository root on sys.path, where the folder kernels/ would hide another package of that name.
install() {
    "$PYTHON" -P -m pip install --quiet --no-build-isolation --no-deps --disable-pip-version-check --editable .
}

build() {
    if [ -z "${CUDA_HOME:-}" ] && command -v nvcc > /dev/null; then
        export CUDA_HOME
        CUDA_HOME=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")
    fi
    install && return
    echo "gpu.sh: no build with the CUDA kernel (messages above); trying without it" >&2
    TRSP_FAST_CUDA=0 install && return
    echo "gpu.sh: no extension could be built (messages above); going on without it, the CPU kernels are not tested" >&2
    TRSP_FAST_NO_EXTENSIONS=1 install && return
    echo "gpu.sh: nor can the package be installed; using the source tree" >&2
    export PYTHONPATH=$PWD
}

name_gpu() {
    "$PYTHON" -P -c 'import re, sys, torch
if not torch.cuda.is_available(): sys.exit("gpu.sh: no CUDA GPU is visible to torch " + torch.__version__ + ".")
print(re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower().replace("nvidia", "")).strip("_"))'
}

# The ops first, slow ones too; the rest of the suite in the time that is left.
part_tests() {
    local log="$OUT/tests_$gpu.log" status=0
    local pytest=("$PYTHON" -P -m pytest -q -ra -p no:cacheprovider)
    timeout $LIMIT "${pytest[@]}" tests/ops tests/models/test_kv_cache.py > "$log" 2>&1 || status=$?
    if [ $status -ne 124 ] && [ $((LIMIT - SECONDS)) -gt 20 ]; then
        timeout $((LIMIT - SECONDS)) "${pytest[@]}" tests --ignore tests/ops --ignore tests/models/test_kv_cache.py -m "not slow" >> "$log" 2>&1 || status=$?
    fi
    grep -E "^(FAILED|ERROR|SKIPPED)|passed|failed" "$log"
    [ $status -eq 124 ] && echo "tests: stopped after $LIMIT s, what came later was not run"
    return $status
}

part_kernels() {
    timeout $LIMIT "$PYTHON" bench/bench_gated_residual.py --device cuda --seconds 0.2 --budget 400 \
        --json "$OUT/kernels_$gpu.json"
}

part_sweep() {
    timeout $LIMIT "$PYTHON" bench/sweep_kernels.py --seconds 0.5 --json "$OUT/sweep_kernels_$gpu.json" ||
        { status=$?; [ $status -eq 124 ] && echo "sweep: stopped after $LIMIT s; what was measured is in the file"; return $status; }
}

part_kv() {
    timeout $LIMIT "$PYTHON" bench/bench_kv_cache.py --device cuda --json "$OUT/kv_cache_$gpu.json"
}

# Two pairs of 1B, then of 7B, whose plain port needs more than 108 GB: a GPU with less says so and measures ours.
part_step() {
    timeout $LIMIT "$PYTHON" bench/bench_step.py --device cuda --shapes 1B,7B --pairs 2 --json "$OUT/step_$gpu.json" ||
        { status=$?; [ $status -eq 124 ] && echo "step: stopped after $LIMIT s; the shapes that were done are in the file"; return $status; }
}

# A Llama of 27 M parameters, trained here for a few minutes, then pruned in the core ways.
part_quality() {
    local model="${TMPDIR:-/tmp}/trsp_fast_l16"
    timeout $LIMIT "$PYTHON" examples/train_small_model.py --family llama --layers 16 --width 384 --batch 64 --steps 1500 \
        --out "$model" || return
    timeout $((LIMIT - SECONDS)) "$PYTHON" bench/compare_all.py --subjects "" --model "llama-16=$model" --arms core \
        --seeds 0,1,2 --ratio 0.25 --suffix "_$gpu" ||
        { status=$?; [ $status -eq 124 ] && echo "quality: stopped after $LIMIT s"; return $status; }
}

# From a 7B in memory to the checkpoint; all weights in stage 2 need 108 GB, so a smaller GPU trains the neighbours.
part_e2e() {
    local few=()
    "$PYTHON" -P -c 'import sys, torch; sys.exit(torch.cuda.get_device_properties(0).total_memory < 130e9)' ||
        few=(--set transfer.trainable=neighbours)
    timeout $LIMIT "$PYTHON" bench/bench_e2e.py --device cuda --shape 7B "${few[@]}" --json "$OUT/e2e_$gpu.json" ||
        { status=$?; [ $status -eq 124 ] && echo "e2e: stopped after $LIMIT s"; return $status; }
}

# The paper's table 2, dense and without 25% and 50% of the layers: random weights, so nothing is fetched. 26 GB of
# weights in bf16, shared by the three, and up to 14 GB of KV cache.
part_speed() {
    local shape shapes=() status=0
    for shape in opt-13b llama2-13b; do
        if timeout $((LIMIT / 2)) "$PYTHON" -P -m trsp_fast speed --device cuda --shape $shape --ratio 0.25,0.5 \
            --static-cache --json > "$OUT/.speed_$shape.json"; then
            shapes+=("$OUT/.speed_$shape.json")
        else
            status=$?
            echo "speed: $shape ended with $status (124: stopped after $((LIMIT / 2)) s); it is left out"
        fi
    done
    [ ${#shapes[@]} -gt 0 ] || return $status
    "$PYTHON" -P -c 'import json, sys
runs = [json.load(open(name)) for name in sys.argv[2:]]
open(sys.argv[1], "w").write(json.dumps({"runs": runs}, indent=1) + "\n")
for run in runs:
    for one in run["models"]:
        fast = one["generation"]["dynamic"]["times_first"], one["latency"]["times_first"]
        print(one["model"] + ": throughput {:.2f}, latency {:.2f} times the first".format(*fast))
' "$OUT/speed_gpu.json" "${shapes[@]}"
    rm -f "$OUT"/.speed_*.json
    return $status
}

parts=("$@")
[ ${#parts[@]} -eq 0 ] && parts=("${ALL[@]}")
for part in "${parts[@]}"; do
    [[ " ${ALL[*]} " == *" $part "* ]] ||
        { echo "gpu.sh: no part '$part'; choose of: ${ALL[*]}" >&2; exit 2; }
done
mkdir -p "$OUT"
gpu=$(name_gpu) || exit 1
build
failed=()
for part in "${parts[@]}"; do
    SECONDS=0
    echo "=== $part ==="
    "part_$part" || failed+=("$part")
    echo "=== $part: $SECONDS s ==="
done
[ ${#failed[@]} -eq 0 ] || { echo "gpu.sh: failed: ${failed[*]}" >&2; exit 1; }
