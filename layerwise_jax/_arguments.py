"""Argument checks: return the value in its checked type or raise a ValueError that names it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, cast

import numpy as np


def checked_int(name: str, value: Any, least: int = 1) -> int:
    """An int of at least `least`; bools are refused.

    Raises:
      ValueError: another type, or less.
    """
    is_int = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_int or value < least:
        raise ValueError(f"{name} must be an int of at least {least}, got {value!r}.")
    return int(cast(int, value))


def checked_ints(name: str, values: Any, least: int = 0) -> tuple[int, ...]:
    """A sequence of any length of ints of at least `least`.

    Raises:
      ValueError: no sequence, or an entry that `checked_int` refuses, named by its index.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a sequence of ints, got {values!r}.")
    entries = cast(Iterable[Any], values)
    return tuple(
        checked_int(f"{name}[{index}]", value, least) for index, value in enumerate(entries)
    )


def checked_int32(name: str, values: Any, shape: tuple[int, ...], least: int = 0) -> np.ndarray:
    """An int32 array of the given shape with entries of at least `least`.

    Raises:
      ValueError: another shape, or entries that are no ints, too small, or above 2**31 - 1.
    """
    given = np.asarray(values)
    if given.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(given.shape)}.")
    with np.errstate(invalid="ignore"):
        result = given.astype(np.int32)
    if (result != given).any() or (result < least).any():
        raise ValueError(
            f"{name} must be ints from {least} to 2**31 - 1, got values from {given.min()} to "
            f"{given.max()}."
        )
    return result


def checked_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """One of the given words.

    Raises:
      ValueError: any other value.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    return value


def updated_options[Options](options: Options, choices: Mapping[str, Any]) -> Options:
    """A frozen options value with some of its fields replaced.

    Raises:
      TypeError: the options have no field of a name.
      ValueError: the options refuse a value.
    """
    value = cast(Any, options)  # a dataclass, for which typing has no public name
    names = [field.name for field in fields(value)]
    if unknown := sorted(set(choices) - set(names)):
        raise TypeError(f"Options must be among {', '.join(names)}, got {', '.join(unknown)}.")
    return cast(Options, replace(value, **choices))
