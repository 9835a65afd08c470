#!/usr/bin/env bash
# Open MPI: one process per host, all GPUs of the host. JAX reads Open MPI's variables.
#
#     experiments/multihost/launchers/mpi.sh host1,host2
set -euo pipefail
hosts=${1:?the hosts, separated by commas}
exec mpirun --host "$hosts" --map-by ppr:1:node \
    python -m experiments.multihost.worker --steps=40 --directory="$PWD/run"
