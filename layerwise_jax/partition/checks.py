"""Refusals by name: a value comes back checked, or a ValueError says which came and what is
wanted.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

type Floats = NDArray[np.float64]
type Run = tuple[int, int]

# Sums of whole numbers below 2**53 are exact in float64; every comparison of bytes relies on it.
_LARGEST_EXACT = 2.0**53
_LARGEST_TIME = float(np.finfo(np.float64).max) / 8


def per_layer(name: str, values: ArrayLike | None, num_layers: int) -> Floats:
    """One number from 0 up for each layer; zeros for None."""
    if values is None:
        return np.zeros(num_layers)
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (num_layers,):
        raise ValueError(
            f"{name} has shape {array.shape}; one number for each of {num_layers} layers is wanted."
        )
    return amounts(name, array)


def per_boundary(name: str, values: ArrayLike | None, num_layers: int) -> Floats:
    """One number from 0 up for each boundary, 0 at both ends; zeros for None."""
    if values is None:
        return np.zeros(num_layers + 1)
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (num_layers + 1,):
        raise ValueError(
            f"{name} has shape {array.shape}; one number for each boundary 0..{num_layers} is "
            "wanted."
        )
    if array[0] != 0 or array[-1] != 0:
        raise ValueError(
            f"{name} is {array[0]} and {array[-1]} at its ends, where nothing is cut; 0 is wanted."
        )
    return amounts(name, array)


def amounts(name: str, array: Floats) -> Floats:
    """Finite numbers from 0 up, whose sums stay exact (bytes) or finite (times)."""
    if array.ndim != 1 or not len(array):
        raise ValueError(
            f"{name} has shape {array.shape}; a sequence of one number or more is wanted."
        )
    wrong = np.flatnonzero(~(np.isfinite(array) & (array >= 0)))
    if len(wrong):
        raise ValueError(
            f"{name}[{wrong[0]}] is {array[wrong[0]]}; finite numbers from 0 up are wanted."
        )
    with np.errstate(over="ignore"):
        total = float(array.sum())
    limit = _LARGEST_EXACT if name.endswith("bytes") else _LARGEST_TIME
    if total > limit:
        raise ValueError(
            f"{name} adds up to {total:g}, and sums are exact up to {limit:g}: use a larger unit."
        )
    return array


def per_stage(name: str, values: ArrayLike | None, max_stages: int | None) -> Floats | None:
    """One number from 0 up for all stages (an array of length 1), or one for each device in order;
    None for None.
    """
    if values is None:
        return None
    array = np.asarray(values, dtype=np.float64)
    if np.isnan(array).any() or (array < 0).any():
        raise ValueError(f"{name} is {values}; numbers from 0 up are wanted.")
    if array.ndim == 0:
        return array.reshape(1)
    if array.ndim != 1 or len(array) != max_stages:
        raise ValueError(
            f"{name} has shape {array.shape}; one number, or {max_stages}, one a stage, is wanted."
        )
    return array


def positive(name: str, array: Floats | None) -> Floats | None:
    """Finite numbers above 0, or None."""
    if array is not None and not (np.isfinite(array) & (array > 0)).all():
        raise ValueError(f"{name} is {array.tolist()}; finite numbers above 0 are wanted.")
    return array


def span(name: str, layers: Sequence[int], num_layers: int) -> Run:
    """The first and the last of some layer indices."""
    if not len(layers) or min(layers) < 0 or max(layers) >= num_layers:
        raise ValueError(
            f"{name} names the layers {list(layers)}; indices in 0..{num_layers - 1} are wanted."
        )
    return int(min(layers)), int(max(layers))


def pair(name: str, layers: Sequence[int], num_layers: int) -> Run:
    """Two different layer indices, in order."""
    first, last = span(name, layers, num_layers)
    if len(layers) != 2 or first == last:
        raise ValueError(
            f"{name} names the layers {list(layers)}; two different layers are wanted."
        )
    return first, last


def labels(name: str, values: Sequence[str] | None, num_layers: int) -> tuple[str, ...]:
    """One label for each layer; "layer 0" and so on for None."""
    if values is None:
        return tuple(f"layer {index}" for index in range(num_layers))
    if len(values) != num_layers:
        raise ValueError(
            f"{name} has {len(values)} entries; one for each of {num_layers} layers is wanted."
        )
    return tuple(map(str, values))
