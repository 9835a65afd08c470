"""Plan models for absent GPUs, with the buffer assignments of XLA's compiler for them.

    python -m experiments.plan_without_gpu

Needs no GPU; needs the extras `aot` and `plot`. Prints the plan of every model and draws its stages
against the cache, then plans a model of 175 billion parameters for 16, 64 and 1,024 devices. Exits
with 2 if the compiler is not installed.
"""

from experiments import command
from experiments.plan_without_gpu import options

if __name__ == "__main__":
    command.start("experiments.plan_without_gpu.program", options)
