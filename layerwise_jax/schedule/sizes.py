"""Sizes of microbatches: small ones first and last shorten the ramp and the drain of a pipeline.

A profile of sizes is a ramp (ascending), a plateau of one size, and a drain (descending). Profiles
are scored by simulation, in the order of a lower bound, until no profile that is left can win.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement

import numpy as np
from numpy.typing import NDArray

from layerwise_jax._arguments import checked_int
from layerwise_jax._tables import plural, seconds_text
from layerwise_jax.schedule.deferral import defer
from layerwise_jax.schedule.table import Schedule
from layerwise_jax.schedule.timing import ScheduleSimulation, simulate_schedule

Floats = NDArray[np.float64]
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class SizeTimes:
    """Measured seconds of every stage for one size of a microbatch.

    Attributes:
      forward: seconds of a forward, one number for each stage.
      backward: seconds of input and weight gradient together, by stage.
      weight_gradient: seconds of the weight gradient if it is split from its backward; None for
        half of `backward`.
      link: seconds of a message over each boundary, one for all or one for each.
    """

    forward: Sequence[float]
    backward: Sequence[float]
    weight_gradient: Sequence[float] | None = None
    link: float = 0.0

    def __post_init__(self) -> None:
        for name in ("backward", "weight_gradient"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.forward):
                raise ValueError(
                    f"{name} must have {len(self.forward)} entries, one for each stage, got "
                    f"{len(values)}."
                )

    @property
    def split(self) -> Sequence[float]:
        """Seconds of W, by stage."""
        if self.weight_gradient is not None:
            return self.weight_gradient
        return [seconds / 2 for seconds in self.backward]


@dataclass(frozen=True)
class SizeSearch:
    """A search for the sizes of the microbatches of a step.

    Attributes:
      num_examples: examples of a replica; the sizes add up to it.
      times: size -> times of the stages. Sizes without times are not used, since times between two
        measured sizes need not lie between theirs.
      generate: number of microbatches -> schedule.
      fits: (sizes, schedule) -> whether every device's memory holds it; None for no limit.
      longest_ramp: the most microbatches of a ramp, and of a drain.
      most_sizes: the most different sizes, each of which costs a compilation.
      deferrals: numbers of weight gradients to defer, tried for all stages alike.
      most_simulations: the search ends after so many.
    """

    num_examples: int
    times: Mapping[int, SizeTimes]
    generate: Callable[[int], Schedule]
    fits: Callable[[Sizes, Schedule], bool] | None = None
    longest_ramp: int = 3
    most_sizes: int = 4
    deferrals: Sequence[int] = (0, 1, 2, 3, 4)
    most_simulations: int = 2000
    _tables: dict[tuple[int, int], Schedule] = field(
        default_factory=dict[tuple[int, int], Schedule], repr=False
    )

    def __post_init__(self) -> None:
        checked_int("num_examples", self.num_examples)
        checked_int("most_sizes", self.most_sizes)
        checked_int("most_simulations", self.most_simulations)
        counts = {len(times.forward) for times in self.times.values()}
        if len(counts) != 1:
            raise ValueError(
                "times must have one size or more, and equally many stages for each, got "
                f"{sorted(counts) or 'none'}."
            )
        for size in self.times:
            checked_int("a size in times", size)

    def schedule(self, num_microbatches: int, deferred: int) -> Schedule | None:
        """The schedule with the last `deferred` weight gradients of each stage at the end.

        None if a stage has fewer whole backwards than that.
        """
        key = (num_microbatches, deferred)
        if key not in self._tables:
            plain = self.generate(num_microbatches)
            whole = [0] * plain.num_stages
            for _, _, action in plain.actions():
                whole[action.stage] += action.kind == "B"
            if deferred > min(whole):
                return None
            self._tables[key] = defer(plain, deferred) if deferred else plain
        return self._tables[key]


@dataclass(frozen=True)
class SizeChoice:
    """The chosen sizes, and the best equal ones beside them.

    Attributes:
      sizes: examples of each microbatch, in order.
      deferred: weight gradients of each stage that are deferred to the end.
      simulation: its simulation.
      equal: the best choice of equal sizes without deferral; None if none divides the examples and
        fits.
      is_proved: True if no other profile is faster; False if the search ended before.
    """

    sizes: Sizes
    deferred: int
    simulation: ScheduleSimulation
    equal: SizeChoice | None = None
    is_proved: bool = True

    @property
    def seconds(self) -> float:
        return self.simulation.makespan

    def __str__(self) -> str:
        count = len(self.sizes)
        text = (
            f"{count} {plural(count, 'microbatch')} of {', '.join(map(str, self.sizes))} examples, "
            f"{self.deferred} deferred weight {plural(self.deferred, 'gradient')} a stage: "
            f"{seconds_text(self.seconds)}"
        )
        if self.equal is None:
            return text
        gain = self.equal.seconds / self.seconds - 1
        return f"{text}; {gain:.1%} faster than {len(self.equal.sizes)} of {self.equal.sizes[0]}"


def choose_sizes(search: SizeSearch) -> SizeChoice:
    """The profile of sizes and the deferral with the shortest simulated step.

    Raises:
      ValueError: no profile adds up to the examples, or none fits the memory.
    """
    profiles = sorted(_profiles(search), key=lambda sizes: (_lower_bound(search, sizes), sizes))
    best: SizeChoice | None = None
    simulations = 0
    is_proved = True
    for sizes in profiles:
        if best is not None and _lower_bound(search, sizes) >= best.seconds:
            break  # so are all that follow
        for deferred in search.deferrals:
            if simulations == search.most_simulations:
                is_proved = False
                break
            found = _scored(search, sizes, deferred)
            simulations += 1
            if found is not None and (best is None or found.seconds < best.seconds):
                best = found
    if best is None:
        raise ValueError(
            f"times must have sizes that add up to {search.num_examples} examples and fit the "
            f"memory, got the sizes {sorted(search.times)}. Measure other sizes."
        )
    equal = _best_equal(search)
    return SizeChoice(best.sizes, best.deferred, best.simulation, equal, is_proved)


def _best_equal(search: SizeSearch) -> SizeChoice | None:
    """The fastest equal sizes without deferral."""
    choices = [
        _scored(search, (size,) * (search.num_examples // size), 0)
        for size in search.times
        if search.num_examples % size == 0
    ]
    found = [choice for choice in choices if choice is not None]
    return min(found, key=lambda choice: choice.seconds, default=None)


def _scored(search: SizeSearch, sizes: Sizes, deferred: int) -> SizeChoice | None:
    """The simulation of a profile; None if it does not fit or cannot defer so many."""
    schedule = search.schedule(len(sizes), deferred)
    if schedule is None or (search.fits is not None and not search.fits(sizes, schedule)):
        return None
    times = [search.times[size] for size in sizes]
    simulation = simulate_schedule(
        schedule,
        np.array([each.forward for each in times]).T,  # [stages, microbatches]
        np.array([each.backward for each in times]).T,
        np.array([each.split for each in times]).T,
        link_seconds=max(each.link for each in times),
    )
    return SizeChoice(sizes, deferred, simulation)


def _lower_bound(search: SizeSearch, sizes: Sizes) -> float:
    """Seconds that no schedule beats: the busiest device, after the shortest way to it."""
    schedule = search.schedule(len(sizes), 0)
    assert schedule is not None
    forward = np.array([search.times[size].forward for size in sizes]).T
    backward = np.array([search.times[size].backward for size in sizes]).T
    busy = (forward + backward).sum(axis=1)  # [stages]
    # Forwards of the quickest microbatch before each stage.
    way = np.concatenate([[0.0], np.cumsum(forward, axis=0).min(axis=1)])
    return max(
        float(way[stages[0]] + busy[list(stages)].sum())
        for stages in schedule.stages_of_device
        if stages
    )


def _profiles(search: SizeSearch) -> Iterator[Sizes]:
    """All profiles that add up to the examples, each once."""
    seen: set[Sizes] = set()
    for plateau in search.times:
        smaller = sorted(size for size in search.times if size < plateau)
        for ramp in _ascending(smaller, search.longest_ramp):
            for drain in _ascending(smaller, search.longest_ramp):
                rest = search.num_examples - sum(ramp) - sum(drain)
                if rest < plateau or rest % plateau:
                    continue
                sizes = (*ramp, *[plateau] * (rest // plateau), *drain[::-1])
                if len(set(sizes)) <= search.most_sizes and sizes not in seen:
                    seen.add(sizes)
                    yield sizes


def _ascending(sizes: Sequence[int], longest: int) -> Iterator[Sizes]:
    """Non-decreasing sequences of up to `longest` of the sizes."""
    for length in range(longest + 1):
        yield from combinations_with_replacement(sizes, length)
