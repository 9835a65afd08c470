"""Load and memory of any run of layers, for whole arrays of runs at once.

Layers that must stay together form one *block*. Here and in the solvers, a run `(start, stop)`
counts blocks, and `StageCosts.boundaries` maps block boundaries to layer boundaries. A *place* is
a stage's distance from the end of the pipeline: 0 is the last stage. Places count from the end
because the microbatches in flight do.

    compute(start, stop) = sum of seconds
    load(start, stop)    = compute / speed + cut in + cut out             (communication="add")
                         = max(compute / speed, cut in, cut out)          (communication="overlap")
    memory(start, stop)  = sum of weights, each tied weight once
                         + (sum of stash) * microbatches in flight at its place
                         + max of transient bytes
    soft capacity:  load = ... + max(0, memory - capacity) / streaming bandwidth
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from layerwise_jax.partition.checks import Floats
from layerwise_jax.partition.problem import Problem
from layerwise_jax.schedule.registry import SCHEDULES

type Indices = NDArray[np.int64]
type CutPoint = int | Indices


@dataclass(frozen=True, eq=False)
class StageCosts:
    """Prefix sums from which the costs of any run of blocks are read.

    Loads are whole multiples of `quantum` seconds, held in float64; memory is in bytes.

    Attributes:
      problem: the checked problem.
      boundaries: [num_blocks + 1], layer boundary of each block boundary.
      quantum: seconds of one unit of load, a power of two.
      compute: [num_blocks + 1], prefix sum of seconds, in units.
      cut: [num_blocks + 1], time to cross each boundary, in units.
      weight: [num_blocks + 1], prefix sum of weight bytes.
      stash: [num_blocks + 1], prefix sum of stash bytes of one microbatch.
      peaks: [levels, num_blocks], largest transient bytes of 2**level blocks from each start.
      tied: blocks that use a weight, and its bytes.
      apart_start: [num_blocks + 1], smallest start of a run by stop, from `keep_apart`.
    """

    problem: Problem
    boundaries: Indices
    quantum: float
    compute: Floats
    cut: Floats
    weight: Floats
    stash: Floats
    peaks: Floats
    tied: tuple[tuple[Indices, float], ...]
    apart_start: Indices

    @property
    def num_blocks(self) -> int:
        return len(self.boundaries) - 1

    @property
    def has_cuts(self) -> bool:
        return bool(self.cut.any())

    @cached_property
    def heaviest_block(self) -> float:
        """The largest compute of one block, in units."""
        return float(np.diff(self.compute).max())

    @cached_property
    def by_place(self) -> tuple[Floats, Floats, Floats]:
        """Capacity, speed and microbatches in flight at each place, the last stage first.

        Equal devices have an entry for each block, so that the fewest stages can be counted beyond
        `max_stages`.
        """
        problem = self.problem
        given = [
            array
            for array in (problem.capacity, problem.speeds)
            if array is not None and len(array) > 1
        ]
        count = problem.max_stages if given else max(self.num_blocks, problem.max_stages)
        capacity = np.broadcast_to(
            np.inf if problem.capacity is None else problem.capacity[::-1], (count,)
        )
        speed = np.broadcast_to(1.0 if problem.speeds is None else problem.speeds[::-1], (count,))
        formula = SCHEDULES[problem.schedule].in_flight
        assert formula is not None
        in_flight = formula(np.arange(count), problem.num_microbatches)
        return capacity, speed, in_flight if problem.stash_bytes.any() else np.ones(count)

    @cached_property
    def is_uniform(self) -> bool:
        """True if a run costs the same at every place."""
        return all((array == array[0]).all() for array in self.by_place)

    @cached_property
    def devices_differ(self) -> bool:
        """True if the devices differ in capacity or speed."""
        capacity, speed, _ = self.by_place
        return any(bool((array != array[0]).any()) for array in (capacity, speed))

    @property
    def may_idle(self) -> bool:
        """True if a device may stay idle."""
        return self.devices_differ and not self.problem.exactly

    @cached_property
    def forbidden_runs(self) -> frozenset[tuple[int, int]]:
        """The forbidden runs in blocks; runs that end inside a block cannot be stages anyway."""
        block_of = {int(boundary): block for block, boundary in enumerate(self.boundaries)}
        runs = ((block_of.get(start), block_of.get(stop)) for start, stop in self.problem.forbidden)
        return frozenset(
            (start, stop) for start, stop in runs if start is not None and stop is not None
        )

    @cached_property
    def is_additive(self) -> bool:
        """True if the load is a plain sum, the same at every place."""
        separate = self.problem.is_soft or (self.problem.overlap and self.has_cuts)
        return not separate and self.is_uniform and bool(self.by_place[1][0] == 1)

    @cached_property
    def has_fixed_total(self) -> bool:
        """True if the loads of every partition have the same sum."""
        speed = self.by_place[1]
        return not self.problem.is_soft and not self.has_cuts and bool((speed == speed[0]).all())

    @cached_property
    def has_limit(self) -> bool:
        """True if some run may be refused whatever its load."""
        hard = self.problem.capacity is not None and not self.problem.is_soft
        return hard or bool(self.apart_start.any())

    @cached_property
    def allowed_starts(self) -> Indices:
        """[num_blocks], smallest start of an allowed run by stop - 1, if places are equal."""
        stops = np.arange(1, self.num_blocks + 1)
        return earliest_starts(stops, self.is_allowed) if self.has_limit else np.zeros_like(stops)

    def load(self, start: ArrayLike, stop: ArrayLike, place: CutPoint = 0) -> Floats:
        """Load of runs of one block or more at a place, in units. `start` and `stop` broadcast."""
        start, stop = np.asarray(start), np.asarray(stop)
        capacity, speed, _ = self.by_place
        load = (self.compute[stop] - self.compute[start]) / speed[place]
        if self.problem.is_soft:
            excess = np.maximum(self.memory(start, stop, place) - capacity[place], 0)
            load = load + excess / self.problem.streaming_bandwidth / self.quantum
        if self.problem.overlap:
            return np.maximum(load, np.maximum(self.cut[start], self.cut[stop]))
        return load + self.cut[start] + self.cut[stop]

    def memory(self, start: ArrayLike, stop: ArrayLike, place: CutPoint = 0) -> Floats:
        """Bytes of runs of one block or more at a place. `start` and `stop` broadcast."""
        start, stop = np.asarray(start), np.asarray(stop)
        in_flight = self.by_place[2][place]
        total = (
            self.weight[stop]
            - self.weight[start]
            + (self.stash[stop] - self.stash[start]) * in_flight
        )
        for members, size in self.tied:
            count = np.searchsorted(members, stop) - np.searchsorted(members, start)
            total = total - np.maximum(count - 1, 0) * size
        return total + self._peak(start, stop)

    def is_allowed(
        self, start: ArrayLike, stop: ArrayLike, place: CutPoint = 0
    ) -> NDArray[np.bool_]:
        """True for runs that respect the hard capacity and `keep_apart`."""
        allowed = np.asarray(start) >= self.apart_start[np.asarray(stop)]
        if self.problem.capacity is None or self.problem.is_soft:
            return allowed
        return allowed & (self.memory(start, stop, place) <= self.by_place[0][place])

    def fits(
        self, start: ArrayLike, stop: ArrayLike, bound: float, place: CutPoint = 0
    ) -> NDArray[np.bool_]:
        """True for allowed runs whose load is at most `bound`."""
        return self.is_allowed(start, stop, place) & (self.load(start, stop, place) <= bound)

    def _peak(self, start: Indices, stop: Indices) -> Floats:
        """The largest transient bytes of each run.

        Two overlapping windows of a power of two blocks cover the run.
        """
        level = np.frexp((stop - start).astype(np.float64))[1] - 1
        return np.maximum(self.peaks[level, start], self.peaks[level, stop - (1 << level)])

    def without_cuts(self) -> "StageCosts":
        """The same costs without cut times, a relaxation whose optimum is a lower bound."""
        return replace(self, cut=np.zeros_like(self.cut))

    def at(self, kept: Indices) -> "StageCosts":
        """The same problem with cuts only at the block boundaries `kept` (with both ends)."""
        return _build(self.problem, self.boundaries[kept])


def stage_costs(problem: Problem) -> StageCosts:
    """Builds the costs of a problem, after which any run is read in constant time."""
    is_open = np.ones(problem.num_layers + 1, dtype=bool)
    for first, last in problem.keep_together:
        is_open[first + 1 : last + 1] = False
    return _build(problem, np.flatnonzero(is_open))


def earliest_starts(
    stops: Indices, fits: Callable[[Indices, Indices], NDArray[np.bool_]]
) -> Indices:
    """For each stop, the smallest start of a run that fits; the stop itself if no block fits.

    Bisection over all stops at once; exact if every sub-run of a run that fits also fits.
    """
    low = np.zeros_like(stops)
    high = stops.copy()
    while (low < high).any():
        middle = np.minimum((low + high) // 2, stops - 1)
        does_fit = fits(middle, stops)
        high = np.where(does_fit, middle, high)
        low = np.where(does_fit, low, middle + 1)
    return low


def _build(problem: Problem, boundaries: Indices) -> StageCosts:
    quantum = _quantum(problem)
    compute = _prefix(np.rint(problem.seconds / quantum))[boundaries]
    return StageCosts(
        problem=problem,
        boundaries=boundaries,
        quantum=quantum,
        compute=compute,
        cut=np.rint(problem.cut_seconds / quantum)[boundaries],
        weight=_prefix(problem.weight_bytes)[boundaries],
        stash=_prefix(problem.stash_bytes)[boundaries],
        peaks=_peaks(np.maximum.reduceat(problem.transient_bytes, boundaries[:-1])),
        tied=tuple(
            (np.searchsorted(boundaries, np.asarray(members), side="right") - 1, size)
            for members, size in problem.tied_weights
        ),
        apart_start=_apart_start(problem, boundaries),
    )


def _quantum(problem: Problem) -> float:
    """Seconds of one unit: a power of two for which sums of units are exact in float64.

    Each time is rounded once to whole units. A load is then off by at most n * 2**-51 of the total
    time, and exact if the times are ints. Later sums and comparisons of loads do not round.
    """
    largest = float(problem.seconds.sum() + 2 * problem.cut_seconds.max())
    return float(np.ldexp(1.0, max(int(np.frexp(largest)[1]) - 50, -1000))) if largest > 0 else 1.0


def _prefix(values: Floats) -> Floats:
    return np.concatenate([[0.0], np.cumsum(values)])


def _peaks(values: Floats) -> Floats:
    """[levels, n]: entry [p, i] is the maximum of values[i : i + 2**p], if that many remain."""
    rows = [values]
    while 2 ** len(rows) <= len(values):
        half = 2 ** (len(rows) - 1)
        row = rows[-1].copy()
        row[:-half] = np.maximum(row[:-half], rows[-1][half:])
        rows.append(row)
    return np.stack(rows)


def _apart_start(problem: Problem, boundaries: Indices) -> Indices:
    """For each stop, the smallest start of a run without a pair of layers that are kept apart."""
    earliest = np.zeros(len(boundaries), dtype=np.int64)
    for first, last in problem.keep_apart:
        first_block, last_block = np.searchsorted(boundaries, [first, last], side="right") - 1
        earliest[last_block + 1] = max(earliest[last_block + 1], first_block + 1)
    return np.maximum.accumulate(earliest)
