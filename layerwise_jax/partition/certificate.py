"""Why there is no better partition, and why there is none at all: in layers, for people and for
checkers.

The argument of a sweep that fails: with one block more, none of its stages would fit. A partition
into k stages has k - 1 boundaries between stages; k runs that each need a boundary strictly inside,
no two the same one, are one too many. (Where places differ, run r need only be refused at place r:
the induction in `partition_sweep` does the rest.)
"""

from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from layerwise_jax.partition.checks import Run
from layerwise_jax.partition.result import CapacityError
from layerwise_jax.partition.stage_costs import Indices, StageCosts
from layerwise_jax.partition.sweep import Sweep, sweep


@dataclass(frozen=True)
class Blocker:
    """What keeps the heaviest stage from handing a layer to its neighbour."""

    layer: int | None
    constraint: str | None
    sentence: str


def blocking_runs(costs: StageCosts, failed: Sweep) -> tuple[Run, ...]:
    """The stages of a failed sweep with one block more each, in layers, from the front."""
    busy = failed.reached[1:] > 0
    starts, stops = failed.reached[1:][busy] - 1, failed.reached[:-1][busy]
    runs = zip(costs.boundaries[starts].tolist(), costs.boundaries[stops].tolist(), strict=True)
    return tuple(sorted(set(runs)))


def refuse(costs: StageCosts, failed: Sweep | None, num_stages: int) -> NoReturn:
    """Raise the error that names the layers, or the number of stages, that are in the way."""
    _refuse_block(costs, num_stages)
    if failed is None:
        raise CapacityError(
            f"No partition into {_count(costs, num_stages)} stages satisfies the constraints: "
            "every cut was searched."
        )
    capacity = float(costs.by_place[0][:num_stages].max())
    limit = "" if np.isinf(capacity) else f" of {capacity:,.0f} bytes"
    if costs.devices_differ:
        raise CapacityError(
            f"{costs.problem.num_layers} layers do not fit {num_stages} devices in this order, "
            f"the largest{limit}: "
            "filled from the last one they do not reach the first layer.",
            capacity=capacity,
        )
    runs, fewest = blocking_runs(costs, failed), fewest_stages(costs)
    advice = f"{fewest} stages would do" if fewest else "no number of stages would do"
    raise CapacityError(
        f"{costs.problem.num_layers} layers do not fit {num_stages} stages{limit}: {advice}. "
        f"Each of {len(runs)} runs of layers, the first {runs[0][0]}..{runs[0][1] - 1}, has to be "
        "cut inside.",
        capacity=capacity,
        fewest_stages=fewest,
        certificate=runs,
    )


def fewest_stages(costs: StageCosts) -> int | None:
    """The fewest stages that satisfy the constraints whatever their load; None if no number does,
    or if devices differ.

    Exact under the condition of `partition_sweep`; boundaries that cost time play no part.
    """
    if costs.devices_differ:
        return None
    complete = sweep(costs, np.inf, len(costs.by_place[0]))
    if not complete.is_complete:
        return None
    return int(np.count_nonzero(np.diff(complete.reached)))


def explain(costs: StageCosts, boundaries: Indices) -> Blocker:
    """Which layer the heaviest stage would have to hand over, and what refuses it. `boundaries` are
    those of `Plan`.
    """
    places = np.arange(len(boundaries) - 2, -1, -1)
    busy = np.flatnonzero(np.diff(boundaries) > 0)
    loads = costs.load(boundaries[busy], boundaries[busy + 1], places[busy])
    heaviest = int(loads.argmax())
    stage, bottleneck = int(busy[heaviest]), float(loads[heaviest])
    start, stop = int(boundaries[stage]), int(boundaries[stage + 1])
    head = f"Stage {heaviest} ({_layers(costs, start, stop)}) is the heaviest"
    if stop - start == 1:
        return Blocker(
            int(costs.boundaries[start]), "single layer", f"{head}, and cannot be divided."
        )
    blockers = []
    if heaviest > 0:
        before = busy[heaviest - 1]
        run = (int(boundaries[before]), start + 1)
        blockers.append(_blocker(costs, bottleneck, start, heaviest - 1, run, int(places[before])))
    if heaviest < len(busy) - 1:
        after = busy[heaviest + 1]
        run = (stop - 1, int(boundaries[after + 1]))
        blockers.append(
            _blocker(costs, bottleneck, stop - 1, heaviest + 1, run, int(places[after]))
        )
    if not blockers:
        return Blocker(None, None, f"{head}, and the only one.")
    return Blocker(
        blockers[0].layer,
        blockers[0].constraint,
        f"{head}; {', and '.join(b.sentence for b in blockers)}.",
    )


def _blocker(
    costs: StageCosts, bottleneck: float, block: int, neighbour: int, run: Run, place: int
) -> Blocker:
    """What a neighbour that holds the run after taking over the block would exceed."""
    start, stop = run
    layer = int(costs.boundaries[block])
    head = f"giving {_layers(costs, block, block + 1)} to stage {neighbour} would"
    if start < costs.apart_start[stop]:
        return Blocker(layer, "constraint", f"{head} join layers that are kept apart")
    if (start, stop) in costs.forbidden_runs:
        return Blocker(layer, "memory", f"{head} make a stage that was measured and does not fit")
    if not costs.is_allowed(start, stop, place):
        excess = float(costs.memory(start, stop, place) - costs.by_place[0][place])
        return Blocker(layer, "memory", f"{head} exceed its capacity by {excess:,.0f} bytes")
    load = float(costs.load(start, stop, place))
    comparison = "no less than" if load >= bottleneck else "below"
    figures = f"{load * costs.quantum:.6g}, {comparison} {bottleneck * costs.quantum:.6g}"
    return Blocker(layer, "load", f"{head} load it with {figures}")


def _refuse_block(costs: StageCosts, num_stages: int) -> None:
    """Raise if a single block fits no place."""
    starts = np.arange(costs.num_blocks)
    allowed = np.zeros(costs.num_blocks, dtype=bool)
    for place in range(1 if costs.is_uniform else num_stages):
        allowed |= costs.is_allowed(starts, starts + 1, place)
    if allowed.all():
        return
    block = int(np.flatnonzero(~allowed)[0])
    place = int(costs.by_place[0][:num_stages].argmax())
    needed = float(costs.memory(block, block + 1, place))
    capacity = float(costs.by_place[0][place])
    layers = (int(costs.boundaries[block]), int(costs.boundaries[block + 1]))
    raise CapacityError(
        f"{_layers(costs, block, block + 1)} alone needs {needed:,.0f} bytes and the capacity is "
        f"{capacity:,.0f}: "
        f"{needed - capacity:,.0f} bytes too many, in any partition.",
        layers=layers,
        needed_bytes=needed,
        capacity=capacity,
        certificate=(layers,),
    )


def _layers(costs: StageCosts, start: int, stop: int) -> str:
    first, last = int(costs.boundaries[start]), int(costs.boundaries[stop]) - 1
    names = costs.problem.names
    if first == last:
        return _named(names, first)
    return f"{_named(names, first)} to {_named(names, last)}"


def _named(names: tuple[str, ...], layer: int) -> str:
    return names[layer] if names[layer] == f"layer {layer}" else f"layer {layer} '{names[layer]}'"


def _count(costs: StageCosts, num_stages: int) -> str:
    return f"exactly {num_stages}" if costs.problem.exactly else f"at most {num_stages}"
