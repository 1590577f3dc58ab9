#!/usr/bin/env bash
# Starts one stage under torchrun: launch/torchrun.sh STAGE RECIPE [key=value…]
#   NPROC            processes on this node (default: its GPUs, else the recipe's own number of processes)
#   SLURM_NNODES, SLURM_NODEID, MASTER_ADDR, MASTER_PORT   several nodes, one call of this script on each (srun)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=python3
[ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python
exec "$python" -m minitron_megatron.launcher "$@"
