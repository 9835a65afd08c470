"""The answers in words: what is refused and how, what blocks, and layers in their own terms."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest

from layerwise_jax.partition.options import SolveOptions
from layerwise_jax.partition.solver import CapacityError, LayerOptions, partition_layers, solve


@dataclass(frozen=True)
class Layer:
    name: str
    weight_bytes: int
    activation_bytes: int = 0
    buffer_bytes: int = 0
    flops: float = 0.0
    bytes_accessed: float = 0.0

    @property
    def size(self):
        return self.weight_bytes + self.activation_bytes + self.buffer_bytes


REFUSED = {
    "negative seconds": ({"seconds": [1, -1]}, r"seconds\[1\] must be .*got -1"),
    "seconds that are no number": ({"seconds": [np.nan, 1]}, r"seconds\[0\] must be .*got nan"),
    "seconds without end": ({"seconds": [1, np.inf]}, r"seconds\[1\] must be .*got inf"),
    "no layers": ({"seconds": []}, r"seconds must be .*got shape \(0,\)"),
    "a table of seconds": ({"seconds": [[1, 2]]}, r"seconds must be .*got shape \(1, 2\)"),
    "weights of other layers": (
        {"weight_bytes": [1]},
        r"weight_bytes must .* 2 layers, got \(1,\)",
    ),
    "weights beyond exact sums": ({"weight_bytes": [2**53, 2**53]}, "weight_bytes must add up"),
    "negative transients": ({"transient_bytes": [0, -2]}, r"transient_bytes\[1\] must be .*got -2"),
    "cuts of the wrong length": ({"cut_seconds": [0, 0]}, r"boundary 0\.\.2"),
    "a cut at the end": ({"cut_seconds": [0, 1, 1]}, "ends"),
    "no stages": ({"max_stages": 0}, "max_stages must be .*got 0"),
    "half a stage": ({"max_stages": 1.5}, "max_stages must be .*got 1.5"),
    "no number of stages": ({"max_stages": None}, "max_stages must be .*got None"),
    "more stages than layers": (
        {"max_stages": 3, "exactly": True},
        "max_stages must be at most 2 with exactly=True",
    ),
    "a negative capacity": ({"capacity": -1}, "capacity must be at least 0, got -1"),
    "capacities of other stages": ({"capacity": [1, 2, 3]}, r"capacity must .* got \(3,\)"),
    "no speed": ({"speeds": [1, 0]}, "speeds must be"),
    "no microbatch": ({"num_microbatches": 0}, "num_microbatches must be .*got 0"),
    "an unknown method": ({"method": "magic"}, "method must be .*got 'magic'"),
    "an unknown objective": ({"objective": "fun"}, "objective must be .*got 'fun'"),
    "an unknown schedule": ({"schedule": "2f2b"}, "schedule must be .*got '2f2b'"),
    "unknown communication": ({"communication": "mail"}, "communication must be .*got 'mail'"),
    "no bandwidth": (
        {"capacity": 1, "streaming_bandwidth": 0},
        "streaming_bandwidth must be .*got 0",
    ),
    "a tie of a layer that is not there": (
        {"tied_weights": [((0, 2), 1)]},
        r"tied_weights must have layer indices .*got \[0, 2\]",
    ),
    "a tie larger than the layer": (
        {"tied_weights": [((0, 1), 9)]},
        "tied_weights of the layers .*got 9",
    ),
    "three layers apart": ({"keep_apart": [(0, 1, 1)]}, "keep_apart"),
    "together and apart": (
        {"keep_together": [(0, 1)], "keep_apart": [(0, 1)]},
        "that keep_together joins",
    ),
    "names of other layers": ({"names": ["a"]}, "names must have 2 entries"),
    "greedy without a capacity": (
        {"method": "greedy"},
        "method='greedy' must have a hard capacity",
    ),
    "greedy for a makespan": (
        {"method": "greedy", "capacity": 9, "objective": "makespan"},
        "must have the objective .*got 'makespan'",
    ),
    "the fewest, exactly": ({"objective": "stages", "exactly": True}, "Drop one"),
    "the fewest of devices that differ": (
        {"objective": "stages", "capacity": [4, 5]},
        "capacity must be equal for all devices",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_values_are_refused_by_name(name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        solve(**{"seconds": [1, 2], "weight_bytes": [3, 4], "max_stages": 2} | options)


def test_an_unknown_keyword_is_refused():
    with pytest.raises(TypeError, match="max_stage"):
        solve([1], None, max_stage=1)


def test_options_are_described_once():
    for options in (SolveOptions, LayerOptions):
        text = options.__doc__ or ""
        names = [field.name for field in dataclasses.fields(options)]
        assert [name for name in names if f"    {name}: " not in text] == []


def test_options_as_a_value_are_the_same_as_keywords():
    layers = [Layer("a", 1), Layer("b", 2), Layer("c", 1)]
    options = SolveOptions(max_stages=2, keep_together=[(0, 1)])
    for given in (options, options.updated(capacity=9)):
        assert solve([1, 2, 3], [1, 1, 1], options=given).boundaries == (0, 2, 3)
        assert partition_layers(layers, options=given).boundaries == (0, 2, 3)
    # A single choice, and an argument of partition_layers, replace the option's value.
    assert solve([1, 2, 3], None, options=options, max_stages=1).boundaries == (0, 3)
    assert partition_layers(layers, 1, options=options).boundaries == (0, 3)
    with pytest.raises(TypeError, match="stages_at_most"):
        options.updated(stages_at_most=3)
    with pytest.raises(TypeError, match="colour"):
        partition_layers(layers, 2, colour="red")


def test_options_check_themselves():
    with pytest.raises(ValueError, match="capacity must be one number, or have shape"):
        SolveOptions(max_stages=2, capacity=[1, 2, 3])
    with pytest.raises(ValueError, match="seconds must be given with cut costs"):
        LayerOptions(cut_seconds=[0, 1, 0])


def test_a_search_too_large_to_hold_is_refused():
    with pytest.raises(ValueError, match="too many cuts to search"):
        solve(
            np.ones(5000),
            np.ones(5000),
            None,
            np.r_[0, np.ones(4999), 0],
            max_stages=5000,
            capacity=10,
        )


def test_capacity_error_names_the_layer():
    with pytest.raises(
        CapacityError,
        match="layer 1 'mlp' by itself needs 9 bytes, 1 more than the capacity of 8 bytes",
    ) as caught:
        solve([1, 1, 1], [2, 9, 2], max_stages=3, capacity=8, names=["in", "mlp", "out"])
    assert caught.value.layers == (1, 2)
    assert caught.value.needed_bytes == 9


def test_capacity_error_names_the_layers_that_stay_together():
    with pytest.raises(
        CapacityError, match="layer 1 to layer 2 by itself needs 10 bytes"
    ) as caught:
        solve([1, 1, 1], [5, 5, 5], max_stages=3, capacity=8, keep_together=[(1, 2)])
    assert caught.value.layers == (1, 3)


def test_capacity_error_names_the_fewest_stages():
    with pytest.raises(CapacityError, match="3 stages would do") as caught:
        solve([1] * 6, [4] * 6, max_stages=2, capacity=8)
    assert caught.value.fewest_stages == 3


def test_capacity_error_counts_stages_deeper_in_the_schedule():
    """Under 1F1B a stage further from the end holds more, so that no number of stages may do."""
    options = {"stash_bytes": [4] * 5, "num_microbatches": 8, "capacity": 8}
    with pytest.raises(CapacityError, match="no number of stages would do"):
        solve([1] * 5, None, max_stages=2, **options)


def test_capacity_error_for_devices_that_differ():
    with pytest.raises(CapacityError, match="2 devices in this order, the largest of 8 bytes"):
        solve([1, 1, 1], [5, 4, 5], max_stages=2, capacity=[5, 8])
    assert solve([1, 1, 1], [5, 2, 5], max_stages=2, capacity=[5, 8]).boundaries == (0, 1, 3)


def test_layers_kept_apart_ask_for_more_stages():
    with pytest.raises(CapacityError, match="3 layers do not fit 1 stage: 2 stages would do"):
        solve([1, 1, 1], None, max_stages=1, keep_apart=[(0, 2)])


def test_memory_blocks_and_says_so():
    partition = solve([3, 1, 4, 1, 5, 9, 2, 6], [1] * 8, max_stages=3, capacity=4)
    assert partition.bottleneck == 14
    assert partition.blocking_constraint == "memory"
    assert "exceed its capacity by 1 bytes" in partition.limits


def test_a_single_layer_blocks_and_says_so():
    partition = solve([1, 9, 1], None, max_stages=3)
    assert (partition.blocking_layer, partition.blocking_constraint) == (1, "single layer")
    assert partition.proof == "layer 1 by itself takes as long."


def test_a_repr_is_one_line():
    assert repr(solve([1, 2, 3], None, max_stages=2)) == (
        "Partition(3 layers over 2 stages by dp, bottleneck 3, gap 0.00%)"
    )


def test_a_partition_prints_its_figures():
    lines = str(solve([1, 2, 3, 4], [10, 10, 10, 10], max_stages=2, capacity=30)).splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert (
        "4 layers over 2 stages by dp: bottleneck 6, lower bound 6, gap 0.00%, fewest stages that "
        "fit 2" in text
    )
    assert "0..2" in text
    assert "100.0%" in text


def test_greedy_fills_to_the_capacity_and_knows_how_far_it_is_from_the_optimum():
    partition = solve([3, 1, 4, 1, 5, 9, 2, 6], [1] * 8, max_stages=3, capacity=3, method="greedy")
    assert partition.boundaries == (0, 3, 6, 8)
    assert (
        partition.lower_bound
        == solve([3, 1, 4, 1, 5, 9, 2, 6], [1] * 8, max_stages=3, capacity=3).bottleneck
    )
    assert partition.gap == pytest.approx(15 / partition.lower_bound - 1)


def test_greedy_keeps_a_layer_for_each_stage_that_is_demanded():
    partition = solve([1] * 5, [1] * 5, max_stages=4, capacity=3, method="greedy", exactly=True)
    assert partition.boundaries == (0, 2, 3, 4, 5)


def test_lockstep_uses_fewer_stages_when_microbatches_are_few():
    """The bottleneck is not the makespan: with one microbatch every stage more is a tick more."""
    options = {"max_stages": 4, "objective": "lockstep_makespan"}
    assert solve([4, 1, 1, 1, 1], None, **options, num_microbatches=1).num_stages == 1
    assert solve([4, 1, 1, 1, 1], None, **options, num_microbatches=100).bottleneck == 4


def test_stages_hold_their_share_of_the_schedule():
    """1F1B: the first of two stages holds two microbatches, the last holds one."""
    partition = solve(
        [1] * 6, None, stash_bytes=[1] * 6, num_microbatches=4, max_stages=2, capacity=5
    )
    assert partition.stage_bytes == (4, 4)
    assert partition.boundaries == (0, 2, 6)


def test_a_slow_device_is_passed_over():
    partition = solve([4, 4], None, max_stages=3, speeds=[1, 0.1, 1])
    assert partition.devices == (0, 2)


def test_a_soft_capacity_streams_the_excess():
    partition = solve([2, 2], [10, 10], max_stages=1, capacity=15, streaming_bandwidth=2.5)
    assert partition.bottleneck == 4 + 5 / 2.5


def test_layers_are_cut_by_size_and_load():
    layers = [Layer(f"block{index}", 4, 3, 1, flops=10) for index in range(4)]
    partition = partition_layers(layers, 2, capacity=16)
    assert partition.boundaries == (0, 2, 4)
    assert partition.stage_bytes == (16, 16)
    assert partition.stage_loads == (20, 20)


def test_peak_memory_takes_the_largest_transient():
    layers = [Layer("a", 4, 3, 1), Layer("b", 4, 7, 0)]
    assert partition_layers(layers, 1, capacity=15, memory="peak").stage_bytes == (15,)


def test_without_a_number_the_fewest_stages_are_taken():
    layers = [Layer(f"block{index}", 5, flops=1) for index in range(6)]
    partition = partition_layers(layers, capacity=10)
    assert partition.num_stages == partition.fewest_stages == 3


@pytest.mark.parametrize(
    ("flops", "accessed", "loads"), [(7, 5, (7, 7)), (0, 5, (5, 5)), (0, 0, (4, 4))]
)
def test_loads_stand_in_for_seconds(flops, accessed, loads):
    layers = [Layer("a", 4, flops=flops, bytes_accessed=accessed)] * 2
    assert partition_layers(layers, 2).stage_loads == loads


def test_a_layer_that_fits_nowhere_is_shown_with_its_three_sizes():
    layers = [Layer("embed", 1), Layer("mlp", 8, 3, 1)]
    with pytest.raises(
        CapacityError, match="'mlp': 8 bytes of weights, 3 of activations, 1 of buffers"
    ):
        partition_layers(layers, 2, capacity=10)


def test_layers_are_cut_where_crossing_is_cheap():
    layers = [Layer("a", 1), Layer("b", 1), Layer("c", 1)]
    cheap_at_2 = {"cut_bytes": [0, 50, 10, 0], "link_bandwidth": 10.0}
    assert partition_layers(layers, 2, seconds=[1, 1, 1], **cheap_at_2).boundaries == (0, 2, 3)


def test_measured_layers_are_verified():
    layers = [Layer("a", 1), Layer("b", 1), Layer("c", 1)]
    sizes = {(0, 1): 3, (1, 3): 4, (0, 2): 7, (2, 3): 3}
    partition = partition_layers(
        layers, 2, capacity=5, seconds=[1, 1, 2], measure=lambda *run: sizes[run]
    )
    assert partition.boundaries == (0, 1, 3)
    assert partition.stage_bytes == (3, 4)
    assert (0, 2, 7) in partition.measured


LAYERS_REFUSED = {
    "neither stages nor capacity": ({}, "num_stages and capacity are both None"),
    "more stages than layers": ({"num_stages": 3}, "Ask for 2 or fewer"),
    "cuts without seconds": ({"num_stages": 2, "cut_seconds": [0, 1, 0]}, "seconds is None"),
    "cut bytes without a link": (
        {"num_stages": 2, "seconds": [1, 1], "cut_bytes": [0, 1, 0]},
        "link_bandwidth",
    ),
    "greedy with measurements": (
        {"num_stages": 2, "capacity": 5, "method": "greedy", "measure": lambda start, stop: 1},
        "only method='dp' can choose again",
    ),
    "an unknown memory": ({"num_stages": 2, "memory": "some"}, "memory must be .*got 'some'"),
}


@pytest.mark.parametrize("name", LAYERS_REFUSED)
def test_wrong_layers_are_refused_by_name(name):
    options, message = LAYERS_REFUSED[name]
    with pytest.raises(ValueError, match=message):
        partition_layers([Layer("a", 1), Layer("b", 1)], **options)
