#!/usr/bin/env bash
# Gathers the run in one page: sbatch slurm/report.sh RECIPE [key=value…]
#SBATCH --job-name=report
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=48G
#SBATCH --time=01:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# shellcheck source=slurm/common.sh
. slurm/common.sh || { echo "submit it from the checkout: cd minitron_megatron; sbatch slurm/report.sh" >&2; exit 2; }
run_stage report "$@"
