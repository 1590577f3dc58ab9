#!/usr/bin/env bash
# What to run, and what the site has: the cluster file, the nodes' meeting, the container.

declare -A SITE=() # the cluster file

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
    SITE[$name]=${value//[\"\']/}
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
  local setting settings
  read -ra settings <<<"${SITE[environment]:-}"
  for setting in "${settings[@]}"; do
    [[ $setting == *=* ]] || die "$CLUSTER: environment: '$setting' is not of the form NAME=VALUE"
    export "${setting?}"
  done
}

# Static rendezvous at the job's first node: c10d would put rank 0 on any of them. Names need not resolve, addresses do.
export_rendezvous() {
  local nodes
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export MASTER_ADDR MASTER_PORT
  MASTER_ADDR=$(scontrol show node "${nodes[0]}" | grep -oP 'NodeAddr=\K\S+')
  # another job on the same nodes has another id, and another start another port than the one that somebody may have held
  MASTER_PORT=$((20000 + (SLURM_JOB_ID + 1013 * ${SLURM_RESTART_COUNT:-0}) % 10000))
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
  local folder folders all=$ROOT:$ROOT
  IFS=, read -ra folders <<<"${MINITRON_JOB:-$ROOT},${SITE[mounts]:-}"
  for folder in "${folders[@]}"; do
    [[ -z $folder || $folder == "$ROOT" || $folder == "$ROOT"/* ]] && continue
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
