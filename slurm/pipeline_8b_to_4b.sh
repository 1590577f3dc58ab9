#!/usr/bin/env bash
# Submits the chain of a recipe as jobs that wait for each other, and prints their ids: slurm/pipeline_8b_to_4b.sh [WHICH] [key=value…]
#   WHICH     width (default), depth, 15b (Nemotron-4 15B → 8B), or a recipe's path; stages that are up to date are left out
#   NODES     of the stages that train (default: the cluster file's, else as in their scripts)
#   CLUSTER   what the site has (default: configs/cluster/gpus.yaml)
#   STAGES    these alone, in this order, where the login node has no Python: "import data importance prune distill"
#   SBATCH_ARGS  further options of sbatch, such as --time=04:00:00
# A stage that fails takes those behind it out of the queue. Run on the login node, in the checkout; nothing is computed there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=slurm/common.sh
. slurm/common.sh

# A line for each stage: its name, and the folder of its status where Python can tell.
open_stages() {
  local python=python3
  if [ -n "${STAGES:-}" ]; then
    xargs -n 1 <<<"$STAGES"
    return
  fi
  [ -x .venv/bin/python ] && python=.venv/bin/python
  "${MINITRON_PYTHON:-$python}" -m minitron_megatron.jobs "$@"
}

# STAGE FOLDER AFTER recipe and overrides; prints the job's id.
submit() {
  local stage=$1 after=$3 name options=(--parsable --kill-on-invalid-dep=yes --output="$LOGS/%x-%j.log")
  export MINITRON_STAGE_FOLDER=$2 # the job tells there how it goes even if nothing starts
  shift 3
  if [ -n "$after" ]; then options+=(--dependency=afterok:"$after"); else options+=(--hold); fi
  for name in partition account qos; do
    [ -n "${SITE[$name]:-}" ] && options+=("--$name=${SITE[$name]}")
  done
  if [ "${SITE[gpus_per_node]:-0}" != 0 ] && grep -q '^#SBATCH --gpus-per-node' "slurm/$stage.sh"; then
    options+=("--gpus-per-node=${SITE[gpus_per_node]}")
  fi
  if STAGE=$stage trains && [ -n "${NODES:-${SITE[nodes]:-}}" ]; then options+=(--nodes="${NODES:-${SITE[nodes]}}"); fi
  # shellcheck disable=SC2086
  sbatch "${options[@]}" ${SBATCH_ARGS:-} "slurm/$stage.sh" "$@" </dev/null
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
stages=$(open_stages "$recipe" "$@")
[ -n "$stages" ] || { echo "$recipe: everything is up to date"; exit 0; }
after='' jobs=()
while read -r stage folder; do
  id=$(submit "$stage" "$folder" "$after" "$recipe" "$@") || {
    [ ${#jobs[@]} -gt 0 ] && scancel "${jobs[@]}"
    die "$stage: sbatch does not accept it; nothing is submitted"
  }
  after=${id%%;*} # of several clusters sbatch names the cluster behind a semicolon
  jobs+=("$after")
done <<<"$stages"
number=0
while read -r stage folder; do
  [ -n "$folder" ] && mkdir -p "$folder" && tell_status queued "" "$folder" "${jobs[$number]}"
  echo "$stage ${jobs[$number]}"
  number=$((number + 1))
done <<<"$stages"
scontrol release "${jobs[0]}" # until here it was held: a stage that begins would make its folder anew
