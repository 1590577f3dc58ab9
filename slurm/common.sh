# shellcheck shell=bash
# What the batch scripts of slurm/ share; sourced by each: run_stage STAGE [RECIPE] [key=value…]
#   RECIPE    recipe where none is given         CLUSTER   what the site has (default: configs/cluster/gpus.yaml)
#   LOGS      folder of the jobs' logs (default: runs/slurm)
# A stage that leaves with 75 saved its work because it was asked to (time limit, pre-emption): the job is queued again. With 2 the
# user has to mend something (recipe, NaN, health check): it is not. Anything else, a killed rank say: again, as long as it gets further.
set -uo pipefail

STOPPED=75 MISTAKE=2
RESEND_SECONDS=20 # a process that still starts loses a signal: it is sent until the step ends

declare -A SITE=()

die() {
  echo "$*" >&2
  exit "$MISTAKE"
}

# The cluster file into SITE; a name that is not known is a typing error.
read_cluster() {
  local file=$1 line name value number=0
  local known=" partition account qos gpus_per_node processes_per_node container runtime mounts environment gpu_free_gib memory_free_gib"
  known+=" disk_free_gb all_reduce_gb_per_s starts_without_progress "
  [ -f "$file" ] || die "$file: no such cluster file; set CLUSTER to one of: $(echo configs/cluster/*.yaml)"
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    line=${line%%#*}
    [[ $line =~ ^[[:space:]]*$ ]] && continue
    [[ $line =~ ^([a-z_]+):[[:space:]]*(.*[^[:space:]])?[[:space:]]*$ ]] || die "$file:$number: not of the form \`name: value\`: $line"
    name=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]:-}
    [[ $known == *" $name "* ]] || die "$file:$number: unknown name '$name'; known:$known"
    SITE[$name]=${value//\"/}
  done <"$file"
}

# What health.py looks at, out of the cluster file.
export_site() {
  if [ -n "${SLURM_GPUS_PER_NODE:-}" ]; then # stages that only move tensors ask for no GPU
    export MINITRON_HEALTH_GPUS=${SITE[gpus_per_node]:-0} MINITRON_HEALTH_GPU_FREE_GIB=${SITE[gpu_free_gib]:-}
  fi
  export MINITRON_HEALTH_MEMORY_FREE_GIB=${SITE[memory_free_gib]:-}
  export MINITRON_HEALTH_DISK_FREE_GB=${SITE[disk_free_gb]:-} MINITRON_HEALTH_ALL_REDUCE_GB_PER_S=${SITE[all_reduce_gb_per_s]:-}
  export MINITRON_CONTAINER=${SITE[container]:-}
  [ -n "${SITE[processes_per_node]:-}" ] && export NPROC=${SITE[processes_per_node]}
  local setting
  for setting in ${SITE[environment]:-}; do
    [[ $setting == *=* ]] || die "$CLUSTER: environment: '$setting' is not of the form NAME=VALUE"
    export "${setting?}"
  done
}

# Static rendezvous at the job's first node: c10d would put rank 0 on any of them. Names need not resolve, addresses do.
export_rendezvous() {
  local first
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  MASTER_ADDR=$(scontrol show node "$first" | grep -oP 'NodeAddr=\K\S+')
  MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # another job on the same nodes has another id
  export MASTER_ADDR MASTER_PORT
}

container_runtime() {
  local runtime=${SITE[runtime]:-auto}
  if [ -z "${SITE[container]:-}" ]; then
    runtime=none
  elif [ "$runtime" = auto ]; then
    runtime=none
    command -v apptainer >/dev/null && runtime=apptainer
    srun --help 2>/dev/null | grep -q -- --container-image && runtime=pyxis
    [ $runtime = none ] && die "$CLUSTER: container: ${SITE[container]}, but neither Pyxis nor apptainer is here; leave it empty to run in .venv"
  fi
  echo "$runtime"
}

