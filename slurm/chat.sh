#!/usr/bin/env bash
# Tokenizes conversations: sbatch slurm/chat.sh RECIPE [key=value…]
#SBATCH --job-name=chat
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
. slurm/common.sh || { echo "submit it from the checkout: cd minitron_megatron; sbatch slurm/chat.sh" >&2; exit 2; }
run_stage chat "$@"
