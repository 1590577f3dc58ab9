#!/usr/bin/env bash
# What the batch scripts of slurm/ share; sourced by each: run_stage STAGE [RECIPE] [key=value…]
#   RECIPE    recipe where none is given         CLUSTER   what the site has (default: configs/cluster/gpus.yaml)
#   LOGS      folder of the jobs' logs (default: runs/slurm)
# A stage that leaves with 75 saved its work because it was asked to (time limit, pre-emption): the job is queued again. With 2 the
# user has to mend something (recipe, NaN, health check): it is not. Anything else, a killed rank say: again, as long as it gets further.
set -uo pipefail # no -e: how a command failed is what is looked at here

STOPPED=75 MISTAKE=2
RESEND_SECONDS=20 # a process that still starts loses a signal: it is sent until the step ends

# shellcheck source=slurm/common/status.sh
. slurm/common/status.sh
# shellcheck source=slurm/common/site.sh
. slurm/common/site.sh
# shellcheck source=slurm/common/again.sh
. slurm/common/again.sh

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

trains() {
  case $STAGE in correct | distill | finetune) true ;; *) false ;; esac
}

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

# On the way to the workers, again and again until the step has ended.
ask_to_stop() {
  echo "$(date +%T) $1: the step is asked to save and to stop"
  ASKED=yes
  find_stage_folder
  queued_by_slurm && tell_status queued "$ENDED_BY_SLURM" # it may not leave this script the time to say so later
  send_to_step
}

# Stages that train save at SIGUSR1; the others keep what is finished as they go, and are ended.
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
  local step code
  RECIPE=${RECIPE:-}
  shift
  ROOT=$(pwd) CLUSTER=${CLUSTER:-configs/cluster/gpus.yaml}
  export MINITRON_JOB
  MINITRON_JOB=$(realpath -m "${LOGS:-$ROOT/runs/slurm}")/$STAGE-$SLURM_JOB_ID
  export MINITRON_RANK_LOGS=$MINITRON_JOB
  mkdir -p "$MINITRON_JOB" && rm -f "$MINITRON_JOB"/code_*
  STAGE_FOLDER=${MINITRON_STAGE_FOLDER:-}
  find_stage_folder # of an earlier start
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
  begin_or_give_up
  echo "$(date +%T) $STAGE: job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), $SLURM_NNODES nodes, logs of the ranks: $MINITRON_JOB"
  "${STEP[@]}" bash -c "$NODE_COMMAND" node "$STAGE" "$RECIPE" "$@" &
  step=$!
  wait_for "$step"
  code=$?
  find_stage_folder
  finish "$(outcome "$code")"
}
