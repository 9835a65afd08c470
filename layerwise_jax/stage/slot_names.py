"""What slots are called: names that say which weight lies in which row.

Slots of two pipelines of one model may have the same shapes and hold other weights. Since their
names differ then, what was placed for one is refused by the other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from layerwise_jax.trace.modules import path_names
from layerwise_jax.trace.program import Weight

# So many numbers are written out; of more, if each is as far from the next, the first two and the
# last.
MOST_LISTED = 3


def slot_names(rows: Sequence[Sequence[Weight | None]], paths: Sequence[Any]) -> list[str]:
    """A name a slot.

    Args:
      rows: for every slot, the weight in every row, or None where the row is padding.
      paths: the key path of every leaf of the parameters.

    Returns:
      `block_{0,1,2}/kernel` for three rows; `embed @0` where only row 0 holds a weight; `a|b` for
      names that have nothing in common; with ` #2` behind the second of equal names.
    """
    names: list[str] = []
    for weights in rows:
        name = _common_name(
            [_weight_name(weight, paths) for weight in weights if weight is not None]
        )
        if None in weights:
            name += (
                f" @{_numbers([row for row, weight in enumerate(weights) if weight is not None])}"
            )
        copies = names.count(name) + sum(other.startswith(f"{name} #") for other in names)
        names.append(name if not copies else f"{name} #{copies + 1}")
    return names


def _weight_name(weight: Weight, paths: Sequence[Any]) -> str:
    name = "/".join(path_names(paths[weight.leaf])) or "params"
    return name if weight.start is None else f"{name}[{weight.start}]"


def _common_name(names: Sequence[str]) -> str:
    """The names as one, with all numbers wherever they differ."""
    pieces = [re.findall(r"\d+|\D+", name) for name in names]
    if len({len(piece) for piece in pieces}) > 1:
        return "|".join(names)
    columns = list(zip(*pieces, strict=True))
    if any(
        len(set(column)) > 1 and not all(piece.isdigit() for piece in column) for column in columns
    ):
        return "|".join(names)
    return "".join(
        column[0] if len(set(column)) == 1 else f"{{{_numbers(list(map(int, column)))}}}"
        for column in columns
    )


def _numbers(numbers: Sequence[int]) -> str:
    steps = {after - before for before, after in pairwise(numbers)}
    if len(numbers) > MOST_LISTED and len(steps) == 1:
        return f"{numbers[0]},{numbers[1]}..{numbers[-1]}"
    return ",".join(map(str, numbers))
