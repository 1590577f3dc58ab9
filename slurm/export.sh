#!/usr/bin/env bash
# Writes the student as a Hugging Face model or .nemo archive: sbatch slurm/export.sh RECIPE [key=value…]
#SBATCH --job-name=export
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=48G
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# shellcheck source=slurm/common.sh
. slurm/common.sh || { echo "submit it from the checkout: cd minitron_megatron; sbatch slurm/export.sh" >&2; exit 2; }
run_stage export "$@"
