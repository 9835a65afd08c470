"""Balancing algorithms of other pipelines, written from their publications.

Each takes the layers' times and a number of stages, and returns boundaries 0..n. None knows a
capacity or the cost of a cut.
"""

import itertools

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]


def even_by_count(times: Times, num_stages: int) -> list[int]:
    """Equal counts of layers per stage; the first stages get one more if the division has a
    remainder.
    """
    return [len(times) * stage // num_stages for stage in range(num_stages + 1)]


def block_partition(times: Times, num_stages: int) -> list[int]:
    """Torchgpipe's balancer: I. Barany and V. S. Grinberg, "Block partitions of sequences", 2015
    (arXiv 1308.2452).

    Any two blocks are brought within the size of the largest element, by passing elements along
    from the largest block to the nearest smallest one, one at a time. As in torchgpipe the elements
    are first mapped to [0, 1] with the smallest at 0, and the start is n // k layers a stage with
    the rest on the last.
    """
    spread = times.max() - times.min()
    elements = ((times - times.min()) / spread if spread else np.zeros_like(times)).tolist()
    splits = [len(times) // num_stages * stage for stage in range(num_stages)] + [len(times)]
    sizes = np.array([sum(elements[start:stop]) for start, stop in itertools.pairwise(splits)])
    while True:
        largest = len(sizes) - 1 - int(sizes[::-1].argmax())
        giver = -1
        while giver != largest:
            if sizes[largest] <= sizes.min() + 1:
                return splits
            taker = int(sizes.argmin())
            giver = taker - 1 if largest < taker else taker + 1
            moved = _pass_one(splits, elements, giver, taker)
            sizes[giver] -= moved
            sizes[taker] += moved


def _pass_one(splits: list[int], elements: list[float], giver: int, taker: int) -> float:
    """Moves the split between two neighbouring blocks by one element, in place; returns its
    size.
    """
    if giver < taker:
        splits[taker] -= 1
        return elements[splits[taker]]
    splits[giver] += 1
    return elements[splits[giver] - 1]


def least_spread(times: Times, num_stages: int) -> list[int]:
    """DeepSpeed's balancer: dynamic programming for the smallest difference between the largest and
    the smallest stage.

    The largest and the smallest of the best prefix are carried along, so that it is not exact for
    its own objective either. Time is stages x layers x layers.
    """
    n = len(times)
    prefix = np.concatenate([[0.0], np.cumsum(times)])
    largest, smallest = np.full(n + 1, np.inf), np.full(n + 1, np.inf)
    largest[0] = 0
    choices = np.zeros((num_stages + 1, n + 1), dtype=np.int64)
    for stage in range(1, num_stages + 1):
        next_largest, next_smallest = np.full(n + 1, np.inf), np.full(n + 1, np.inf)
        for stop in range(stage, n + 1):
            loads = prefix[stop] - prefix[stage - 1 : stop]
            most = np.maximum(largest[stage - 1 : stop], loads)
            least = np.minimum(smallest[stage - 1 : stop], loads)
            last = len(loads) - 1 - int((most - least)[::-1].argmin())
            next_largest[stop], next_smallest[stop] = most[last], least[last]
            choices[stage, stop] = stage - 1 + last
        largest, smallest = next_largest, next_smallest
    boundaries = [n]
    for stage in range(num_stages, 0, -1):
        boundaries.append(int(choices[stage, boundaries[-1]]))
    return boundaries[::-1]


def bottleneck_of(times: Times, boundaries: list[int]) -> float:
    """Largest sum of times of a stage."""
    return max(float(times[start:stop].sum()) for start, stop in itertools.pairwise(boundaries))
