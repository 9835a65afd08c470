"""Flags of the 16-layer experiment; the defaults are the paper's configuration."""

from absl import flags

from experiments.dense16.names import ALL, JOBS, MEASURABLE
from experiments.dense16.names import STRATEGIES as STRATEGY_NAMES
from experiments.dense16.paper import BATCH as PAPER_BATCH
from experiments.dense16.paper import CONTEXT as PAPER_CONTEXT
from experiments.dense16.paper import DEVICES
from experiments.dense16.paper import HEADS as PAPER_HEADS
from experiments.dense16.paper import LAYERS as PAPER_LAYERS
from experiments.dense16.paper import MLP as PAPER_MLP

PARTS = ("predict", "compile", "emulate")
MEASURABLE_NAMES = (ALL, *JOBS, *MEASURABLE)

DEVICE_COUNT = flags.DEFINE_integer(
    "devices", None, f"devices (default: {DEVICES} to plan for, all local ones to measure)"
)
LAYERS = flags.DEFINE_multi_integer(
    "layers", None, f"layers (default: {PAPER_LAYERS} to plan for; n and 2n for scaling)"
)
HEADS = flags.DEFINE_integer("heads", PAPER_HEADS, "attention heads of 128", lower_bound=1)
MLP = flags.DEFINE_integer("mlp", PAPER_MLP, "hidden width of the MLP", lower_bound=1)
DTYPE = flags.DEFINE_enum(
    "dtype", "float16", ["float16", "bfloat16"], "dtype of weights and caches"
)
BATCH = flags.DEFINE_integer("batch", PAPER_BATCH, "sequences", lower_bound=1)
CONTEXT = flags.DEFINE_integer(
    "context", PAPER_CONTEXT, "positions per sequence; the maximum for scaling", lower_bound=1
)
ONLY = flags.DEFINE_multi_enum("parts", PARTS, PARTS, "parts to run if --measure is not given")
MEASURE = flags.DEFINE_list(
    "measure", [], f"parts to measure on GPUs: {', '.join(MEASURABLE_NAMES)}"
)
STRATEGIES = flags.DEFINE_multi_enum(
    "strategies", STRATEGY_NAMES, STRATEGY_NAMES, "strategies that --measure=scaling measures"
)
SECONDS = flags.DEFINE_float(
    "seconds", 540, "seconds after which no measurement is started", lower_bound=1
)
REPEATS = flags.DEFINE_integer("repeats", 5, "repetitions of every timing", lower_bound=1)
THREADS = flags.DEFINE_integer("threads", 8, "programs compiled at the same time", lower_bound=1)
NAME = flags.DEFINE_string("name", None, "name of the file of results (default: from the devices)")
REHEARSE = flags.DEFINE_bool(
    "rehearse", False, "measure toys on emulated devices, to try the code that runs on GPUs"
)
ONLY_REPORT = flags.DEFINE_bool(
    "report", False, "measure nothing; make pictures and tables from the results"
)


@flags.validator("measure", f"must be of {', '.join(MEASURABLE_NAMES)}")
def _is_measurable(parts: list[str]) -> bool:
    return {*parts} <= {*MEASURABLE_NAMES}
