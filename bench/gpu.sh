#!/usr/bin/env bash
# Everything that waits for a GPU, one after the other and unattended: bench/gpu.sh [OUT]
#
# Each step goes on where it was when this is started again, and a step that fails costs only itself. What is measured lands in bench/results/
# and goes into the README with `python tools/results_to_readme.py`. About two hours on one card; the headline comes first.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-build/gpu}
PYTHON=${PYTHON:-.venv/bin/python}
mkdir -p "$OUT"
failed=()

step() {
    local name=$1
    shift
    echo "== $name: $*"
    if "$@" > >(tee "$OUT/$name.log") 2>&1; then echo "== $name: done"; else failed+=("$name"); echo "== $name: failed, see $OUT/$name.log"; fi
}

suite() {
    [ -f "$OUT/$1/results.json" ] || step "$1" "$PYTHON" -m sdcompress bench "$1" -o "$OUT/$1"
    if [ -f "$OUT/$1/results.json" ]; then cp "$OUT/$1/results.json" "bench/results/$1-gpu.json"; fi
}

nvidia-smi || { echo "no NVIDIA GPU is here"; exit 1; }
suite sd15
step tests "$PYTHON" -m pytest -m gpu
step backends "$PYTHON" bench/studies/backends.py -o bench/results/backends-gpu.json --work "$OUT/backends" --device cuda
step webui "$PYTHON" bench/studies/webui_overhead.py -o bench/results/webui-overhead-gpu.json
step peers "$PYTHON" bench/peers/latency.py -o bench/results/peers-gpu.json --work "$OUT/peers" --model sd15 --device cuda
suite nano
suite sdxl
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
