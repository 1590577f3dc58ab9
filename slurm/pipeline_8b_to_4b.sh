#!/usr/bin/env bash
# Submits the chain of a recipe as jobs that wait for each other, and prints their ids: slurm/pipeline_8b_to_4b.sh [WHICH] [key=value…]
#   WHICH     width (default), depth, 15b (Nemotron-4 15B → 8B), or a recipe's path; stages that are up to date are left out
#   NODES     of the stages that train (default: as in their scripts)
#   CLUSTER   what the site has (default: configs/cluster/gpus.yaml)
#   STAGES    these alone, in this order, where the login node has no Python: "import data importance prune distill"
#   SBATCH_ARGS  further options of sbatch, such as --time=04:00:00
# A stage that fails takes those behind it out of the queue. Run on the login node, in the checkout; nothing is computed there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=slurm/common.sh
. slurm/common.sh

recipe_of() {
  case $1 in
    width) echo configs/llama31_8b_to_4b_width.yaml ;;
    depth) echo configs/llama31_8b_to_4b_depth.yaml ;;
    15b) echo configs/nemotron4_15b_to_8b.yaml ;;
    *.yaml) echo "$1" ;;
    *) die "$1 is none of width, depth, 15b, nor a recipe (*.yaml)" ;;
  esac
}

jobs_module() {
  local python=python3
  [ -x .venv/bin/python ] && python=.venv/bin/python
  "${MINITRON_PYTHON:-$python}" -m minitron_megatron.jobs "$@"
}

# Prints the job's id.
submit() {
  local stage=$1 after=$2 options=(--parsable --kill-on-invalid-dep=yes --output="$LOGS/%x-%j.log")
  shift 2
  [ -n "$after" ] && options+=(--dependency=afterok:"$after")
  for name in partition account qos; do
    [ -n "${SITE[$name]:-}" ] && options+=("--$name=${SITE[$name]}")
  done
  case $stage in correct | distill | finetune) [ -n "${NODES:-}" ] && options+=(--nodes="$NODES") ;; esac
  # shellcheck disable=SC2086
  sbatch "${options[@]}" ${SBATCH_ARGS:-} "slurm/$stage.sh" "$@"
}

which=width
if [ $# -gt 0 ] && [[ $1 != *=* ]]; then
  which=$1
  shift
fi
recipe=$(recipe_of "$which")
export CLUSTER=${CLUSTER:-configs/cluster/gpus.yaml} LOGS=${LOGS:-$PWD/runs/slurm}
read_cluster "$CLUSTER"
mkdir -p "$LOGS"
stages=${STAGES:-$(jobs_module stages "$recipe" "$@")}
[ -n "$stages" ] || { echo "$recipe: everything is up to date"; exit 0; }
after='' submitted=()
for stage in $stages; do
  job=$(submit "$stage" "$after" "$recipe" "$@")
  after=${job%%;*} # of several clusters sbatch names the cluster behind a semicolon
  echo "$stage $after"
  submitted+=("$stage:$after")
done
[ -n "${STAGES:-}" ] || jobs_module queued "$recipe" "$@" "${submitted[@]}"
