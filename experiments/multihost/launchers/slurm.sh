#!/usr/bin/env bash
# SLURM: one process per node, all GPUs of the node. JAX reads the coordinator, the number of
# processes and this process's index from SLURM's variables.
#
#     sbatch experiments/multihost/launchers/slurm.sh
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
set -euo pipefail
exec srun python -m experiments.multihost.worker --steps=40 --directory="$SLURM_SUBMIT_DIR/run"
