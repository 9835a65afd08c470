"""Slots are named after the weights in their rows, so that trees placed for two pipelines are told
apart.
"""

import jax
import pytest

from layerwise_jax.stage.slot_names import slot_names
from layerwise_jax.trace.program import Weight

PATHS = [
    path
    for path, _ in jax.tree_util.tree_leaves_with_path({"blocks": [{"w": 0.0}] * 8, "embed": 0.0})
]
EMBED = Weight(8)


def names(*rows: list[int | None]) -> list[str]:
    return slot_names(
        [[None if leaf is None else Weight(leaf) for leaf in row] for row in rows],
        PATHS.__getitem__,
    )


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        ([0], "blocks/0/w"),
        ([0, 2], "blocks/{0,2}/w"),
        ([0, 1, 3, 7], "blocks/{0,1,3,7}/w"),
        ([0, 2, 4, 6], "blocks/{0,2..6}/w"),
        ([8, None, None], "embed @0"),
        ([None, 3, 5], "blocks/{3,5}/w @1,2"),
        ([8, 3], "embed|blocks/3/w"),
    ],
)
def test_a_name_tells_the_weight_of_every_row(rows: list[int | None], name: str) -> None:
    assert names(rows) == [name]


def test_equal_rows_are_counted() -> None:
    assert names([8, None], [8, None]) == ["embed @0", "embed @0 #2"]
