"""Flags of the partition experiment."""

from absl import flags

PARTS = ("balancers", "model")

ONLY = flags.DEFINE_multi_enum(
    "parts", PARTS, PARTS, "balancers: other balancers, measured; model: a GPT's stages, drawn"
)
