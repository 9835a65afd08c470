"""Certificates in layers: proofs that no better partition exists, or none at all.

The proof by a failed sweep: with one more block, none of its stages would fit. A partition into k
stages has k - 1 boundaries between stages. k runs of which each needs a boundary strictly inside,
no two the same one, are therefore one too many. (Where places differ, run r need only be refused at
place r; the induction is in `sweep`.)
"""

from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from layerwise_jax._tables import plural
from layerwise_jax.partition.checks import Run
from layerwise_jax.partition.result import CapacityError
from layerwise_jax.partition.stage_costs import Indices, StageCosts
from layerwise_jax.partition.sweep import Sweep, sweep


@dataclass(frozen=True)
class Blocker:
    """Reason why the heaviest stage cannot pass a layer to a neighbour.

    Attributes:
      layer: the layer that would move; None if there is only one stage.
      constraint: "load", "memory", "constraint" or "single layer"; None too.
      sentence: the reason in words.
    """

    layer: int | None
    constraint: str | None
    sentence: str


def blocking_runs(costs: StageCosts, failed: Sweep) -> tuple[Run, ...]:
    """The stages of a failed sweep, each extended by one block: runs of layers from the front."""
    busy = failed.reached[1:] > 0
    starts, stops = failed.reached[1:][busy] - 1, failed.reached[:-1][busy]
    runs = zip(costs.boundaries[starts].tolist(), costs.boundaries[stops].tolist(), strict=True)
    return tuple(sorted(set(runs)))


def refuse(costs: StageCosts, failed: Sweep | None, num_stages: int) -> NoReturn:
    """Raises the CapacityError of a problem without a solution.

    It names the layers that exceed the capacity, or the number of stages that would do.

    Args:
      costs: the problem.
      failed: the sweep that proves it; None after a search over all cuts.
      num_stages: the most stages.
    """
    _refuse_block(costs, num_stages)
    if failed is None:
        raise CapacityError(
            f"No partition into {_count(costs, num_stages)} {plural(num_stages, 'stage')} "
            "satisfies the constraints: every cut was searched. Allow more stages or relax a "
            "constraint."
        )
    capacity = float(costs.by_place[0][:num_stages].max())
    limit = "" if np.isinf(capacity) else f" of {capacity:,.0f} bytes"
    if costs.devices_differ:
        raise CapacityError(
            f"{costs.problem.num_layers} layers do not fit {num_stages} devices in this order, "
            f"the largest{limit}: filled from the last one, they do not reach the first layer. Use "
            "more devices, another order, or capacity=None.",
            capacity=capacity,
        )
    runs = blocking_runs(costs, failed)
    fewest = fewest_stages(costs)
    stages = plural(num_stages, "stage")
    advice = f"{fewest} stages would do" if fewest else "no number of stages would do"
    raise CapacityError(
        f"{costs.problem.num_layers} layers do not fit {num_stages} {stages}{limit}: {advice}. "
        f"Each of {len(runs)} {plural(len(runs), 'run')} of layers, the first "
        f"{runs[0][0]}..{runs[0][1] - 1}, needs a boundary inside.",
        capacity=capacity,
        fewest_stages=fewest,
        certificate=runs,
    )


def fewest_stages(costs: StageCosts) -> int | None:
    """The fewest stages that satisfy the constraints, whatever their load.

    None if no number does, or if devices differ. Exact under the condition of `sweep`; cut times
    have no influence.
    """
    if costs.devices_differ:
        return None
    complete = sweep(costs, np.inf, len(costs.by_place[0]))
    if not complete.is_complete:
        return None
    return int(np.count_nonzero(np.diff(complete.reached)))


def explain(costs: StageCosts, boundaries: Indices) -> Blocker:
    """The layer that the heaviest stage would have to pass on, and the constraint against it.

    `boundaries` are block boundaries from the front, idle places included.
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
            int(costs.boundaries[start]), "single layer", f"{head} and cannot be divided."
        )
    blockers: list[Blocker] = []
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
        return Blocker(None, None, f"{head} and the only one.")
    return Blocker(
        blockers[0].layer,
        blockers[0].constraint,
        f"{head}: {', and '.join(b.sentence for b in blockers)}.",
    )


def _blocker(
    costs: StageCosts, bottleneck: float, block: int, neighbour: int, run: Run, place: int
) -> Blocker:
    """The limit that a neighbour would exceed if it took over the block.

    Args:
      costs: the problem.
      bottleneck: load of the heaviest stage, in units.
      block: the block that would move.
      neighbour: index of the stage that would take it.
      run: the neighbour's blocks with the moved one.
      place: the neighbour's place.
    """
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
    """Raises if some block by itself fits no place."""
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
        f"{_layers(costs, block, block + 1)} by itself needs {needed:,.0f} bytes, "
        f"{needed - capacity:,.0f} more than the capacity of {capacity:,.0f} bytes, in any "
        "partition.",
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
