"""The plan's table and its JSON."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh

from layerwise_jax._tables import run_lengths
from layerwise_jax.build import build_pipeline
from layerwise_jax.cost.layer_cost import LayerCost
from layerwise_jax.measure.layers import measure_costs
from layerwise_jax.partition.solver import partition_layers
from layerwise_jax.plan import LoopFigures, Plan, Sizes, StagePlan, make_plan
from layerwise_jax.plan_text import BAR_WIDTH
from layerwise_jax.trace.layers import trace_layers

KIB = 1024
COSTS = (
    LayerCost("embed", 6 * KIB, KIB, 0),
    *(LayerCost(f"blocks/{i}", 2 * KIB, KIB, KIB) for i in range(4)),
    LayerCost("head", 512, 0, 0),
)


def plan_of(partition: Any = (0, 2, 6), capacity: int | None = 20 * KIB, **fields: Any) -> Plan:
    loop = {
        "num_devices": 2,
        "num_microbatches": 6,
        "num_ticks": 8,
        "common_layers": 1,
        "has_branch": True,
    }
    sizes = Sizes(COSTS, "a device", "its compiler", capacity, **fields)
    return make_plan(
        partition, sizes, LoopFigures(send_bytes=[768, 0], padding_bytes=2 * KIB, **loop)
    )


def text_of(plan: Plan) -> str:
    """The plan's text without its line breaks."""
    return " ".join(str(plan).split())


def rows_of(plan: Plan) -> list[list[str]]:
    """The table's rows, as cells from the right: sizes, bar, share and bytes sent."""
    lines = [line.split() for line in str(plan).splitlines()]
    return [cells for cells in lines if cells and cells[0].isdigit() and "%" in cells[-2]]


def test_a_row_a_stage_with_its_layers_and_sizes() -> None:
    rows = rows_of(plan_of(stage_bytes=(9 * KIB, 5 * KIB)))
    assert [row[-8:-3] for row in rows] == [
        ["8K", "2K", "1K", "11K", "9K"],
        ["6.5K", "3K", "3K", "12.5K", "5K"],
    ]
    assert rows[0][:3] == ["0", "embed,", "blocks/0"]
    assert [row[-1] for row in rows] == ["768B", "0B"]
    assert "K, M, G, T: KiB, MiB, GiB, TiB" in text_of(plan_of())


def test_the_bar_is_the_share_of_the_capacity() -> None:
    assert [row[-3:-1] for row in rows_of(plan_of())] == [["███░░░", "55%"], ["████░░", "62%"]]
    assert "20 KiB of capacity each" in text_of(plan_of())
    assert "of capacity" in str(plan_of())


def test_without_a_capacity_the_bar_is_the_share_of_the_largest_stage() -> None:
    plan = plan_of(capacity=None)
    assert [row[-3:-1] for row in rows_of(plan)] == [["█████░", "88%"], ["██████", "100%"]]
    assert "of largest" in str(plan)


def test_a_bar_does_not_outgrow_its_column() -> None:
    assert rows_of(plan_of(capacity=KIB))[0][-3:-1] == ["█" * BAR_WIDTH, "1100%"]


def test_every_line_fits_a_terminal_of_80_columns() -> None:
    partition = partition_layers(COSTS, 2, 20 * KIB)
    notes = ("a note of many words " * 9,)
    plan = plan_of(partition, stage_bytes=(999 * KIB, 1023), notes=notes, residency="not it " * 30)
    large = [replace(stage, layers=("a/very/long/name/" * 5,)) for stage in plan.stages]
    for each in (plan, replace(plan, stages=tuple(large), capacity=1)):
        assert max(map(len, str(each).splitlines())) <= 80


def test_what_is_not_resident_is_said_first() -> None:
    plan = plan_of(residency="Not resident in cache: stage 1.")
    assert str(plan).splitlines()[0] == "Not resident in cache: stage 1."
    assert str(plan_of()).startswith("2 stages, ")


