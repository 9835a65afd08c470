"""Slot names: each tells the weights of all shards of its slot.

Slots of two pipelines of one model may agree in shape and differ in the weights they hold. Their
names differ then, so that each pipeline refuses parameters that were placed for the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from layerwise_jax.trace.modules import path_names
from layerwise_jax.trace.program import Weight

# Up to this many numbers are written out; of more in equal steps, the first two and the last.
MOST_LISTED = 3


def slot_names(
    slots: Sequence[Sequence[Weight | None]], path_of: Callable[[int], Any]
) -> list[str]:
    """A unique name for every slot, made of the names of its weights.

    Args:
      slots: for every slot, the weight of each shard, or None where the shard is padding.
      path_of: the key path of a leaf.

    Returns:
      `block_{0,1,2}/kernel` for three shards; `embed @0` where only shard 0 holds a weight; `a|b`
      for names that have nothing in common; with ` #2` behind the second of equal names.
    """
    names: list[str] = []
    for weights in slots:
        name = _common_name(
            [_weight_name(weight, path_of) for weight in weights if weight is not None]
        )
        if None in weights:
            held = [shard for shard, weight in enumerate(weights) if weight is not None]
            name += f" @{_numbers(held)}"
        copies = names.count(name) + sum(other.startswith(f"{name} #") for other in names)
        names.append(name if not copies else f"{name} #{copies + 1}")
    return names


def _weight_name(weight: Weight, path_of: Callable[[int], Any]) -> str:
    name = "/".join(path_names(path_of(weight.leaf))) or "params"
    return name if weight.start is None else f"{name}[{weight.start}]"


def _common_name(names: Sequence[str]) -> str:
    """One name for several: numbers that differ are listed in braces.

    Names that differ in more than numbers are joined by `|`.
    """
    # "block_12/w" -> ["block_", "12", "/w"]
    pieces = [re.findall(r"\d+|\D+", name) for name in names]
    if len({len(piece) for piece in pieces}) > 1:
        return "|".join(names)
    columns = list(zip(*pieces, strict=True))  # [pieces of a name][names]
    if any(
        len(set(column)) > 1 and not all(piece.isdigit() for piece in column) for column in columns
    ):
        return "|".join(names)
    return "".join(
        column[0] if len(set(column)) == 1 else f"{{{_numbers(list(map(int, column)))}}}"
        for column in columns
    )


def _numbers(numbers: Sequence[int]) -> str:
    """Numbers as text: `0,1,2`, or `0,2..30` for many in equal steps."""
    steps = {after - before for before, after in pairwise(numbers)}
    if len(numbers) > MOST_LISTED and len(steps) == 1:
        return f"{numbers[0]},{numbers[1]}..{numbers[-1]}"
    return ",".join(map(str, numbers))
