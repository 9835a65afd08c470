"""What a stage costs: the load and the memory of any run of layers, for whole arrays of runs at
once.

Layers that must stay together are one *block*; here and in the solvers a run `(start, stop)` counts
blocks, and `StageCosts.boundaries` turns block boundaries back into layer boundaries. A *place* is
a stage's distance from the end of the pipeline: 0 is the last stage. That is the side to count
from, since what a schedule holds in memory depends on it.

    compute(start, stop) = sum of seconds
    load(start, stop)    = compute / speed + cut in + cut out                     (communication
    added)
                         = max(compute / speed, cut in, cut out)                  (communication
                         overlapped)
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

type Indices = NDArray[np.int64]
type CutPoint = int | Indices


@dataclass(frozen=True, eq=False)
class StageCosts:
    """The costs of every run of blocks. Loads are in units of `quantum` seconds, memory in
    bytes.
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

        Equal devices are as many as there are blocks, so that the fewest stages can be counted
        beyond `max_stages`.
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
        in_flight = np.full(count, problem.num_microbatches, dtype=np.float64)
        if problem.schedule == "1f1b":
            in_flight = np.minimum(in_flight, np.arange(1, count + 1))
        return capacity, speed, in_flight if problem.stash_bytes.any() else np.ones(count)

    @cached_property
    def is_uniform(self) -> bool:
        """Whether a run costs the same at every place."""
        return all((array == array[0]).all() for array in self.by_place)

    @cached_property
    def devices_differ(self) -> bool:
        """Whether the devices differ in capacity or speed."""
        capacity, speed, _ = self.by_place
        return any(bool((array != array[0]).any()) for array in (capacity, speed))

    @property
    def may_idle(self) -> bool:
        """Whether a device may be passed over."""
        return self.devices_differ and not self.problem.exactly

    @cached_property
    def forbidden_runs(self) -> frozenset[tuple[int, int]]:
        """The forbidden runs of layers, in blocks; those that no block boundaries delimit cannot be
        stages anyway.
        """
        block_of = {int(boundary): block for block, boundary in enumerate(self.boundaries)}
        runs = ((block_of.get(start), block_of.get(stop)) for start, stop in self.problem.forbidden)
        return frozenset(
            (start, stop) for start, stop in runs if start is not None and stop is not None
        )

    @cached_property
    def is_additive(self) -> bool:
        """Whether the load is nothing but a sum, the same at every place."""
        separate = self.problem.is_soft or (self.problem.overlap and self.has_cuts)
        return not separate and self.is_uniform and bool(self.by_place[1][0] == 1)

    @cached_property
    def has_fixed_total(self) -> bool:
        """Whether the loads of any partition's stages add up to the same."""
        speed = self.by_place[1]
        return not self.problem.is_soft and not self.has_cuts and bool((speed == speed[0]).all())

    @cached_property
    def has_limit(self) -> bool:
        """Whether some run is refused whatever its load."""
        hard = self.problem.capacity is not None and not self.problem.is_soft
        return hard or bool(self.apart_start.any())

    @cached_property
    def allowed_starts(self) -> Indices:
        """For each stop from 1, the smallest start of a run that is allowed, where all places are
        alike.
        """
        stops = np.arange(1, self.num_blocks + 1)
        return earliest_starts(stops, self.is_allowed) if self.has_limit else np.zeros_like(stops)

    def load(self, start: ArrayLike, stop: ArrayLike, place: CutPoint = 0) -> Floats:
        """Units of time that the runs take at a place. `start` and `stop` broadcast; every run
        holds a block.
        """
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
        """Bytes that the runs need at a place. `start` and `stop` broadcast; every run holds a
        block.
        """
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
        """Whether the runs respect the hard capacity and the layers that are kept apart."""
        allowed = np.asarray(start) >= self.apart_start[np.asarray(stop)]
        if self.problem.capacity is None or self.problem.is_soft:
            return allowed
        return allowed & (self.memory(start, stop, place) <= self.by_place[0][place])

    def fits(
        self, start: ArrayLike, stop: ArrayLike, bound: float, place: CutPoint = 0
    ) -> NDArray[np.bool_]:
        """Whether the runs are allowed and take no longer than the bound."""
        return self.is_allowed(start, stop, place) & (self.load(start, stop, place) <= bound)

    def _peak(self, start: Indices, stop: Indices) -> Floats:
        """The largest transient bytes in each run: two overlapping windows of a power of two cover
        it.
        """
        level = np.frexp((stop - start).astype(np.float64))[1] - 1
        return np.maximum(self.peaks[level, start], self.peaks[level, stop - (1 << level)])

    def without_cuts(self) -> "StageCosts":
        """The same costs with every boundary for nothing: a relaxation, whose optimum is a lower
        bound.
        """
        return replace(self, cut=np.zeros_like(self.cut))

    def at(self, kept: Indices) -> "StageCosts":
        """The same problem where only the block boundaries `kept` (0 and the last among them) may
        be cut.
        """
        return _build(self.problem, self.boundaries[kept])


def stage_costs(problem: Problem) -> StageCosts:
    """Prefix sums and tables from which the cost of any run is read in constant time."""
    is_open = np.ones(problem.num_layers + 1, dtype=bool)
    for first, last in problem.keep_together:
        is_open[first + 1 : last + 1] = False
    return _build(problem, np.flatnonzero(is_open))


def earliest_starts(
    stops: Indices, fits: Callable[[Indices, Indices], NDArray[np.bool_]]
) -> Indices:
    """For each stop, the smallest start from which the run fits, or the stop itself where not even
    one block does.

    Exact if every sub-run of a run that fits also fits. Halves the ranges of all stops together.
    """
    low, high = np.zeros_like(stops), stops.copy()
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
    """A power of two so small that the rounding is lost in the noise, so large that every sum of
    units is exact.

    Each time is rounded once to whole units; a load is then off by at most n * 2**-51 of the total
    time, and by nothing where the times are whole numbers. After that, sums and comparisons of
    loads do not round at all.
    """
    largest = float(problem.seconds.sum() + 2 * problem.cut_seconds.max())
    return float(np.ldexp(1.0, max(int(np.frexp(largest)[1]) - 50, -1000))) if largest > 0 else 1.0


def _prefix(values: Floats) -> Floats:
    return np.concatenate([[0.0], np.cumsum(values)])


def _peaks(values: Floats) -> Floats:
    """Row p holds at i the maximum of values[i : i + 2**p], as far as there are values."""
    rows = [values]
    while 2 ** len(rows) <= len(values):
        half, row = 2 ** (len(rows) - 1), rows[-1].copy()
        row[:-half] = np.maximum(row[:-half], rows[-1][half:])
        rows.append(row)
    return np.stack(rows)


def _apart_start(problem: Problem, boundaries: Indices) -> Indices:
    """For each stop, the smallest start of a run that holds no pair of layers that are kept
    apart.
    """
    earliest = np.zeros(len(boundaries), dtype=np.int64)
    for first, last in problem.keep_apart:
        first_block, last_block = np.searchsorted(boundaries, [first, last], side="right") - 1
        earliest[last_block + 1] = max(earliest[last_block + 1], first_block + 1)
    return np.maximum.accumulate(earliest)
