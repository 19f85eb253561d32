#!/usr/bin/env bash
# Every table about an accelerator, in under 9 minutes, from a source tree without installation:
#
#     benchmarks/gpu.sh [OUT]                      results in OUT, by default benchmarks/results/gpu
#     MODEL=folder benchmarks/gpu.sh               with a model of your own as the last part
#     SMALL=--small benchmarks/gpu.sh /tmp/toys    toys, to see that all of it runs
#     PARTS="layers decode" benchmarks/gpu.sh      some parts
#
# A part that is over its time is ended and what it has is kept: run the script again and it goes on.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-$here/benchmarks/results/gpu}
export PYTHONPATH="$here/src${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}

declare -A seconds=([layers]=100 [blocks]=90 [decode]=90 [recipes]=130 [model]=120)
status=0
for part in ${PARTS:-layers blocks decode recipes model}; do
  timeout "${seconds[$part]}" "$python" "$here/benchmarks/gpu.py" "$part" "$out" ${SMALL:-} \
    ${MODEL:+--model "$MODEL"} || { status=$?; echo "$part: not done ($status); run it again" >&2; }
done
exit "$status"
