"""Flags of the training experiment."""

from absl import flags

from experiments.training.names import SUBJECTS

PARTS = ("memory", "step_time", "schedules")

ONLY = flags.DEFINE_multi_enum("parts", PARTS, PARTS, "parts to measure")
DEVICES = flags.DEFINE_integer("devices", 8, "emulated devices", lower_bound=2)
MEMORY_MICROBATCHES = flags.DEFINE_multi_integer(
    "memory_microbatches", [8, 16, 32, 64], "numbers of microbatches of the memory table"
)
MODELS = flags.DEFINE_multi_enum(
    "subjects", ["mlp", "gpt", "resnet"], SUBJECTS, "models whose step is timed"
)
MICROBATCHES = flags.DEFINE_integer(
    "microbatches", 16, "microbatches of a timed step", lower_bound=1
)
REPETITIONS = flags.DEFINE_integer("repetitions", 7, "timed steps of every program", lower_bound=1)
JAXPP = flags.DEFINE_string(
    "jaxpp_python", None, "Python interpreter that can import JaxPP; without it JaxPP is left out"
)
SCHEDULE_STAGES = flags.DEFINE_integer(
    "schedule_stages", 4, "stages of the drawn schedules", lower_bound=2
)
SCHEDULE_MICROBATCHES = flags.DEFINE_integer(
    "schedule_microbatches", 8, "microbatches of the drawn schedules", lower_bound=1
)
ONLY_REPORT = flags.DEFINE_bool(
    "report", False, "measure nothing; make pictures and tables from the results"
)
