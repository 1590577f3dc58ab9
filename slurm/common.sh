#!/usr/bin/env bash
# What the batch scripts of slurm/ share; sourced by each: run_stage STAGE [RECIPE] [key=value…]
#   RECIPE    recipe where none is given         CLUSTER   what the site has (default: configs/cluster/gpus.yaml)
#   LOGS      folder of the jobs' logs (default: runs/slurm)
# A stage that leaves with 75 saved its work because it was asked to (time limit, pre-emption): the job is queued again. With 2 the
# user has to mend something (recipe, NaN, health check): it is not. Anything else, a killed rank say: again, as long as it gets further.
set -uo pipefail

STOPPED=75 MISTAKE=2
RESEND_SECONDS=20 # a process that still starts loses a signal: it is sent until the step ends

declare -A SITE=()
STAGE_FOLDER= # runs/NAME/.STAGE.partial, as soon as it is known

die() {
  echo "$*" >&2
  tell_status failed "${*//[\"\\]/}"
  tell_followers
  exit "$MISTAKE"
}

# ---------------------------------------------------------------- what to run, and where

recipe_of() {
  case $1 in
    width) echo configs/llama31_8b_to_4b_width.yaml ;;
    depth) echo configs/llama31_8b_to_4b_depth.yaml ;;
    15b) echo configs/nemotron4_15b_to_8b.yaml ;;
    *.yaml | *.yml) echo "$1" ;;
    *) die "$1 is none of width, depth, 15b (Nemotron-4 15B to 8B), nor a recipe (*.yaml)" ;;
  esac
}

# The cluster file into SITE; a name that is not known is a typing error. A comment begins behind a blank: images of Pyxis have a # inside.
read_cluster() {
  local file=$1 line name value number=0
  local known=" partition account qos nodes gpus_per_node processes_per_node container runtime mounts environment gpu_free_gib memory_free_gib"
  known+=" disk_free_gb all_reduce_gb_per_s starts_without_progress gpu network_gb_per_s " # the last two are for `minitron plan`
  [ -f "$file" ] || die "$file: no such cluster file; set CLUSTER to one of: $(echo configs/cluster/*.yaml)"
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    line=" $line" line=${line%%[[:space:]]#*} line=${line# }
    [[ $line =~ ^[[:space:]]*$ ]] && continue
    [[ $line =~ ^([a-z_]+):[[:space:]]*(.*[^[:space:]])?[[:space:]]*$ ]] || die "$file:$number: not of the form \`name: value\`: $line"
    name=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]:-}
    [[ $known == *" $name "* ]] || die "$file:$number: unknown name '$name'; known:$known"
    SITE[$name]=${value//\"/}
  done <"$file"
}

