"""The schedules that the tests of the schedule modules draw from.

Index letters: k stages or devices, M microbatches.
"""

from hypothesis import settings
from hypothesis import strategies as st

from layerwise_jax.schedule.generators import (
    forward_only,
    gpipe,
    one_f_one_b,
    zero_bubble,
)
from layerwise_jax.schedule.registry import SCHEDULES
from layerwise_jax.schedule.table import Action, Schedule

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
    """A forward table, or a table of any registered schedule."""
    k, M = draw(stage_counts), draw(microbatch_counts)
    name = draw(st.sampled_from(["forward only", *SCHEDULES]))
    v = draw(st.integers(1, 4))
    if name == "forward only":
        return forward_only(k, M, v)
    family = SCHEDULES[name]
    return family.generate(k, family.stages_per_device or v, M, draw(st.booleans()))


@st.composite
def ring_schedules(draw):
    """One of `schedules` whose stages are placed round-robin."""
    return draw(schedules().filter(lambda schedule: schedule.is_round_robin))


@st.composite
def random_tables(draw):
    """A valid table of random placement and order, of no published kind.

    At each tick every device performs a random one of the actions whose operands are done, or
    idles. B and I before W are chosen for each stage and microbatch.
    """
    devices, stages, M = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    home = [draw(st.integers(0, devices - 1)) for _ in range(stages)]
    whole = {
        (s, m): draw(st.booleans()) for s in range(stages) for m in range(M)
    }  # B, else I and W
    waiting = [Action(s, "F", m) for s in range(stages) for m in range(M)]
    for s, m in whole:
        kinds = ("B",) if whole[s, m] else ("I", "W")
        waiting += [Action(s, kind, m) for kind in kinds]
    done, rows = set(), []
    while waiting:
        ready = [a for a in waiting if all(need in done for need in a.needs(stages))]
        row = []
        for device in range(devices):
            here = [a for a in ready if home[a.stage] == device]
            row.append((draw(st.sampled_from(here)),) if here and draw(st.integers(0, 4)) else ())
        if not any(row):
            first = ready[0]
            row[home[first.stage]] = (first,)
        for cell in row:
            for action in cell:
                waiting.remove(action)
                done.update(action.effects)
        rows.append(tuple(row))
    return Schedule(tuple(rows))