def test_a_repr_is_one_line() -> None:
    assert repr(plan_of()) == (
        "Plan(2 stages on 2 x a device, 6 microbatches, largest stage 12.5 KiB of 20 KiB, bubble "
        "14.3%)"
    )


def test_counts_of_one_are_singular() -> None:
    plan = replace(plan_of(), num_devices=1, num_microbatches=1, num_ticks=1)
    plan = replace(plan, stages=plan.stages[:1], has_branch=False)
    assert "1 stage, " in str(plan)
    assert "1 microbatch, " in str(plan)
    assert "1 tick; " in str(plan)


def test_an_uneven_plan_says_why() -> None:
    costs = (LayerCost("one", 9 * KIB, 0, 0), LayerCost("two", KIB, 0, 0))
    sizes = Sizes(costs, "a device", "its compiler")
    loop = {"num_devices": 2, "num_microbatches": 2, "num_ticks": 3, "common_layers": 0}
    plan = make_plan(
        partition_layers(costs, 2),
        sizes,
        LoopFigures(send_bytes=[1, 0], padding_bytes=0, has_branch=True, **loop),
    )
    assert (
        "uneven: the heaviest stage takes 80% more than the mean. Stage 0 (layer 0 'one') is the "
        "heaviest and cannot be divided."
    ) in text_of(plan)


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ((), ""),
        (("embed",), "embed"),
        (("Block_8", "Block_9", "Block_10"), "Block_8..Block_10"),
        (("b/0/x", "b/1/x", "b/3/x"), "b/0/x..b/1/x, b/3/x"),
        (("w[1]", "w[0]"), "w[1], w[0]"),
        (("a1b1", "a2b2"), "a1b1, a2b2"),
        (("norm", "Embed_0 (use 2)", "Embed_0 (use 3)"), "norm, Embed_0 (use 2)..Embed_0 (use 3)"),
    ],
)
def test_runs_of_layers_are_joined(names: tuple[str, ...], wanted: str) -> None:
    assert run_lengths(names) == wanted


def test_the_footer_gives_bubble_padding_and_loop() -> None:
    plan = plan_of()
    assert plan.bubble_share == 1 / 7
    assert (
        "8 ticks, the last one for the tail of the last stage; bubble 14.3%; padding 2 KiB"
        in text_of(plan)
    )
    assert "layers of each stage in the common body of the loop: 1" in text_of(plan)
    assert "the rest under one branch" in text_of(plan)
    assert "no branch" in str(replace(plan, has_branch=False))


def test_the_footer_gives_the_bounds_and_limits_of_a_partition() -> None:
    partition = partition_layers(COSTS, 2, 20 * KIB)
    plan = plan_of(partition, notes=("one thing more",), load_unit="B")
    assert (plan.bottleneck, plan.lower_bound, plan.gap) == (
        partition.bottleneck,
        partition.lower_bound,
        0,
    )
    assert "bottleneck 12.5 KiB, lower bound 12.5 KiB, gap 0.00%, fewest stages 2" in text_of(plan)
    for note in (partition.limits, f"note: lower bound: {partition.proof}", "note: one thing more"):
        assert note in text_of(plan)


def test_boundaries_alone_prove_nothing() -> None:
    plan = plan_of()
    assert (plan.gap, plan.fewest_stages) == (None, None)
    assert plan.bottleneck == max(stage.size for stage in plan.stages)
    assert "lower bound" not in str(plan)


def test_the_plan_of_a_pipeline_has_the_numbers_of_the_pipeline(
    stage_mesh: Callable[..., Mesh],
) -> None:
    def fn(params: list[jax.Array], x: jax.Array) -> jax.Array:
        for weight in params:
            x = jnp.tanh(x @ weight)
        return x

    params = [jnp.ones(shape) for shape in ((4, 8), (8, 8), (8, 8), (8, 3))]
    layers = trace_layers(fn, params, jnp.ones((2, 4)))
    costs = measure_costs(layers)
    plan = build_pipeline(
        layers, [0, 1, 4], stage_mesh(2), 3, sizes=Sizes(costs, "here", "here")
    ).plan
    assert [stage.weight_bytes for stage in plan.stages] == [4 * 4 * 8, 4 * (8 * 8 + 8 * 8 + 8 * 3)]
    assert [stage.send_bytes for stage in plan.stages] == [2 * 8 * 4, 0]
    assert [sum(cost.size for cost in costs[a:b]) for a, b in ((0, 1), (1, 4))] == [
        stage.size for stage in plan.stages
    ]
    assert (plan.num_stages, plan.num_microbatches) == (2, 3)
    # Each stage has slots for what only the other one holds.
    assert plan.padding_bytes == sum(stage.weight_bytes for stage in plan.stages)