# STEP: srun's arguments up to the command itself, in a container where the cluster file names one.
step_in_container() {
  local runtime mounts=$ROOT:$ROOT${SITE[mounts]:+,${SITE[mounts]}}
  runtime=$(container_runtime) || exit "$MISTAKE"
  STEP=(srun --kill-on-bad-exit=1 --ntasks-per-node=1 --cpu-bind=none) # bound, all ranks of a node would share one core
  case $runtime in
    pyxis) STEP+=(--container-image="${SITE[container]}" --container-mounts="$mounts" --container-workdir="$ROOT" --no-container-mount-home) ;;
    apptainer) STEP+=(apptainer exec --nv --bind "$mounts" --pwd "$ROOT" "${SITE[container]}") ;;
    none) ;;
    *) die "$CLUSTER: runtime: $runtime is none of auto, pyxis, apptainer, none" ;;
  esac
}

# What each node runs. SIGUSR1 is for the workers, which listen to it: bash and the launcher pass it by. bash outlives SIGTERM as
# well, to write down how its node ended: srun's own exit code is the highest of all, and a node that followed another hides the cause.
# shellcheck disable=SC2016
NODE_COMMAND='trap "" USR1; trap : TERM
launch/torchrun.sh --fill-data "$@" & launcher=$!
trap "kill -TERM $launcher 2>/dev/null" TERM
while :; do wait $launcher; code=$?; kill -0 $launcher 2>/dev/null || break; done
echo $code >"$MINITRON_JOB/code_$SLURM_NODEID"
[ $code = 75 ] && exit 0 # or srun would kill the other nodes, which are about to leave as well
exit $code'

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

status_value() { # NAME: of status.json, which holds one on each line
  sed -n "s/^ *\"$1\": \"\?\([^\",]*\).*/\1/p" "$STAGE_FOLDER/status.json" 2>/dev/null | head -n 1
}

# status.json says what holds now, with what it said of steps before. The reason may hold no quotes.
tell_status() {
  local state=$1 why=${2//[\"\\]/} step steps saved
  [ -n "$STAGE_FOLDER" ] && [ -d "$STAGE_FOLDER" ] || return 0
  step=$(status_value step) steps=$(status_value steps) saved=$(status_value saved_step)
  printf '{\n  "state": "%s",\n%s%s%s  "why": "%s",\n  "job": "%s",\n  "time": "%s"\n}\n' "$state" "${step:+"  \"step\": $step,"$'\n'}" \
    "${steps:+"  \"steps\": $steps,"$'\n'}" "${saved:+"  \"saved_step\": $saved,"$'\n'}" "$why" "$SLURM_JOB_ID" "$(date -u +%FT%T+00:00)" \
    >"$STAGE_FOLDER/status.json.tmp" && mv "$STAGE_FOLDER/status.json.tmp" "$STAGE_FOLDER/status.json"
}

# What grows as the job gets further: the newest checkpoint, or for a stage without steps its files.
progress_mark() {
  if [ -d "$STAGE_FOLDER/training" ]; then
    find "$STAGE_FOLDER/training" -maxdepth 1 -name 'step_*' -printf '%f\n' | sort | tail -n 1
  else
    find "$STAGE_FOLDER" -type f ! -name 'status.json*' ! -name identity -printf '%p %s %T@\n' 2>/dev/null | sort | cksum
  fi
}

# Starts that got no further than the one before, this one included.
count_starts_without_progress() {
  local mark before count=0
  mark=$(progress_mark)
  [ -f "$MINITRON_JOB/progress" ] && { read -r count && read -r before; } <"$MINITRON_JOB/progress"
  if [ "${before:-}" = "$mark" ]; then count=$((count + 1)); else count=1; fi
  printf '%s\n%s\n' "$count" "$mark" >"$MINITRON_JOB/progress"
  echo "$count"
}

