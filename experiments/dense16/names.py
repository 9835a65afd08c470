"""Names on the command line of the 16-layer experiment; imports nothing."""

# Strategies in the order of the tables.
STRATEGIES: tuple[str, ...] = (
    "one device",
    "replicas",
    "tensor",
    "tensor x pipeline",
    "layer-wise",
    "layer-wise + tensor",
)
ALL = "all"  # all of MEASURABLE
SCALING, TRANSPORT, ROUNDS, SELF = "scaling", "transport", "rounds", "self"
VARIANTS = "variants"
# Measurements that write files of their own.
JOBS = (SCALING, TRANSPORT, ROUNDS, SELF, VARIANTS)
# Parts that a GPU can measure, the most important first.
MEASURABLE = ("l2", "decode", "stage", "residency", "counters", "sizes")
