#!/usr/bin/env bash
# status.json, where no Python of ours runs: minitron_megatron/status.py says what stands in it.

STAGE_FOLDER= # runs/NAME/.STAGE.partial, as soon as it is known

# The launcher tells it.
find_stage_folder() {
  [ -f "$MINITRON_JOB/stage_folder" ] && STAGE_FOLDER=$(cat "$MINITRON_JOB/stage_folder")
}

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

# CODE WHY: ends the job for good.
fail() {
  local code=$1 why=$2
  echo "$STAGE: failed: $why" >&2
  tell_status failed "$why"
  tell_followers
  exit "$code"
}

# WHY: a mistake that is found before anything starts.
die() {
  echo "$*" >&2
  tell_status failed "${*//[\"\\]/}"
  tell_followers
  exit "$MISTAKE"
}
