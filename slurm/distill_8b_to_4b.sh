#!/usr/bin/env bash
# Trains the 4B student to follow the 8B teacher: sbatch slurm/distill_8b_to_4b.sh [RECIPE] [key=value…]
# As it stands: Llama-3.1 8B → 4B by width. More nodes: sbatch --nodes=16 …; data parallelism takes what they have.
#SBATCH --job-name=distill
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
RECIPE=${RECIPE:-configs/llama31_8b_to_4b_width.yaml}
# shellcheck source=slurm/common.sh
. slurm/common.sh || { echo "submit it from the checkout: cd minitron_megatron; sbatch slurm/distill_8b_to_4b.sh" >&2; exit 2; }
run_stage distill "$@"