requeue_or_fail() {
  local code=$1 why=$2 starts at_most=${SITE[starts_without_progress]:-3}
  starts=$(count_starts_without_progress)
  if [ "$starts" -ge "$at_most" ]; then
    why="$at_most starts one after another got no further; the last one: $why"
    echo "$STAGE: failed: $why" >&2
    tell_status failed "$why"
    exit "$code"
  fi
  trap '' TERM USR1 # SLURM ends this script as it queues the job
  case $(scontrol show job "$SLURM_JOB_ID" | grep -oP 'JobState=\K\S+') in
    RUNNING) ;;
    CANCELLED*)
      tell_status saved "the job was cancelled"
      exit "$code"
      ;;
    *) # a pre-emption or a lost node: SLURM queues the job again by itself
      tell_status queued "$why"
      exit "$code"
      ;;
  esac
  echo "$STAGE: queued again (job $SLURM_JOB_ID): $why"
  tell_status queued "$why"
  scontrol requeue "$SLURM_JOB_ID" || {
    tell_status failed "$why; and the job could not be queued again (#SBATCH --requeue is missing?)"
    exit "$code"
  }
  exit "$code" # of a job that waits again nobody asks for it
}

finish() {
  local code=$1
  case $code in
    0) exit 0 ;;
    "$STOPPED") requeue_or_fail "$code" "it was asked to stop: the time limit, or a pre-emption" ;;
    "$MISTAKE")
      [ "$(status_value state)" = failed ] || tell_status failed "exit code $code; the job's log says why"
      echo "$STAGE: failed: $(status_value why)" >&2
      exit "$code"
      ;;
    *) requeue_or_fail "$code" "the step ended with exit code $code" ;;
  esac
}

# On the way to the workers, again and again until the step has ended. Stages that train save at SIGUSR1; the others keep what is
# finished as they go, and are ended.
ask_to_stop() {
  echo "$(date +%T) $1: the step is asked to save and to stop"
  ASKED=yes
  send_to_step
}

send_to_step() {
  case $STAGE in
    correct | distill | finetune) scancel --signal=USR1 "$SLURM_JOB_ID" 2>/dev/null ;;
    *) scancel --signal=TERM "$SLURM_JOB_ID" 2>/dev/null ;;
  esac
}

run_stage() {
  STAGE=$1 ASKED=no STAGE_FOLDER=
  local recipe=${RECIPE:-} code step
  shift
  if [ $# -gt 0 ] && [[ $1 != *=* ]]; then
    recipe=$1
    shift
  fi
  [ -n "$recipe" ] || die "which recipe? sbatch slurm/$STAGE.sh RECIPE [key=value…]"
  trap 'ask_to_stop SIGUSR1' USR1
  trap 'ask_to_stop SIGTERM' TERM
  ROOT=$(pwd) CLUSTER=${CLUSTER:-configs/cluster/gpus.yaml}
  read_cluster "$CLUSTER"
  export_site
  export_rendezvous
  export MINITRON_JOB=${LOGS:-$ROOT/runs/slurm}/$STAGE-$SLURM_JOB_ID
  export MINITRON_RANK_LOGS=$MINITRON_JOB
  mkdir -p "$MINITRON_JOB" && rm -f "$MINITRON_JOB"/code_*
  step_in_container
  echo "$(date +%T) $STAGE: job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), $SLURM_NNODES nodes, logs of the ranks: $MINITRON_JOB"
  "${STEP[@]}" bash -c "$NODE_COMMAND" node "$STAGE" "$recipe" "$@" &
  step=$!
  wait_for "$step"
  code=$?
  STAGE_FOLDER=$(cat "$MINITRON_JOB/stage_folder" 2>/dev/null)
  finish "$(outcome "$code")"
}

# A trapped signal ends `wait`, not the step.
wait_for() {
  local code since=$SECONDS
  while :; do
    if [ "$ASKED" = yes ]; then
      sleep 1
      if [ $((SECONDS - since)) -ge "$RESEND_SECONDS" ]; then
        since=$SECONDS
        send_to_step
      fi
      kill -0 "$1" 2>/dev/null && continue
    fi
    wait "$1"
    code=$?
    kill -0 "$1" 2>/dev/null || return "$code"
  done
}
