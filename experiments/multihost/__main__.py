"""Training over several processes that are killed and restarted, beside a run of one process.

    python -m experiments.multihost --processes=2 --kills=3

Starts the processes on this machine, kills one of them at random moments, restarts all of them from
the last checkpoint, and compares the losses with those of one process that was never killed. Exits
with 1 if they differ by more than rounding explains, or if a survivor of a kill exited with 0.
"""

import sys
from pathlib import Path

from absl import app, flags

from experiments import command

PROCESSES = flags.DEFINE_integer("processes", 2, "processes on this machine", lower_bound=1)
DEVICES = flags.DEFINE_integer("devices", 2, "emulated CPU devices a process", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 40, "training steps", lower_bound=1)
KILLS = flags.DEFINE_integer("kills", 3, "times that a process is killed", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 0, "seed of the moments and of the processes killed")
flags.adopt_module_key_flags(command)


def main(argv: list[str]) -> None:
    """Run what the flags describe, and exit with its status."""
    command.refuse_arguments(argv)
    from experiments.multihost.run import Setup, run

    setup = Setup(PROCESSES.value, DEVICES.value, STEPS.value, KILLS.value, SEED.value)
    results = command.output("multihost").folder
    scratch = Path("build/multihost") if command.UPDATE_RESULTS.value else results
    sys.exit(run(setup, scratch, results))


if __name__ == "__main__":
    app.run(main)
