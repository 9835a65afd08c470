"""Checks of the partitioner's arrays: return the checked value, or name the wrong one."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

type Floats = NDArray[np.float64]
type Run = tuple[int, int]

# Sums of ints below 2**53 are exact in float64; every comparison of bytes relies on it.
_LARGEST_EXACT = 2.0**53
_LARGEST_TIME = float(np.finfo(np.float64).max) / 8


def per_layer(name: str, values: ArrayLike | None, num_layers: int) -> Floats:
    """[num_layers] finite numbers of at least 0; zeros for None."""
    if values is None:
        return np.zeros(num_layers)
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (num_layers,):
        raise ValueError(
            f"{name} must have shape ({num_layers},), one number for each of {num_layers} layers, "
            f"got {array.shape}."
        )
    return amounts(name, array)


def per_boundary(name: str, values: ArrayLike | None, num_layers: int) -> Floats:
    """[num_layers + 1] finite numbers of at least 0, and 0 at both ends; zeros for None."""
    if values is None:
        return np.zeros(num_layers + 1)
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (num_layers + 1,):
        raise ValueError(
            f"{name} must have shape ({num_layers + 1},), one number for each boundary "
            f"0..{num_layers}, got {array.shape}."
        )
    if array[0] != 0 or array[-1] != 0:
        raise ValueError(
            f"{name} must be 0 at both ends, where nothing is cut, got {array[0]} and {array[-1]}."
        )
    return amounts(name, array)


def amounts(name: str, array: Floats) -> Floats:
    """One or more finite numbers of at least 0, whose sum stays exact (bytes) or finite (times)."""
    if array.ndim != 1 or not len(array):
        raise ValueError(
            f"{name} must be a sequence of one number or more, got shape {array.shape}."
        )
    wrong = np.flatnonzero(~(np.isfinite(array) & (array >= 0)))
    if len(wrong):
        raise ValueError(
            f"{name}[{wrong[0]}] must be finite and at least 0, got {array[wrong[0]]}."
        )
    with np.errstate(over="ignore"):
        total = float(array.sum())
    limit = _LARGEST_EXACT if name.endswith("bytes") else _LARGEST_TIME
    if total > limit:
        raise ValueError(
            f"{name} must add up to at most {limit:g}, above which sums round, got {total:g}. Use "
            "a larger unit."
        )
    return array


def per_stage(name: str, values: ArrayLike | None, max_stages: int | None) -> Floats | None:
    """[1] for one number for all stages, or [max_stages]; numbers of at least 0. None for None."""
    if values is None:
        return None
    array = np.asarray(values, dtype=np.float64)
    if np.isnan(array).any() or (array < 0).any():
        raise ValueError(f"{name} must be at least 0, got {values}.")
    if array.ndim == 0:
        return array.reshape(1)
    if array.ndim != 1 or len(array) != max_stages:
        raise ValueError(
            f"{name} must be one number, or have shape ({max_stages},), one for each stage, got "
            f"{array.shape}."
        )
    return array


def positive(name: str, array: Floats | None) -> Floats | None:
    """Finite numbers above 0, or None."""
    if array is not None and not (np.isfinite(array) & (array > 0)).all():
        raise ValueError(f"{name} must be finite and above 0, got {array.tolist()}.")
    return array


def span(name: str, layers: Sequence[int], num_layers: int) -> Run:
    """The smallest and the largest of one or more layer indices."""
    if not len(layers) or min(layers) < 0 or max(layers) >= num_layers:
        raise ValueError(
            f"{name} must have layer indices in 0..{num_layers - 1}, got {list(layers)}."
        )
    return int(min(layers)), int(max(layers))


def pair(name: str, layers: Sequence[int], num_layers: int) -> Run:
    """Two different layer indices, sorted."""
    first, last = span(name, layers, num_layers)
    if len(layers) != 2 or first == last:
        raise ValueError(f"{name} must have pairs of two different layers, got {list(layers)}.")
    return first, last


def labels(name: str, values: Sequence[str] | None, num_layers: int) -> tuple[str, ...]:
    """One label for each layer; "layer 0", "layer 1", ... for None."""
    if values is None:
        return tuple(f"layer {index}" for index in range(num_layers))
    if len(values) != num_layers:
        raise ValueError(
            f"{name} must have {num_layers} entries, one for each layer, got {len(values)}."
        )
    return tuple(map(str, values))
