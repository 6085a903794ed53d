#!/usr/bin/env bash
# Everything that only a GPU can show: bash bench/gpu.sh [tests] [kernels] [sweep]; all parts by default.
#
# Runs with the interpreter at hand (PYTHON=python3), without network or virtual environment, and builds the extension
# first. Each part ends within 8 minutes by itself and says what it left out. Results go to $OUT (bench/results).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results}
ALL=(tests kernels sweep)
LIMIT=470

build() {
    # -P: not the repository root on sys.path, where the folder kernels/ would hide another package of that name.
    "$PYTHON" -P -m pip install --quiet --no-build-isolation --no-deps --disable-pip-version-check --editable . ||
        { echo "gpu.sh: trsp_fast could not be built with $("$PYTHON" --version); the messages are above." >&2; exit 1; }
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
    timeout $LIMIT "${pytest[@]}" tests/ops > "$log" 2>&1 || status=$?
    if [ $status -ne 124 ]; then
        timeout $((LIMIT - SECONDS)) "${pytest[@]}" tests --ignore tests/ops -m "not slow" >> "$log" 2>&1 || status=$?
    fi
    grep -E "^(FAILED|ERROR|SKIPPED)|passed|failed" "$log"
    [ $status -eq 124 ] && echo "tests: stopped after $LIMIT s, what came later was not run"
    return $status
}

part_kernels() {
    "$PYTHON" bench/bench_gated_residual.py --device cuda --seconds 0.3 --budget 440 --json "$OUT/kernels_$gpu.json"
}

part_sweep() {
    timeout $LIMIT "$PYTHON" bench/sweep_kernels.py --seconds 0.5 --json "$OUT/sweep_kernels_$gpu.json" ||
        { status=$?; [ $status -eq 124 ] && echo "sweep: stopped after $LIMIT s; what was measured is in the file"; return $status; }
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
