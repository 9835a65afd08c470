"""Memory and time of training schedules on emulated devices, beside other ways of training.

    python -m experiments.training                       # memory, step time, schedules, report
    python -m experiments.training --jaxpp_python=PATH   # also JaxPP, from that interpreter
    python -m experiments.training --report              # pictures and tables from the results

Needs no accelerator; needs the extra `plot`.
"""

from experiments import command
from experiments.training import options

if __name__ == "__main__":
    command.start("experiments.training.program", options)
