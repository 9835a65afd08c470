"""Solution in blocks and integer units, and its conversion to the caller's `Partition`."""

from dataclasses import dataclass

import numpy as np

from layerwise_jax._tables import plural
from layerwise_jax.partition.certificate import blocking_runs, explain, fewest_stages
from layerwise_jax.partition.checks import Floats
from layerwise_jax.partition.result import Partition
from layerwise_jax.partition.stage_costs import Indices, StageCosts
from layerwise_jax.partition.sweep import Sweep


@dataclass(frozen=True, eq=False)
class Solution:
    """A partition in blocks and units.

    Attributes:
      costs: the problem.
      boundaries: block boundaries from the front; an idle place repeats its boundary.
      lower_bound: lower bound on the objective, in units.
      failed: the sweep that proves the lower bound; None if another argument does.
      proof: that argument; "" if `failed` is the proof.
    """

    costs: StageCosts
    boundaries: Indices
    lower_bound: float
    failed: Sweep | None = None
    proof: str = "every cut was searched."

    @property
    def busy(self) -> Indices:
        """Indices in `boundaries` of the stages that are not idle."""
        return np.flatnonzero(np.diff(self.boundaries) > 0)

    @property
    def places(self) -> Indices:
        """Place of each stage that is not idle, from the front."""
        return len(self.boundaries) - 2 - self.busy

    @property
    def loads(self) -> Floats:
        """Load of each stage that is not idle, in units, from the front."""
        return self.costs.load(
            self.boundaries[self.busy], self.boundaries[self.busy + 1], self.places
        )

    @property
    def bytes(self) -> Floats:
        """Bytes of each stage that is not idle, from the front."""
        return self.costs.memory(
            self.boundaries[self.busy], self.boundaries[self.busy + 1], self.places
        )


def conclude(solution: Solution, method: str) -> Partition:
    """Converts a solution to layers and the caller's units, and adds blocker and proof."""
    costs = solution.costs
    problem = solution.costs.problem
    blocker = explain(costs, solution.boundaries)
    certificate, proof = _proof(solution)
    devices = solution.busy if costs.may_idle else np.arange(len(solution.busy))
    return Partition(
        boundaries=(0, *costs.boundaries[solution.boundaries[solution.busy + 1]].tolist()),
        stage_loads=tuple((solution.loads * costs.quantum).tolist()),
        stage_bytes=tuple(solution.bytes.tolist()),
        lower_bound=solution.lower_bound * costs.quantum,
        objective=problem.objective,
        objective_value=objective_value(costs, solution.loads) * costs.quantum,
        method=method,
        devices=tuple(devices.tolist()),
        capacity=None
        if problem.capacity is None
        else tuple(costs.by_place[0][solution.places].tolist()),
        fewest_stages=_fewest(solution),
        blocking_layer=blocker.layer,
        blocking_constraint=blocker.constraint,
        limits=blocker.sentence,
        certificate=certificate,
        proof=proof,
    )


def _fewest(solution: Solution) -> int | None:
    """The fewest stages that fit; None without a hard capacity, or where the count is not exact."""
    problem = solution.costs.problem
    if problem.objective == "stages":
        return len(solution.busy)
    if problem.capacity is None or problem.is_soft or problem.forbidden:
        return None
    return fewest_stages(solution.costs)


def objective_value(costs: StageCosts, loads: Floats) -> float:
    """The problem's objective for stages of the given loads, in units."""
    extra = costs.problem.num_microbatches - 1
    if costs.problem.objective == "makespan":
        return float(loads.sum() + extra * loads.max())
    if costs.problem.objective == "lockstep_makespan":
        # An idle device still relays, for one tick.
        ticks_to_fill = costs.problem.max_stages if costs.may_idle else len(loads)
        return float((extra + ticks_to_fill) * loads.max())
    return float(loads.max())


def _proof(solution: Solution) -> tuple[tuple[tuple[int, int], ...], str]:
    """Certificate of the lower bound (runs of layers, or none) and the proof as a sentence."""
    costs = solution.costs
    if solution.proof:
        return (), solution.proof
    if solution.failed is None:
        heaviest = int(np.diff(costs.compute).argmax())
        first, last = int(costs.boundaries[heaviest]), int(costs.boundaries[heaviest + 1]) - 1
        if np.diff(costs.compute)[heaviest] / costs.by_place[1].max() >= solution.lower_bound:
            if last > first:
                return (), f"layers {first}..{last} by themselves take as long."
            return (), f"layer {first} by itself takes as long."
        return (), "it is the mean load of the stages."
    if costs.has_cuts or costs.may_idle:
        return (
            (),
            "sweeps from the end under any smaller bound do not reach the first layer.",
        )
    runs = blocking_runs(costs, solution.failed)
    return runs, (
        f"each of {len(runs)} {plural(len(runs), 'run')} of layers (certificate) needs another "
        f"boundary inside, and {len(runs)} {plural(len(runs), 'stage')} have only "
        f"{len(runs) - 1} between them."
    )
