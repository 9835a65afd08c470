"""Results of the partitioner: `Partition` and `CapacityError`, each with its certificate."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

from layerwise_jax._tables import plural, wrapped
from layerwise_jax.render.bars import Bar, Bars, Segment
from layerwise_jax.render.html import bars_html, text_html
from layerwise_jax.render.plots import plot_bars

_STAGES_PRINTED = 64


@dataclass(frozen=True, repr=False)
class Partition:
    """Contiguous stages: stage s holds the layers `boundaries[s]` to `boundaries[s + 1] - 1`.

    Attributes:
        boundaries: 0 = boundaries[0] < ... < boundaries[-1] = n.
        stage_loads: seconds (or the unit of the given times) of each stage, cuts included.
        stage_bytes: bytes of each stage.
        lower_bound: lower bound on the objective of any partition, in the unit of the loads.
        objective: the minimized figure: "bottleneck", "stages", "makespan" or
          "lockstep_makespan".
        objective_value: that figure for this partition.
        method: "dp" or "greedy".
        devices: index of each stage's device; increasing, and some devices may stay idle.
        capacity: bytes of each stage's device; None without a capacity.
        fewest_stages: the fewest stages that fit the capacity; None if not counted.
        blocking_layer: the layer of the heaviest stage that a neighbour cannot take, or the only
            layer of that stage; None if the heaviest stage is the only one.
        blocking_constraint: constraint against that move: "load", "memory", "constraint" or
          "single layer".
        limits: the same as a sentence.
        certificate: runs of layers (start, stop), none of which can be one stage of a better
            partition. Each needs a boundary strictly inside, no two share one, and there are as
            many runs as stages: one boundary too few. Where memory depends on a stage's place in
            the schedule, the runs count at theirs, from the end. Empty where the lower bound has
            another reason, which `proof` gives.
        proof: why the lower bound holds.
        measured: (start, stop, bytes) of every stage that was measured on the way, if any was.
    """

    boundaries: tuple[int, ...]
    stage_loads: tuple[float, ...]
    stage_bytes: tuple[float, ...]
    lower_bound: float
    objective: str
    objective_value: float
    method: str
    devices: tuple[int, ...]
    capacity: tuple[float, ...] | None
    fewest_stages: int | None
    blocking_layer: int | None
    blocking_constraint: str | None
    limits: str
    certificate: tuple[tuple[int, int], ...]
    proof: str
    measured: tuple[tuple[int, int, float], ...] = ()

    def __post_init__(self) -> None:
        steps = zip(self.boundaries, self.boundaries[1:], strict=False)
        if (
            len(self.boundaries) < 2
            or self.boundaries[0] != 0
            or any(stop <= start for start, stop in steps)
        ):
            raise ValueError(
                f"boundaries must be increasing layer indices from 0, got {self.boundaries}."
            )
        for name in ("stage_loads", "stage_bytes", "devices", "capacity"):
            values = getattr(self, name)
            if values is not None and len(values) != self.num_stages:
                raise ValueError(
                    f"{name} must have {self.num_stages} entries, one for each stage, got "
                    f"{len(values)}."
                )

    @property
    def num_stages(self) -> int:
        return len(self.boundaries) - 1

    @property
    def num_layers(self) -> int:
        return self.boundaries[-1]

    @property
    def bottleneck(self) -> float:
        """The largest stage load."""
        return max(self.stage_loads)

    @property
    def gap(self) -> float:
        """Upper bound on (objective - optimum) / lower bound; 0 for a proven optimum."""
        if self.objective_value <= self.lower_bound:
            return 0.0
        return math.inf if self.lower_bound == 0 else self.objective_value / self.lower_bound - 1

    @property
    def is_optimal(self) -> bool:
        return self.gap == 0

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """The run of layers (start, stop) of each stage."""
        return tuple(zip(self.boundaries, self.boundaries[1:], strict=False))

    def stage_of(self, layer: int) -> int:
        """The stage that holds a layer."""
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer must be an index in 0..{self.num_layers - 1}, got {layer}.")
        return next(stage for stage, stop in enumerate(self.boundaries[1:]) if layer < stop)

    def to_dict(self) -> dict[str, Any]:
        """The fields as numbers, strings, lists and None, ready for JSON."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Partition":
        """Reads the result of `to_dict`.

        Raises:
            ValueError: an entry is missing, unknown or contradicts another one.
        """
        names = {field.name for field in fields(cls)}
        given = set(values)
        if names != given:
            raise ValueError(
                "values must have exactly a Partition's entries, got them without "
                f"{sorted(names - given)} and with the unknown {sorted(given - names)}."
            )
        return cls(**{name: _frozen(value) for name, value in values.items()})

    def __repr__(self) -> str:
        return (
            f"Partition({self.num_layers} {plural(self.num_layers, 'layer')} over "
            f"{self.num_stages} {plural(self.num_stages, 'stage')} by {self.method}, bottleneck "
            f"{self.bottleneck:.6g}, gap {self.gap:.2%})"
        )

    def _repr_html_(self) -> str:
        return text_html([repr(self)]) + bars_html(self.bars) + text_html([self.limits, self.proof])

    def plot(self) -> Any:
        """A matplotlib figure: the load of each stage, and the lower bound on the bottleneck."""
        return plot_bars(self.bars, repr(self))

    @property
    def bars(self) -> Bars:
        """The load of each stage, with the lower bound as a line if the bottleneck is minimized."""
        bars = [
            Bar(
                f"stage {s}",
                (Segment("load", load),),
                f"layers {start}..{stop - 1}; {size:,.0f} bytes",
            )
            for s, (load, size, (start, stop)) in enumerate(
                zip(self.stage_loads, self.stage_bytes, self.stages, strict=True)
            )
        ]
        bound = self.lower_bound if self.objective == "bottleneck" else None
        return Bars(bars, "{:.4g}".format, bound, "lower bound")

    def __str__(self) -> str:
        head = (
            f"{self.num_layers} {plural(self.num_layers, 'layer')} over {self.num_stages} "
            f"{plural(self.num_stages, 'stage')} by {self.method}: bottleneck "
            f"{self.bottleneck:.6g}, lower bound {self.lower_bound:.6g}, gap {self.gap:.2%}"
        )
        if self.objective != "bottleneck":
            head += f", {self.objective} {self.objective_value:.6g}"
        if self.fewest_stages is not None:
            head += f", fewest stages that fit {self.fewest_stages}"
        tail = [self.limits, f"Lower bound: {self.proof}"]
        return "\n".join([*wrapped([head]), *self._rows(), *wrapped(tail)])

    def _rows(self) -> list[str]:
        rows = [f"{'stage':>5} {'layers':>13} {'load':>12} {'bytes':>16} {'of capacity':>11}"]
        for stage, (start, stop) in enumerate(self.stages[:_STAGES_PRINTED]):
            share = (
                ""
                if self.capacity is None
                else f"{_share(self.stage_bytes[stage], self.capacity[stage]):.1%}"
            )
            rows.append(
                f"{stage:>5} {f'{start}..{stop - 1}':>13} {self.stage_loads[stage]:>12.6g} "
                f"{self.stage_bytes[stage]:>16,.0f} {share:>11}".rstrip()
            )
        hidden = self.num_stages - _STAGES_PRINTED
        return rows + ([f"... and {hidden} more {plural(hidden, 'stage')}"] if hidden > 0 else [])


