"""The partitioner against other balancers, and a real model's stages under each method.

    python -m experiments.partition                     # both parts
    python -m experiments.partition --parts=balancers   # needs numpy alone

The part `model` needs the extras `aot` and `plot`: every distinct layer is compiled for an absent
H100.
"""

from experiments import command
from experiments.partition import options

if __name__ == "__main__":
    command.start("experiments.partition.program", options)
