"""The schedules that the tests of the schedule modules draw from.

Index letters: k stages or devices, M microbatches.
"""

from hypothesis import settings
from hypothesis import strategies as st

from layerwise_jax.schedule.generators import (
    forward_only,
    gpipe,
    interleaved_1f1b,
    one_f_one_b,
    zero_bubble,
)

ONE_STAGE_A_DEVICE = {
    "forward only": forward_only,
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "1f1b paired": lambda k, M: one_f_one_b(k, M, paired=True),
    "zero bubble": zero_bubble,
}
# A loaded machine may take long over any one example.
properties = settings(deadline=None)
stage_counts = st.integers(1, 8)
microbatch_counts = st.integers(1, 17)


@st.composite
def schedules(draw):
    k, M = draw(stage_counts), draw(microbatch_counts)
    name = draw(st.sampled_from([*ONE_STAGE_A_DEVICE, "interleaved"]))
    if name == "interleaved":
        return interleaved_1f1b(k, draw(st.integers(1, 4)), M, paired=draw(st.booleans()))
    return ONE_STAGE_A_DEVICE[name](k, M)
