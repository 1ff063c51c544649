#!/bin/sh
# Check and measure on one GPU within ten minutes: bench/gpu.sh OUT
# Needs Python (PYTHON, default python3) with torch >= 2.11 and transformers >= 5.17, nothing else; no network.
# First correctness (OUT/correctness-cuda.json): graph against eager, reversible against conventional, an interrupted run
# against a whole one, the float16 scaler, deterministic mode. Then the table of bench/run.py (OUT/step-cuda.json), in what
# is left of BWSK_SECONDS (default 570). Both files are written as things are measured. A failed check does not keep the
# rest from being measured, but the exit status is then 1. Called again with the same OUT it goes on with what is missing.
# BWSK_DEVICE=cpu runs the same on the CPU, without what needs CUDA; further arguments go to bench/run.py.
set -eu
[ $# -ge 1 ] || { echo "usage: bench/gpu.sh OUT [arguments of bench/run.py]" >&2; exit 2; }
began=$(date +%s)
here=$(cd "$(dirname "$0")/.." && pwd)
out=$1
shift
python=${PYTHON:-python3}
device=${BWSK_DEVICE:-cuda}
whole=${BWSK_SECONDS:-570}
export CUBLAS_WORKSPACE_CONFIG=:4096:8 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="$here"
status=0
"$python" "$here/bench/gpu.py" "$out" --device "$device" --resume --seconds $((whole / 2)) || status=1
# What cannot be imported is left out by name: the Trainer needs accelerate, compiling needs triton or a compiler.
left=$((whole - $(date +%s) + began))
"$python" "$here/bench/run.py" "$out" --device "$device" --resume --seconds "$left" "$@" || status=1
exit "$status"
