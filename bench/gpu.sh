#!/bin/sh
# Check and measure on one GPU within ten minutes: bench/gpu.sh OUT
# Needs Python (PYTHON, default python3) with torch >= 2.11 and transformers >= 5.17, nothing else; no network.
# First correctness (OUT/correctness-cuda.json): graph against eager, reversible against conventional, the float16 scaler,
# deterministic mode. A failed check ends the script with status 1 before anything is timed. Then the table of
# bench/run.py (OUT/step-cuda.json), which starts no further pair of rivals after BWSK_BENCH_SECONDS (default 380).
# BWSK_DEVICE=cpu runs the same on the CPU, without what needs CUDA; further arguments go to bench/run.py.
set -eu
[ $# -ge 1 ] || { echo "usage: bench/gpu.sh OUT [arguments of bench/run.py]" >&2; exit 2; }
here=$(cd "$(dirname "$0")/.." && pwd)
out=$1
shift
python=${PYTHON:-python3}
device=${BWSK_DEVICE:-cuda}
export CUBLAS_WORKSPACE_CONFIG=:4096:8 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="$here"
"$python" "$here/bench/gpu.py" "$out" --device "$device"
# What cannot be imported is left out by name: the Trainer needs accelerate, compiling needs triton or a compiler.
"$python" "$here/bench/run.py" "$out" --device "$device" --seconds "${BWSK_BENCH_SECONDS:-380}" "$@"