@pytest.mark.parametrize(
    "partition", [(0, 2, 6), partition_layers(COSTS, 2, 20 * KIB)], ids=["boundaries", "proven"]
)
def test_json_reads_back(partition: Any) -> None:
    for plan in (
        plan_of(partition),
        plan_of(partition, None, stage_bytes=(1, 2), notes=("a note",)),
    ):
        again = Plan.from_json(plan.to_json())
        assert again == plan
        assert all(isinstance(stage, StagePlan) for stage in again.stages)
        assert str(again) == str(plan)


def test_older_json_reads_without_the_newer_fields() -> None:
    entries = json.loads(plan_of().to_json())
    for name in ("residency", "load_unit"):
        del entries[name]
    assert Plan.from_json(json.dumps({**entries, "version": 2})) == replace(plan_of(), load_unit="")


def damaged(change: Callable[[dict[str, Any]], Any]) -> str:
    fields = json.loads(plan_of().to_json())
    change(fields)
    return json.dumps(fields)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        (plan_of().to_json()[:-9], "not JSON"),
        ("[]", "must be a JSON object"),
        (
            damaged(lambda fields: fields.update(version=99)),
            "must be 3, got 99",
        ),
        (damaged(lambda fields: fields.pop("version")), "got None"),
        (damaged(lambda fields: fields.pop("stages")), "without ['stages']"),
        (damaged(lambda fields: fields.update(colour="red")), "colour"),
        (
            damaged(lambda fields: fields.update(num_ticks="8")),
            "Plan.num_ticks must be of type int, got '8'",
        ),
        (
            damaged(lambda fields: fields.update(num_ticks=True)),
            "Plan.num_ticks must be of type int, got True",
        ),
        (
            damaged(lambda fields: fields.update(has_branch="yes")),
            "Plan.has_branch must be of type bool, got 'yes'",
        ),
        (damaged(lambda fields: fields.update(gap="small")), "Plan.gap must be of type"),
        (damaged(lambda fields: fields.update(notes=None)), "Plan.notes must be of type"),
        (damaged(lambda fields: fields.update(notes=[1])), "Plan.notes must be of type str, got 1"),
        (damaged(lambda fields: fields.update(stages=[])), "stages must have at least one stage"),
        (
            damaged(lambda fields: fields.update(num_ticks=0)),
            "num_ticks must be an int",
        ),
        (damaged(lambda fields: fields.update(num_devices=3)), "num_devices must be at most"),
        (damaged(lambda fields: fields.update(gap=-0.5)), "gap must be at least 0, got -0.5"),
        (damaged(lambda fields: fields.update(bottleneck=float("nan"))), "bottleneck must be"),
        (
            damaged(lambda fields: fields["stages"][0].update(weight_bytes=-1)),
            "weight_bytes must be an int of at least 0, got -1",
        ),
        (damaged(lambda fields: fields.update(stages=7)), "Plan.stages must be of type"),
        (
            damaged(lambda fields: fields.update(stages=[7])),
            "A StagePlan must be a JSON object with the fields",
        ),
        (
            damaged(lambda fields: fields["stages"][0].pop("layers")),
            "A StagePlan's JSON must have exactly its fields",
        ),
        (
            damaged(lambda fields: fields["stages"][1].update(send_bytes=None)),
            "StagePlan.send_bytes must be",
        ),
    ],
)
def test_damaged_json_is_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        Plan.from_json(text)
