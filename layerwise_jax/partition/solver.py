"""Where to cut a sequence of layers into stages: exactly, under a cap, with a certificate.

`solve` takes plain numbers, `partition_layers` takes layer costs,
`solve_measured` takes a function that measures a stage. Behind them, in the order in which they are
used:

    partition_problem      what is asked; partition_checks refuses wrong values by name
    partition_stage        what any stage costs: load and memory
    partition_sweep        the fast method, and the condition under which it is exact
    partition_search       dynamic programming over all cuts, exact always
    partition_bottleneck   which of the two; partition_objective: fewest stages and makespans by way
    of bottlenecks partition_even         among optima, even stages partition_measured     memory by
    measurement: verify, forbid, solve again partition_greedy       the paper's greedy layer
    aggregation partition_plan         from blocks and units back to the caller's layers and seconds
    partition_certificate  why there is nothing better, or nothing at all partition_result
    Partition and CapacityError
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, Unpack

import numpy as np
from numpy.typing import ArrayLike

from layerwise_jax._arguments import checked_choice
from layerwise_jax.partition.greedy import greedy_plan
from layerwise_jax.partition.measured import verified_partition
from layerwise_jax.partition.optimize import optimal_plan
from layerwise_jax.partition.problem import SolveOptions, make_problem
from layerwise_jax.partition.result import CapacityError, Partition
from layerwise_jax.partition.solution import conclude
from layerwise_jax.partition.stage_costs import stage_costs

__all__ = ["CapacityError", "Partition", "partition_layers", "solve", "solve_measured"]
_METHODS = ("dp", "greedy")


class LayerSizes(Protocol):
    """What `partition_layers` reads of a layer; `layerwise_jax.cost.LayerCost` has it."""

    @property
    def name(self) -> str: ...
    @property
    def weight_bytes(self) -> float: ...
    @property
    def activation_bytes(self) -> float: ...
    @property
    def buffer_bytes(self) -> float: ...
    @property
    def flops(self) -> float: ...
    @property
    def bytes_accessed(self) -> float: ...
    @property
    def size(self) -> float: ...


def solve(
    seconds: ArrayLike,
    weight_bytes: ArrayLike | None,
    transient_bytes: ArrayLike | None = None,
    cut_seconds: ArrayLike | None = None,
    *,
    method: str = "dp",
    **options: Unpack[SolveOptions],
) -> Partition:
    """Cut n layers into contiguous, non-empty stages.

    Args:
        seconds: (n,) time of each layer for one microbatch, in any one unit.
        weight_bytes: (n,) bytes that stay with the stage; they add over a stage. None for none.
        transient_bytes: (n,) bytes that a layer needs while it runs; a stage needs the largest.
        cut_seconds: (n + 1,) time to cross each boundary, 0 at both ends. The stages on both sides
          pay.
        method: "dp" for the optimum, "greedy" for the paper's greedy layer aggregation.
        options: `max_stages`, `capacity`, and everything else that `SolveOptions` describes.

    Raises:
        ValueError: a value is refused; the message names it.
        CapacityError: no partition satisfies the constraints; the message names what is in the way.
    """
    costs = stage_costs(
        make_problem(seconds, weight_bytes, transient_bytes, cut_seconds, **options)
    )
    plan = (
        greedy_plan(costs)
        if checked_choice("method", method, _METHODS) == "greedy"
        else optimal_plan(costs)
    )
    return conclude(plan, method)


def solve_measured(
    measure: Callable[[int, int], float],
    seconds: ArrayLike,
    weight_bytes: ArrayLike | None = None,
    transient_bytes: ArrayLike | None = None,
    cut_seconds: ArrayLike | None = None,
    *,
    max_measurements: int | None = None,
    **options: Unpack[SolveOptions],
) -> Partition:
    """Cut n layers into stages each of which was measured and fits, and which no other such
    partition beats.

    Args:
        measure: bytes of the stage that holds the layers start..stop-1, by any rule. Called once a
          run.
        seconds: as in `solve`, like everything that is not described here.
        weight_bytes: bytes that a layer needs for certain; runs that they refuse are not measured.
            Where they, or transient_bytes, say more than would be measured, the answer still fits
            and may not be the best.
        transient_bytes: as weight_bytes.
        cut_seconds: as in `solve`.
        max_measurements: give up after so many; None for no limit.
        options: as in `solve`; `capacity` is one number.

    Raises:
        ValueError: a value is refused; the message names it.
        CapacityError: no partition is left; its certificate holds the runs that were measured and
          do not fit.
        RuntimeError: max_measurements were made and neither a partition nor a proof was found.
    """
    problem = make_problem(seconds, weight_bytes, transient_bytes, cut_seconds, **options)
    return verified_partition(problem, measure, max_measurements)


def partition_layers(
    costs: Sequence[LayerSizes],
    num_stages: int | None = None,
    capacity: ArrayLike | None = None,
    method: str = "dp",
    *,
    seconds: ArrayLike | None = None,
    cut_seconds: ArrayLike | None = None,
    cut_bytes: ArrayLike | None = None,
    link_bandwidth: float | None = None,
    memory: str = "additive",
    measure: Callable[[int, int], float] | None = None,
    **options: Any,
) -> Partition:
    """Cut measured layers into stages.

    Args:
        costs: n layers.
        num_stages: exactly as many non-empty stages; None for the fewest that fit the capacity.
        capacity: bytes of a stage, or one for each stage in order; None to balance only.
        method: "dp" for the optimum, "greedy" for the paper's greedy layer aggregation.
        seconds: (n,) time of each layer. Without it the loads are flops, if any layer has some,
            else bytes accessed, if any layer has some, else sizes.
        cut_seconds: (n + 1,) time to cross each boundary; or
        cut_bytes: (n + 1,) bytes that cross it, together with
        link_bandwidth: bytes per second. Either needs `seconds`.
        memory: "additive" is the paper's S(P) = sum of size(l) <= C, where size is weight +
            activation + buffer; "peak" adds weights only, and takes the largest activation + buffer
            of the stage.
        measure: bytes of the stage that holds the layers start..stop-1; given, `solve_measured`
          verifies every stage.
        options: any other keyword of `solve`, or of `solve_measured`.

    Raises:
        ValueError: a value is refused; the message names it.
        CapacityError: the layers do not fit; the message names the layer and its three sizes, or
          the fewest stages.
    """
    if num_stages is None and capacity is None:
        raise ValueError(
            "num_stages and capacity are both None: give a number of stages, or a capacity to fit."
        )
    if measure is not None and method != "dp":
        raise ValueError(
            f"method is {method!r} and stages are measured; only method='dp' can choose again."
        )
    weight_bytes, transient_bytes = _memory(costs, memory)
    defaults = {
        "exactly": num_stages is not None,
        "objective": "stages" if num_stages is None else "bottleneck",
        "names": [layer.name for layer in costs],
    }
    solver = partial(solve, method=method) if measure is None else partial(solve_measured, measure)
    try:
        return solver(
            _loads(costs) if seconds is None else seconds,
            weight_bytes,
            transient_bytes,
            _cut_seconds(cut_seconds, cut_bytes, link_bandwidth, seconds),
            max_stages=num_stages,
            capacity=capacity,
            **defaults | options,
        )
    except CapacityError as error:
        if error.layers is None:
            raise
        raise error.with_note(_sizes(costs, *error.layers)) from None


def _sizes(costs: Sequence[LayerSizes], start: int, stop: int) -> str:
    """The three sizes of each layer in a run, as a sentence each."""
    return " ".join(
        f"Layer {index} '{layer.name}': {layer.weight_bytes:,.0f} bytes of weights, "
        f"{layer.activation_bytes:,.0f} of "
        f"activations, {layer.buffer_bytes:,.0f} of buffers."
        for index, layer in enumerate(costs[start:stop], start)
    )


def _memory(costs: Sequence[LayerSizes], memory: str) -> tuple[list[float], list[float] | None]:
    if checked_choice("memory", memory, ("additive", "peak")) == "additive":
        return [layer.size for layer in costs], None
    return [layer.weight_bytes for layer in costs], [
        layer.activation_bytes + layer.buffer_bytes for layer in costs
    ]


def _loads(costs: Sequence[LayerSizes]) -> list[float]:
    """Something that is roughly in proportion to time: the first kind of figure that is not 0
    everywhere.
    """
    flops = [float(layer.flops) for layer in costs]
    accessed = [float(layer.bytes_accessed) for layer in costs]
    return (
        flops
        if any(flops)
        else accessed
        if any(accessed)
        else [float(layer.size) for layer in costs]
    )


def _cut_seconds(
    cut_seconds: ArrayLike | None,
    cut_bytes: ArrayLike | None,
    link_bandwidth: float | None,
    seconds: ArrayLike | None,
) -> ArrayLike | None:
    if cut_seconds is None and cut_bytes is None:
        return None
    if seconds is None:
        raise ValueError(
            "cut costs are given and seconds is None: they can only be weighed against layers in "
            "seconds."
        )
    if cut_bytes is None:
        return cut_seconds
    if cut_seconds is not None or link_bandwidth is None or not link_bandwidth > 0:
        raise ValueError(
            "cut_bytes is wanted together with a link_bandwidth above 0, and without cut_seconds."
        )
    return np.asarray(cut_bytes, dtype=np.float64) / link_bandwidth
