#!/usr/bin/env bash
# Starts one stage under torchrun: launch/torchrun.sh STAGE RECIPE [key=value…]
#   NPROC            processes on this node (default: its GPUs, else the recipe's own number of processes)
#   SLURM_NNODES, SLURM_NODEID, MASTER_ADDR, MASTER_PORT   several nodes, one call of this script on each (srun)
set -euo pipefail
if [ $# -lt 2 ]; then
  sed -n '2,4s/^# //p' "$0" >&2
  exit 2
fi
stage=$1 recipe=$2
shift 2
bin=$(dirname "${BASH_SOURCE[0]}")/../.venv/bin
[ -x "$bin/torchrun" ] && PATH="$bin:$PATH"

# threads that spin while they wait make CPU matmuls several times slower on a busy machine
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-0}

if [ -z "${NPROC:-}" ]; then
  NPROC=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
  [ "$NPROC" -gt 0 ] || NPROC=$(python -m minitron_megatron.processes "$stage" "$recipe" "$@")
fi
threads=$(($(nproc) / NPROC))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

if [ "${SLURM_NNODES:-1}" -gt 1 ]; then
  : "${MASTER_ADDR:?set MASTER_ADDR to the first node, e.g. from: scontrol show hostnames \$SLURM_JOB_NODELIST}"
  # a static rendezvous: c10d would put rank 0 on either node
  rendezvous=(--nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" --master-addr="$MASTER_ADDR"
    --master-port="${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 10000))}")
else
  rendezvous=(--standalone)
fi
exec torchrun "${rendezvous[@]}" --nproc-per-node="$NPROC" -m minitron_megatron.worker "$stage" "$recipe" "$@"
