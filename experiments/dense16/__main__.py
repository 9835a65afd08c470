"""The paper's 16-layer dense network under every strategy: predicted, compiled, emulated, measured.

    python -m experiments.dense16                              # any machine
    python -m experiments.dense16 --measure=all --name=h200x2  # on GPUs, all local ones
    python -m experiments.dense16 --measure=scaling            # on GPUs: all shapes
    python -m experiments.dense16 --report                     # tables and pictures from results

The defaults of the flags are the paper's configuration. Needs the extras `aot` (to compile for
absent GPUs) and `plot`.
"""

from experiments import command
from experiments.dense16 import options

if __name__ == "__main__":
    command.start("experiments.dense16.program", options)
