"""Loop-carried values of the ring on one device.

A place is an index into a device's groups: see `loop.py` for the rotation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

# Values by slot number.
Slots = dict[int, Any]


class RingState(NamedTuple):
    """The groups of a device, one list entry a place.

    Attributes:
      caches: by slot.
      tokens: int32[sequences], the next input; only the first stage's are read.
      positions: int32[sequences], positions of those tokens.
      keys: key data of the sequences.
      done: bool[sequences], whether a stop token was sampled; only the first stage's are read.
    """

    caches: list[Slots]
    tokens: list[Any]
    positions: list[Any]
    keys: list[Any]
    done: list[Any]


class Prompts(NamedTuple):
    """Prompts that are read in one pass, one list entry a place.

    Attributes:
      tokens: int32[sequences, length], padded on the right.
      lengths: int32[sequences], tokens of each prompt; 0 throughout a group that reads nothing.
    """

    tokens: list[Any]
    lengths: list[Any]


class Carry(NamedTuple):
    """Carry from tick to tick: the groups, and the arrays of the message that arrived last."""

    places: RingState
    arrived: list[Any]
