"""Flags of the calibration."""

from absl import flags

SMALLEST = flags.DEFINE_integer("smallest_mib", 8, "smallest working set in MiB", lower_bound=1)
LARGEST = flags.DEFINE_integer("largest_mib", 512, "largest working set in MiB", lower_bound=2)
READ = flags.DEFINE_integer(
    "read_mib", 16384, "MiB that one run reads for one point of the curve", lower_bound=1
)
LIKE = flags.DEFINE_string(
    "like", None, "known device that supplies the other figures of an unknown GPU"
)
ALLOW_CPU = flags.DEFINE_bool("allow_cpu", False, "measure the CPU in plain JAX, as a trial")
