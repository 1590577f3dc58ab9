#!/usr/bin/env bash
# Starts one stage under torchrun, on a laptop, on a node, or as a step of a SLURM job: launch/torchrun.sh [options] STAGE RECIPE [key=value…]
#   --restarts=N     on one node: processes that died are started again, up to N times one after another without a new checkpoint
#   --fill-data      parallel.data as large as the processes allow
#   NPROC            processes on this node (default: its GPUs, else the recipe's own number of processes)
#   SLURM_NNODES, SLURM_NODEID, MASTER_ADDR, MASTER_PORT   several nodes, one call of this script on each (srun); one node finds a free port
#   MINITRON_PYTHON  the interpreter (default: .venv's, in a container the container's)
# SIGTERM: a training saves behind its next step; exit code 75 then. Settings of the processes: minitron_megatron/environment.py.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=python3
[ -z "${MINITRON_CONTAINER:-}" ] && [ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # an image may have the packages without the project
exec "${MINITRON_PYTHON:-$python}" -m minitron_megatron.launcher "$@"
