#!/bin/sh
# The scratch variants of the published study on one GPU, in calls of under ten minutes: bench/gpu-study.sh OUT DATA
# DATA: {train,validation,test}.txt and tokenizer/ (tokenizer.json, or spiece.model where sentencepiece is installed).
# Exit status 75: time is over, call it again with the same OUT, it goes on; 0: all is in OUT/study.json.
# Further arguments go to bench/gpu_study.py (--minutes, --backend, --precision, --modes, …).
#
# Needs Python (PYTHON, default python3) with torch >= 2.11, transformers >= 5.17 and pydantic >= 2. Where pydantic is
# missing and there is no network, carry its wheels: on a machine with the same Python
#     python3 -m pip download --dest wheels 'pydantic>=2.10'
# and here BWSK_WHEELS=wheels bench/gpu-study.sh …, which unpacks them into OUT/site once.
set -eu
[ $# -ge 2 ] || { echo "usage: bench/gpu-study.sh OUT DATA [arguments of bench/gpu_study.py]" >&2; exit 2; }
here=$(cd "$(dirname "$0")/.." && pwd)
out=$1
data=$2
shift 2
python=${PYTHON:-python3}
export CUBLAS_WORKSPACE_CONFIG=:4096:8 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTHONPATH="$here:$out/site${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${BWSK_WHEELS:-}" ] && [ ! -d "$out/site" ]; then
  "$python" -m pip install --quiet --no-index --find-links "$BWSK_WHEELS" --no-deps --target "$out/site" "$BWSK_WHEELS"/*.whl
fi
exec "$python" "$here/bench/gpu_study.py" "$out" --data "$data" "$@"