# What health.py looks at, and what processes are to have, out of the cluster file.
export_site() {
  if [ -n "${SLURM_GPUS_PER_NODE:-}" ] && [ "${SITE[gpus_per_node]:-0}" != 0 ]; then # stages that only move tensors ask for no GPU
    export MINITRON_HEALTH_GPUS=${SLURM_GPUS_PER_NODE##*:} MINITRON_HEALTH_GPU_FREE_GIB=${SITE[gpu_free_gib]:-}
  fi
  export MINITRON_HEALTH_MEMORY_FREE_GIB=${SITE[memory_free_gib]:-}
  export MINITRON_HEALTH_DISK_FREE_GB=${SITE[disk_free_gb]:-} MINITRON_HEALTH_ALL_REDUCE_GB_PER_S=${SITE[all_reduce_gb_per_s]:-}
  [ -n "${SITE[processes_per_node]:-}" ] && export NPROC=${SITE[processes_per_node]}
  local setting
  for setting in ${SITE[environment]:-}; do
    [[ $setting == *=* ]] || die "$CLUSTER: environment: '$setting' is not of the form NAME=VALUE"
    export "${setting?}"
  done
}

# Static rendezvous at the job's first node: c10d would put rank 0 on any of them. Names need not resolve, addresses do.
export_rendezvous() {
  local nodes first
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  first=$(scontrol show node "${nodes[0]}" | grep -oP 'NodeAddr=\K\S+')
  # another job on the same nodes has another id, and another start another port than the one that somebody may have held
  export MASTER_ADDR=$first MASTER_PORT=$((20000 + (SLURM_JOB_ID + 1013 * ${SLURM_RESTART_COUNT:-0}) % 10000))
}

# RUNTIME: of the container, where the cluster file names one.
choose_runtime() {
  RUNTIME=${SITE[runtime]:-auto}
  if [ -z "${SITE[container]:-}" ]; then
    RUNTIME=none
  elif [ "$RUNTIME" = auto ]; then
    RUNTIME=
    command -v apptainer >/dev/null && RUNTIME=apptainer
    [[ $(srun --help 2>/dev/null) == *--container-image* ]] && RUNTIME=pyxis
    [ -n "$RUNTIME" ] || die "$CLUSTER: container: ${SITE[container]}, but neither Pyxis nor apptainer is here; leave it empty to run in .venv"
  fi
}

# FOLDER:FOLDER with commas: the checkout, the jobs' logs and what the cluster file names.
mounts() {
  local folder named=${SITE[mounts]:-} all=$ROOT:$ROOT
  for folder in "${MINITRON_JOB:-$ROOT}" ${named//,/ }; do
    [[ $folder == "$ROOT" || $folder == "$ROOT"/* ]] && continue
    [[ $folder == *:* ]] || folder=$folder:$folder
    all+=,$folder
  done
  echo "$all"
}

# STEP: srun's arguments up to the command itself, in a container where the cluster file names one.
step_in_container() {
  choose_runtime
  STEP=(srun --kill-on-bad-exit=1 --ntasks-per-node=1 --cpu-bind=none) # bound, all ranks of a node would share one core
  case $RUNTIME in
    pyxis) STEP+=(--container-image="${SITE[container]}" --container-mounts="$(mounts)" --container-workdir="$ROOT" --no-container-mount-home) ;;
    apptainer) STEP+=(apptainer exec --nv --bind "$(mounts)" --pwd "$ROOT" "${SITE[container]}") ;;
    none) return ;;
    *) die "$CLUSTER: runtime: $RUNTIME is none of auto, pyxis, apptainer, none" ;;
  esac
  export MINITRON_CONTAINER=${SITE[container]} # launch/torchrun.sh takes the image's Python
}

# ---------------------------------------------------------------- the step

# What each node runs. SIGUSR1 is for the workers, which listen to it: bash and the launcher pass it by. bash outlives SIGTERM as
# well, to write down how its node ended: srun's own exit code is the highest of all, and a node that followed another hides the cause.
# shellcheck disable=SC2016
NODE_COMMAND='trap "" USR1; trap : TERM
launch/torchrun.sh --fill-data "$@" & launcher=$!
trap "kill -TERM $launcher 2>/dev/null" TERM
while wait $launcher; kill -0 $launcher 2>/dev/null; do :; done
wait $launcher; code=$? # a signal ends the wait above with a number of its own
echo $code >"$MINITRON_JOB/code_$SLURM_NODEID"
# what stops does so on all nodes: srun kills none of them for it, unless one has not heard of it after two minutes, and waits for the others
for _ in $([ $code = 75 ] && seq 120); do
  [ "$(ls "$MINITRON_JOB"/code_* | wc -l)" -lt "$SLURM_NNODES" ] || exit 0
  sleep 1
done
exit $code'

# A trapped signal ends `wait`, not the step.
wait_for() {
  local since=$SECONDS
  while wait "$1"; kill -0 "$1" 2>/dev/null; do
    while [ "$ASKED" = yes ] && kill -0 "$1" 2>/dev/null; do
      sleep 1
      if [ $((SECONDS - since)) -ge "$RESEND_SECONDS" ]; then
        since=$SECONDS
        send_to_step
      fi
    done
  done
  wait "$1"
}

# On the way to the workers, again and again until the step has ended. Stages that train save at SIGUSR1; the others keep what is
# finished as they go, and are ended.
ask_to_stop() {
  echo "$(date +%T) $1: the step is asked to save and to stop"
  ASKED=yes
  find_stage_folder
  queued_by_slurm && tell_status queued "SLURM ended this start: a lost node, or a pre-emption" # it may not leave this script the time to say so later
  send_to_step
}

find_stage_folder() {
  [ -f "$MINITRON_JOB/stage_folder" ] && STAGE_FOLDER=$(cat "$MINITRON_JOB/stage_folder")
}

queued_by_slurm() {
  [[ $(scontrol show job "$SLURM_JOB_ID") =~ Restarts=([0-9]+) ]] && [ "${BASH_REMATCH[1]}" -gt "${SLURM_RESTART_COUNT:-0}" ]
}

trains() {
  case $STAGE in correct | distill | finetune) true ;; *) false ;; esac
}

send_to_step() {
  if trains; then
    scancel --signal=USR1 "$SLURM_JOB_ID" 2>/dev/null
  else
    scancel --signal=TERM "$SLURM_JOB_ID" 2>/dev/null
  fi
}

# How the step ended: a mistake on any node, else a failure on any, else that it stopped; srun's own word where no node left one.
outcome() {
  local srun_code=$1 codes
  codes=$(cat "$MINITRON_JOB"/code_* 2>/dev/null | sort -u | xargs)
  case " $codes " in
    *" $MISTAKE "*) echo "$MISTAKE" ;;
    "  " | " 0 ") echo "$srun_code" ;;
    " $STOPPED " | " 0 $STOPPED ") [ "$srun_code" = 0 ] && echo "$STOPPED" || echo "$srun_code" ;;
    *) [ "$srun_code" = 0 ] && echo 1 || echo "$srun_code" ;;
  esac
}

# ---------------------------------------------------------------- status.json

# NAME [FOLDER]: a value of status.json, which holds one on each line, as it is written there.
status_value() {
  sed -n "/^ *\"$1\": /{s///; s/^\"//; s/,\$//; s/\"\$//; p; q}" "${2:-$STAGE_FOLDER}/status.json" 2>/dev/null
}

# STATE WHY [FOLDER JOB]: what holds now, with what was said of steps before. WHY may hold no quotes that are not escaped.
tell_status() {
  local state=$1 why=$2 folder=${3:-$STAGE_FOLDER} job=${4:-${SLURM_JOB_ID:-}} name value
  [ -n "$folder" ] && [ -d "$folder" ] || return 0
  {
    printf '{\n  "state": "%s",\n' "$state"
    for name in step steps saved_step; do
      value=$(status_value $name "$folder")
      [ -n "$value" ] && printf '  "%s": %s,\n' $name "$value"
    done
    [ -n "$why" ] && printf '  "why": "%s",\n' "$why"
    printf '  "job": "%s",\n  "time": "%s"\n}\n' "$job" "$(date -u +%FT%T+00:00)"
  } >"$folder/status.json.job" && mv "$folder/status.json.job" "$folder/status.json"
}

# Jobs behind one that failed leave the queue: their status must not go on saying that they wait.
tell_followers() {
  local folder
  [ -n "$STAGE_FOLDER" ] || return 0
  for folder in "$(dirname "$STAGE_FOLDER")"/.*.partial; do
    [ "$(status_value state "$folder")" = queued ] && tell_status failed "stage $STAGE before it failed" "$folder" "$(status_value job "$folder")"
  done
}

# ---------------------------------------------------------------- how it goes on

# A number that grows as the stage gets further than ever: its newest checkpoint, the time of the sums that importance replaces, else
# bytes. A stage that begins anew may die a little later once or twice, and then no more.
progress_mark() {
  local newest
  if trains; then
    newest=$(find "$STAGE_FOLDER/training" -maxdepth 1 -name 'step_*' -printf '%f\n' 2>/dev/null | sort | tail -n 1)
    echo $((10#0${newest#step_}))
  elif [ "$STAGE" = importance ]; then
    find "$STAGE_FOLDER" -name scores.safetensors -printf '%T@\n' 2>/dev/null | sort -n | tail -n 1 | cut -d. -f1 | grep . || echo 0
  else
    find "$STAGE_FOLDER" -type f ! -name 'status.json*' -printf '%s\n' 2>/dev/null | awk '{ bytes += $1 } END { printf "%.0f\n", bytes }'
  fi
}

# Starts of this job, one after another, that got no further than those before, this one included.
count_starts_without_progress() {
  local mark count=0 furthest=0
  mark=$(progress_mark)
  [ -f "$MINITRON_JOB/progress" ] && read -r count furthest <"$MINITRON_JOB/progress"
  if [ "$mark" -gt "$furthest" ]; then count=0 furthest=$mark; else count=$((count + 1)); fi
  echo "$count $furthest" >"$MINITRON_JOB/progress"
  echo "$count"
}

fail() {
  local code=$1 why=$2
  echo "$STAGE: failed: $why" >&2
  tell_status failed "$why"
  tell_followers
  exit "$code"
}

requeue_or_fail() {
  local code=$1 why=$2 starts job at_most=${SITE[starts_without_progress]:-3}
  trap '' TERM USR1 # SLURM ends this script as it queues the job
  if queued_by_slurm; then # a lost node, or a pre-emption without grace
    tell_status queued "$why"
    exit "$code"
  fi
  job=$(scontrol show job "$SLURM_JOB_ID")
  [[ $job == *JobState=RUNNING* || $job == *Reason=TimeLimit* ]] || fail "$code" "the job was cancelled; what it saved is kept"
  starts=$(count_starts_without_progress)
  [ "$starts" -lt "$at_most" ] || fail "$code" "$at_most starts one after another got no further; the last one: $why"
  echo "$STAGE: queued again (job $SLURM_JOB_ID): $why"
  tell_status queued "$why"
  scontrol requeue "$SLURM_JOB_ID" || fail "$code" "$why; and the job could not be queued again (#SBATCH --requeue is missing?)"
  exit "$code" # of a job that waits again nobody asks for it
}

finish() {
  local code=$1 why=
  [ "$(status_value state)" = failed ] && why=$(status_value why)
  [[ $why == *"make it with: minitron"* ]] && why+=", or all that is missing with: slurm/pipeline_8b_to_4b.sh $RECIPE"
  case $code in
    0) exit 0 ;;
    "$STOPPED") requeue_or_fail "$code" "it was asked to stop: the time limit, or a pre-emption" ;;
    "$MISTAKE") fail "$code" "${why:-exit code $code; the log of job $SLURM_JOB_ID says why}" ;;
    *) requeue_or_fail "$code" "${why:-the step ended with exit code $code}" ;;
  esac
}

run_stage() {
  STAGE=$1 ASKED=no
  local code step
  RECIPE=${RECIPE:-}
  shift
  export MINITRON_JOB
  ROOT=$(pwd) CLUSTER=${CLUSTER:-configs/cluster/gpus.yaml}
  MINITRON_JOB=$(realpath -m "${LOGS:-$ROOT/runs/slurm}")/$STAGE-$SLURM_JOB_ID
  export MINITRON_RANK_LOGS=$MINITRON_JOB
  mkdir -p "$MINITRON_JOB" && rm -f "$MINITRON_JOB"/code_*
  STAGE_FOLDER=$(cat "$MINITRON_JOB/stage_folder" 2>/dev/null || echo "${MINITRON_STAGE_FOLDER:-}")
  trap 'ask_to_stop SIGUSR1' USR1
  trap 'ask_to_stop SIGTERM' TERM
  if [ $# -gt 0 ] && [[ $1 != *=* ]]; then
    RECIPE=$(recipe_of "$1") || exit "$MISTAKE"
    shift
  fi
  [ -n "$RECIPE" ] || die "which recipe? sbatch slurm/$STAGE.sh RECIPE [key=value…]"
  read_cluster "$CLUSTER"
  export_site
  export_rendezvous
  step_in_container
  tell_status running ""
  echo "$(date +%T) $STAGE: job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), $SLURM_NNODES nodes, logs of the ranks: $MINITRON_JOB"
  "${STEP[@]}" bash -c "$NODE_COMMAND" node "$STAGE" "$RECIPE" "$@" &
  step=$!
  wait_for "$step"
  code=$?
  find_stage_folder
  finish "$(outcome "$code")"
}
