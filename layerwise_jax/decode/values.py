"""Loop-carried values of the ring, as each device holds them."""

from __future__ import annotations

from typing import Any, NamedTuple

Slots = dict[int, Any]


class RingState(NamedTuple):
    """What a device holds of the groups, for each of its places.

    Attributes:
      caches: by slot.
      tokens: int32[sequences], what goes in next; the first stage's count.
      positions: int32[sequences], where those tokens stand.
      keys: key data of the sequences.
      done: bool[sequences], whether a stop token came; the first stage's count.
    """

    caches: list[Slots]
    tokens: list[Any]
    positions: list[Any]
    keys: list[Any]
    done: list[Any]


class Prompts(NamedTuple):
    """Prompts that are read at once, for each of a device's places.

    Attributes:
      tokens: int32[sequences, length].
      lengths: int32[sequences], how many of them count; all 0 in a group that reads nothing.
    """

    tokens: list[Any]
    lengths: list[Any]


class Carry(NamedTuple):
    """What goes from tick to tick: the places, and what has just arrived."""

    places: RingState
    arrived: list[Any]
