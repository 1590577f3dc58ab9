#!/usr/bin/env bash
# Trains the student on conversations: sbatch slurm/finetune.sh RECIPE [key=value…]
#SBATCH --job-name=finetune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# shellcheck source=slurm/common.sh
. slurm/common.sh || { echo "submit it from the checkout: cd minitron_megatron; sbatch slurm/finetune.sh" >&2; exit 2; }
run_stage finetune "$@"
