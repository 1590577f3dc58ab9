#!/usr/bin/env bash
# Chooses the layers to drop: sbatch slurm/depth.sh RECIPE [key=value…]
#SBATCH --job-name=depth
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# shellcheck source=slurm/common.sh
. slurm/common.sh || { echo "submit it from the checkout: cd minitron_megatron; sbatch slurm/depth.sh" >&2; exit 2; }
run_stage depth "$@"
