"""Measure cache knee and bandwidths of the local GPU, and write them as a DeviceSpec.

    python -m experiments.calibrate

One persistent kernel reads working sets of 8 to 512 MiB, which takes less than a minute. Writes the
DeviceSpec (for `lw.DeviceSpec.from_json`), the curve and a picture. Exits with 2 if there is no
GPU.
"""

from experiments import command
from experiments.calibrate import options

if __name__ == "__main__":
    command.start("experiments.calibrate.program", options)
