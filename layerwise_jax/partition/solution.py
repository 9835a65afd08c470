"""From a plan in blocks and units to the `Partition` that the caller gets, in layers and the
caller's units.
"""

from dataclasses import dataclass

import numpy as np

from layerwise_jax.partition.certificate import blocking_runs, explain, fewest_stages
from layerwise_jax.partition.checks import Floats
from layerwise_jax.partition.result import Partition
from layerwise_jax.partition.stage_costs import Indices, StageCosts
from layerwise_jax.partition.sweep import Sweep


@dataclass(frozen=True, eq=False)
class Solution:
    """A partition in blocks and units: boundaries from the front, where an idle place repeats its
    boundary.

    `lower_bound` is in units of the objective; `failed` is the sweep that proves it, if a sweep
    does.
    """

    costs: StageCosts
    boundaries: Indices
    lower_bound: float
    failed: Sweep | None = None
    proof: str = "every cut was searched."

    @property
    def busy(self) -> Indices:
        """The stages that are not idle, as positions in `boundaries`."""
        return np.flatnonzero(np.diff(self.boundaries) > 0)

    @property
    def places(self) -> Indices:
        """The place of each stage that is not idle, from the front."""
        return len(self.boundaries) - 2 - self.busy

    @property
    def loads(self) -> Floats:
        """Units of time of each stage that is not idle, from the front."""
        return self.costs.load(
            self.boundaries[self.busy], self.boundaries[self.busy + 1], self.places
        )

    @property
    def bytes(self) -> Floats:
        """Bytes of each stage that is not idle, from the front."""
        return self.costs.memory(
            self.boundaries[self.busy], self.boundaries[self.busy + 1], self.places
        )


def conclude(plan: Solution, method: str) -> Partition:
    """The plan in layers, with what blocks a better one and why the lower bound holds."""
    costs, problem = plan.costs, plan.costs.problem
    blocker = explain(costs, plan.boundaries)
    certificate, proof = _proof(plan)
    devices = plan.busy if costs.may_idle else np.arange(len(plan.busy))
    return Partition(
        boundaries=(0, *costs.boundaries[plan.boundaries[plan.busy + 1]].tolist()),
        stage_loads=tuple((plan.loads * costs.quantum).tolist()),
        stage_bytes=tuple(plan.bytes.tolist()),
        lower_bound=plan.lower_bound * costs.quantum,
        objective=problem.objective,
        objective_value=objective_value(costs, plan.loads) * costs.quantum,
        method=method,
        devices=tuple(devices.tolist()),
        capacity=None
        if problem.capacity is None
        else tuple(costs.by_place[0][plan.places].tolist()),
        fewest_stages=_fewest(plan),
        blocking_layer=blocker.layer,
        blocking_constraint=blocker.constraint,
        limits=blocker.sentence,
        certificate=certificate,
        proof=proof,
    )


def _fewest(plan: Solution) -> int | None:
    """The fewest stages that fit, where there is a capacity to fit and the count is exact."""
    problem = plan.costs.problem
    if problem.objective == "stages":
        return len(plan.busy)
    if problem.capacity is None or problem.is_soft or problem.forbidden:
        return None
    return fewest_stages(plan.costs)


def objective_value(costs: StageCosts, loads: Floats) -> float:
    """The problem's objective, in units, for the loads of the stages."""
    extra = costs.problem.num_microbatches - 1
    if costs.problem.objective == "makespan":
        return float(loads.sum() + extra * loads.max())
    if costs.problem.objective == "lockstep_makespan":
        # A device that is passed over still relays, for one tick.
        ticks_to_fill = costs.problem.max_stages if costs.may_idle else len(loads)
        return float((extra + ticks_to_fill) * loads.max())
    return float(loads.max())


def _proof(plan: Solution) -> tuple[tuple[tuple[int, int], ...], str]:
    """Runs of layers that no better partition can keep whole, where they say it all, and a
    sentence.
    """
    costs = plan.costs
    if plan.proof:
        return (), plan.proof
    if plan.failed is None:
        heaviest = int(np.diff(costs.compute).argmax())
        first, last = int(costs.boundaries[heaviest]), int(costs.boundaries[heaviest + 1]) - 1
        if np.diff(costs.compute)[heaviest] / costs.by_place[1].max() >= plan.lower_bound:
            return (
                (),
                f"layers {first}..{last} alone take as long."
                if last > first
                else f"layer {first} alone takes as long.",
            )
        return (), "it is the mean load of the stages."
    if costs.has_cuts or costs.may_idle:
        return (
            (),
            (
                "sweeps from the end that take all they can under any smaller bound do "
                "not reach the "
                "first layer."
            ),
        )
    runs = blocking_runs(costs, plan.failed)
    return runs, (
        f"each of {len(runs)} runs of layers (certificate) has to be cut inside, at a boundary of "
        "its own, "
        f"and {len(runs)} stages have only {len(runs) - 1} boundaries between them."
    )