class CapacityError(ValueError):
    """Raised if no partition satisfies the constraints; the message names the smallest obstacle.

    Attributes:
        layers: the layers (start, stop) that exceed the capacity by themselves, or None.
        needed_bytes: bytes that those layers need; NaN if unknown.
        capacity: bytes of the device in question.
        fewest_stages: a number of stages that would do, or None.
        certificate: runs of layers, none of which can be one stage. Each needs a boundary of its
            own, and there are more of them than boundaries between stages; or, where stages were
            measured, those that do not fit. Empty where devices differ.
    """

    def __init__(
        self,
        message: str,
        *,
        layers: tuple[int, int] | None = None,
        needed_bytes: float = math.nan,
        capacity: float = math.nan,
        fewest_stages: int | None = None,
        certificate: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__(message)
        self.layers = layers
        self.needed_bytes = needed_bytes
        self.capacity = capacity
        self.fewest_stages = fewest_stages
        self.certificate = tuple(certificate)

    def with_lead(self, lead: str) -> "CapacityError":
        """A copy of the error with `lead` before the message."""
        return self._with_message(f"{lead} {self}")

    def with_note(self, note: str) -> "CapacityError":
        """A copy of the error with `note` appended to the message."""
        return self._with_message(f"{self} {note}")

    def _with_message(self, message: str) -> "CapacityError":
        return CapacityError(
            message,
            layers=self.layers,
            needed_bytes=self.needed_bytes,
            capacity=self.capacity,
            fewest_stages=self.fewest_stages,
            certificate=self.certificate,
        )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else (0.0 if part == 0 else math.inf)


def _plain(value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    return [_plain(entry) for entry in cast(tuple[Any, ...], value)]


def _frozen(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return value
    return tuple(_frozen(entry) for entry in cast(Sequence[Any], value))
