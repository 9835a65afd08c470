"""Arguments, checked by name: a value comes back as it is wanted, or a ValueError says which one
came.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np


def checked_int(name: str, value: Any, least: int = 1) -> int:
    """A whole number from `least` up."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} is {value!r}; a whole number from {least} up is wanted.")
    return int(value)


def checked_ints(name: str, values: Any, least: int = 0) -> tuple[int, ...]:
    """Any number of whole numbers from `least` up."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{name} is {values!r}; a sequence of whole numbers is wanted.")
    return tuple(
        checked_int(f"{name}[{index}]", value, least) for index, value in enumerate(values)
    )


def checked_int32(name: str, values: Any, shape: tuple[int, ...], least: int = 0) -> np.ndarray:
    """int32 of a shape, from `least` up."""
    came = np.asarray(values)
    if came.shape != shape:
        raise ValueError(f"{name} came as {list(came.shape)}; {list(shape)} is wanted.")
    with np.errstate(invalid="ignore"):
        held = came.astype(np.int32)
    if (held != came).any() or (held < least).any():
        numbers = f"{came.min()} to {came.max()}"
        raise ValueError(
            f"{name} came with {numbers}; whole numbers from {least} to 2**31 - 1 are wanted."
        )
    return held


def checked_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """One of the words."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; one of {', '.join(map(repr, choices))} is wanted.")
    return value
