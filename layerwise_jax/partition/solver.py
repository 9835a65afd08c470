"""Partitioner: cuts a sequence of layers into stages, exactly, with a certificate.

`solve` takes plain numbers, `partition_layers` takes layer costs, and `solve_measured` takes a
function that measures a stage. The modules behind them, in the order of use:

    options       constraints and objective, checked
    problem       options and layers as arrays; `checks` refuses wrong values by name
    stage_costs   load and memory of any stage
    sweep         fast method, and the condition under which it is exact
    search        dynamic programming over all cuts, always exact
    bottleneck    chooses one of the two for the smallest bottleneck
    evenness      even stages among the optima
    optimize      fewest stages and makespans, reduced to bottlenecks
    measured      memory by measurements: verify, forbid, solve again
    greedy        the paper's greedy layer aggregation
    solution      from blocks and units to the caller's layers and seconds
    certificate   proof that nothing better exists, or nothing at all
    result        Partition and CapacityError
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from layerwise_jax._arguments import checked_choice
from layerwise_jax.partition.greedy import greedy_solution
from layerwise_jax.partition.measured import verified_partition
from layerwise_jax.partition.optimize import optimal_solution
from layerwise_jax.partition.options import SolveOptions
from layerwise_jax.partition.problem import make_problem
from layerwise_jax.partition.result import CapacityError, Partition
from layerwise_jax.partition.solution import conclude
from layerwise_jax.partition.stage_costs import stage_costs

__all__ = [
    "CapacityError",
    "LayerOptions",
    "Partition",
    "SolveOptions",
    "partition_layers",
    "solve",
    "solve_measured",
]
_METHODS = ("dp", "greedy")
_MEMORY = ("additive", "peak")


class LayerSizes(Protocol):
    """Figures of a layer that `partition_layers` reads; `layerwise_jax.cost.LayerCost` has them."""

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


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerOptions:
    """Choices of how `partition_layers` reads its layers, checked when they are made.

    Attributes:
      seconds: (n,) time of each layer. None for loads by flops if any layer has some, else by bytes
        accessed if any layer has some, else by sizes.
      cut_seconds: (n + 1,) time to cross each boundary; needs `seconds`.
      cut_bytes: (n + 1,) bytes that cross each boundary, instead of `cut_seconds`; needs `seconds`
        and `link_bandwidth`.
      link_bandwidth: bytes per second.
      memory: "additive" is the paper's S(P) = sum of size(l) <= C, where size is weight +
        activation + buffer; "peak" adds weights only, and takes the largest activation + buffer of
        the stage.
      measure: (start, stop) -> bytes of the stage of the layers start..stop-1. If given, every
        stage is verified as by `solve_measured`.

    Raises:
      ValueError: a value is refused, or cut costs lack `seconds` or `link_bandwidth`.
    """

    seconds: ArrayLike | None = None
    cut_seconds: ArrayLike | None = None
    cut_bytes: ArrayLike | None = None
    link_bandwidth: float | None = None
    memory: str = "additive"
    measure: Callable[[int, int], float] | None = None

    def __post_init__(self) -> None:
        checked_choice("memory", self.memory, _MEMORY)
        has_cuts = self.cut_seconds is not None or self.cut_bytes is not None
        if has_cuts and self.seconds is None:
            raise ValueError(
                "seconds must be given with cut costs, which are weighed against them, got "
                "seconds is None."
            )
        if self.cut_bytes is None:
            return
        if self.cut_seconds is not None:
            raise ValueError("cut_seconds must be None with cut_bytes, got both. Drop one of them.")
        if self.link_bandwidth is None or not self.link_bandwidth > 0:
            raise ValueError(
                "link_bandwidth must be above 0 bytes per second with cut_bytes, got "
                f"{self.link_bandwidth}."
            )

    def crossing_seconds(self) -> ArrayLike | None:
        """(n + 1,) time to cross each boundary; None if cuts cost nothing."""
        if self.cut_bytes is None:
            return self.cut_seconds
        assert self.link_bandwidth is not None
        return np.asarray(self.cut_bytes, dtype=np.float64) / self.link_bandwidth


def solve(
    seconds: ArrayLike,
    weight_bytes: ArrayLike | None,
    transient_bytes: ArrayLike | None = None,
    cut_seconds: ArrayLike | None = None,
    *,
    method: str = "dp",
    options: SolveOptions | None = None,
    **choices: Any,
) -> Partition:
    """Cuts n layers into contiguous, non-empty stages.

    Args:
      seconds: (n,) time of each layer for one microbatch, in any one unit.
      weight_bytes: (n,) bytes that stay with the stage; they add over a stage. None for none.
      transient_bytes: (n,) bytes that a layer needs while it runs; a stage needs the largest.
      cut_seconds: (n + 1,) time to cross each boundary, 0 at both ends. The stages on both sides
        pay.
      method: "dp" for the optimum, "greedy" for the paper's greedy layer aggregation.
      options: constraints and objective; None for the defaults.
      **choices: single options by name (`max_stages`, `capacity`, ...), which replace those in
        `options`: see `SolveOptions`.

    Raises:
      ValueError: a value is refused; the message names it.
      TypeError: an unknown option.
      CapacityError: no partition satisfies the constraints; the message names the obstacle.
    """
    checked_choice("method", method, _METHODS)
    problem = make_problem(seconds, weight_bytes, transient_bytes, cut_seconds, options, **choices)
    costs = stage_costs(problem)
    return conclude(
        greedy_solution(costs) if method == "greedy" else optimal_solution(costs), method
    )


def solve_measured(
    measure: Callable[[int, int], float],
    seconds: ArrayLike,
    weight_bytes: ArrayLike | None = None,
    transient_bytes: ArrayLike | None = None,
    cut_seconds: ArrayLike | None = None,
    *,
    max_measurements: int | None = None,
    options: SolveOptions | None = None,
    **choices: Any,
) -> Partition:
    """Cuts n layers into the best stages that were all measured and fit.

    Args:
      measure: (start, stop) -> bytes of the stage of the layers start..stop-1. Called once for each
        run.
      seconds: as in `solve`.
      weight_bytes: (n,) lower bound on the bytes of a layer; runs that it refuses are not measured.
        If weight_bytes or transient_bytes exceed the measured bytes, the result still fits but may
        not be the best.
      transient_bytes: (n,) as weight_bytes.
      cut_seconds: as in `solve`.
      max_measurements: largest number of measurements; None for no limit.
      options: as in `solve`; `capacity` is one number.
      **choices: as in `solve`.

    Raises:
      ValueError: a value is refused; the message names it.
      TypeError: an unknown option.
      CapacityError: no partition is left; its certificate holds the measured runs that do not fit.
      RuntimeError: max_measurements were made and gave neither a partition nor a proof.
    """
    problem = make_problem(seconds, weight_bytes, transient_bytes, cut_seconds, options, **choices)
    return verified_partition(problem, measure, max_measurements)


def partition_layers(
    costs: Sequence[LayerSizes],
    num_stages: int | None = None,
    capacity: ArrayLike | None = None,
    method: str = "dp",
    *,
    options: SolveOptions | None = None,
    **choices: Any,
) -> Partition:
    """Cuts measured layers into stages.

    Args:
      costs: n layers.
      num_stages: exactly as many non-empty stages; None for the fewest that fit the capacity.
      capacity: bytes of a stage, or one for each stage in order; None to balance only.
      method: "dp" for the optimum, "greedy" for the paper's greedy layer aggregation.
      options: further constraints and objective; None for the defaults. `num_stages` and `capacity`
        replace theirs where given.
      **choices: single options by name, of `LayerOptions` (`seconds`, `cut_bytes`, `memory`,
        `measure`, ...), of `SolveOptions`, or `max_measurements` of `solve_measured`.

    Raises:
      ValueError: a value is refused; the message names it.
      TypeError: an unknown option.
      CapacityError: the layers do not fit; the message names the layer and its three sizes, or the
        fewest stages.
    """
    options = options or SolveOptions()
    implied = _implied(costs, num_stages, capacity, options)
    names = {field.name for field in fields(LayerOptions)}
    reading = LayerOptions(**{name: choices.pop(name) for name in names & set(choices)})
    if reading.measure is not None and method != "dp":
        raise ValueError(
            "method must be 'dp' if stages are measured, since only method='dp' can choose again, "
            f"got {method!r}."
        )
    solver = (
        partial(solve, method=method)
        if reading.measure is None
        else partial(solve_measured, reading.measure)
    )
    weight_bytes, transient_bytes = _memory(costs, reading.memory)
    try:
        return solver(
            _loads(costs) if reading.seconds is None else reading.seconds,
            weight_bytes,
            transient_bytes,
            reading.crossing_seconds(),
            options=options,
            **implied | choices,
        )
    except CapacityError as error:
        if error.layers is None:
            raise
        raise error.with_note(_sizes(costs, *error.layers)) from None


def _implied(
    costs: Sequence[LayerSizes],
    num_stages: int | None,
    capacity: ArrayLike | None,
    options: SolveOptions,
) -> dict[str, Any]:
    """Options that follow from the layers, the number of stages and the capacity."""
    implied: dict[str, Any] = {}
    if options.names is None:
        implied["names"] = [layer.name for layer in costs]
    if capacity is not None:
        implied["capacity"] = capacity
    if num_stages is not None:
        return implied | {"max_stages": num_stages, "exactly": True}
    if options.max_stages is not None:
        return implied
    if capacity is None and options.capacity is None:
        raise ValueError(
            "num_stages or capacity must be given, got num_stages and capacity are both None."
        )
    return implied | {"objective": "stages"}


def _sizes(costs: Sequence[LayerSizes], start: int, stop: int) -> str:
    """A sentence with the three sizes of each layer in a run."""
    return " ".join(
        f"Layer {index} '{layer.name}': {layer.weight_bytes:,.0f} bytes of weights, "
        f"{layer.activation_bytes:,.0f} of activations, {layer.buffer_bytes:,.0f} of buffers."
        for index, layer in enumerate(costs[start:stop], start)
    )


def _memory(costs: Sequence[LayerSizes], memory: str) -> tuple[list[float], list[float] | None]:
    """Weight and transient bytes of the layers, as `LayerOptions.memory` counts them."""
    if memory == "additive":
        return [layer.size for layer in costs], None
    weights = [layer.weight_bytes for layer in costs]
    return weights, [layer.activation_bytes + layer.buffer_bytes for layer in costs]


def _loads(costs: Sequence[LayerSizes]) -> list[float]:
    """Figures roughly proportional to time: the first of flops, bytes accessed and sizes that is
    not 0 everywhere.
    """
    flops = [float(layer.flops) for layer in costs]
    if any(flops):
        return flops
    accessed = [float(layer.bytes_accessed) for layer in costs]
    return accessed if any(accessed) else [float(layer.size) for layer in costs]
