#!/usr/bin/env bash
# Whether a job that ended is started again.

ENDED_BY_SLURM="SLURM ended this start: a lost node, or a pre-emption"

queued_by_slurm() {
  [[ $(scontrol show job "$SLURM_JOB_ID") =~ Restarts=([0-9]+) ]] && [ "${BASH_REMATCH[1]}" -gt "${SLURM_RESTART_COUNT:-0}" ]
}

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

# BEGUN: 1 as a start begins, 0 as it ends. Prints the starts of this job since it last got further than ever, the one that runs among
# them: a lost node takes along the script that could have counted at the end.
starts_without_progress() {
  local begun=$1 mark count=0 furthest=0
  mark=$(progress_mark)
  [ -f "$MINITRON_JOB/progress" ] && read -r count furthest <"$MINITRON_JOB/progress"
  [ "$mark" -gt "$furthest" ] && count=0 furthest=$mark
  count=$((count + begun))
  echo "$count $furthest" >"$MINITRON_JOB/progress"
  echo "$count"
}

# LAST: why the last of them ended.
give_up() {
  fail 1 "${SITE[starts_without_progress]:-3} starts one after another got no further; the last one: $1"
}

begin_or_give_up() {
  [ "$(starts_without_progress 1)" -le "${SITE[starts_without_progress]:-3}" ] || give_up "$(status_value why)"
  tell_status running ""
}

requeue_or_fail() {
  local code=$1 why=$2 job
  trap '' TERM USR1 # SLURM ends this script as it queues the job
  if queued_by_slurm; then # a lost node, or a pre-emption without grace
    tell_status queued "$why"
    exit "$code"
  fi
  job=$(scontrol show job "$SLURM_JOB_ID")
  [[ $job == *JobState=RUNNING* || $job == *Reason=TimeLimit* ]] || fail "$code" "the job was cancelled; what it saved is kept"
  [ "$(starts_without_progress 0)" -lt "${SITE[starts_without_progress]:-3}" ] || give_up "$why"
  echo "$STAGE: queued again (job $SLURM_JOB_ID): $why"
  tell_status queued "$why"
  scontrol requeue "$SLURM_JOB_ID" || fail "$code" "$why; and the job could not be queued again (#SBATCH --requeue is missing?)"
  exit "$code" # of a job that waits again nobody asks for it
}
