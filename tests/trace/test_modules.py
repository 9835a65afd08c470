"""Modules are read off parameter paths: what is a layer, what is a container, what is part of a
layer.
"""

import jax
import pytest

from layerwise_jax.trace.modules import modules_of, path_names


def names_of(*paths: str) -> list[str]:
    """The module of each leaf, given its path with `/` between names."""
    return [module.name for module in modules_of([tuple(path.split("/")) for path in paths])]


def layers_of(*paths: str) -> list[str]:
    return list(dict.fromkeys(names_of(*paths)))


def blocks(prefix: str, count: int, *leaves: str) -> list[str]:
    return [f"{prefix}{i}/{leaf}" for i in range(count) for leaf in leaves]


ATTENTION = (
    "attention/query/kernel",
    "attention/out/kernel",
    "norm/scale",
    "mlp/up/kernel",
    "mlp/down/kernel",
)


def test_every_leaf_belongs_to_a_module() -> None:
    paths = [
        "params/embed/table",
        *blocks("params/Block_", 2, *ATTENTION),
        "params/norm/scale",
        "params/norm/bias",
    ]
    assert names_of(*paths) == ["embed", *["Block_0"] * 5, *["Block_1"] * 5, "norm", "norm"]


def test_the_root_is_opened_and_the_prefix_of_all_is_left_out() -> None:
    assert layers_of("params/Dense_0/kernel", "params/Dense_1/kernel") == ["Dense_0", "Dense_1"]
    assert layers_of("params/model/a/kernel", "params/model/b/kernel") == ["a", "b"]


def test_numbered_blocks_keep_the_name_of_their_list() -> None:
    assert layers_of(*blocks("layers/", 3, "weight", "bias")) == [
        "layers/0",
        "layers/1",
        "layers/2",
    ]
    assert layers_of(*blocks("", 2, "weight", "bias")) == ["0", "1"]


def test_a_block_is_not_opened_whatever_it_holds() -> None:
    assert layers_of("embed/table", *blocks("blocks/", 2, *ATTENTION)) == [
        "embed",
        "blocks/0",
        "blocks/1",
    ]


def test_the_stages_of_a_resnet_are_opened() -> None:
    paths = [
        f"params/stage_{s}/block_{b}/conv_{c}/kernel"
        for s in range(2)
        for b in range(2)
        for c in range(2)
    ]  # fmt: skip
    wanted = ["stage_0/block_0", "stage_0/block_1", "stage_1/block_0", "stage_1/block_1"]
    assert layers_of("params/stem/kernel", *paths) == ["stem", *wanted]


def test_lists_of_blocks_within_stages_are_opened() -> None:
    paths = [
        f"stages/{s}/blocks/{b}/conv_{c}/kernel"
        for s in range(2)
        for b in range(2)
        for c in range(2)
    ]
    wanted = ["stages/0/blocks/0", "stages/0/blocks/1", "stages/1/blocks/0", "stages/1/blocks/1"]
    assert layers_of("stem/kernel", *paths) == ["stem", *wanted]


def test_numbered_parts_of_attention_are_no_blocks() -> None:
    attention = [f"attention/Dense_{i}/kernel" for i in range(4)]
    assert layers_of(*blocks("Block_", 2, *attention, "norm/scale")) == ["Block_0", "Block_1"]


def test_encoder_and_decoder_are_opened() -> None:
    paths = [
        *blocks("encoder/layers_", 2, *ATTENTION),
        *blocks("decoder/layers_", 2, *ATTENTION),
        "head/kernel",
    ]
    wanted = [
        "encoder/layers_0",
        "encoder/layers_1",
        "decoder/layers_0",
        "decoder/layers_1",
        "head",
    ]
    assert layers_of(*paths) == wanted


def test_the_experts_of_a_block_are_part_of_it() -> None:
    experts = [f"experts/{e}/{leaf}" for e in range(4) for leaf in ("up/kernel", "down/kernel")]
    assert layers_of(*blocks("blocks/", 2, "attention/query/kernel", *experts)) == [
        "blocks/0",
        "blocks/1",
    ]


def test_a_lone_module_of_unlike_parts_is_one_layer() -> None:
    paths = [
        "attention/query/kernel",
        "attention/out/kernel",
        "mlp/up/kernel",
        "mlp/down/kernel",
        "head/kernel",
    ]
    assert layers_of(*paths) == ["attention", "mlp", "head"]


def test_collections_side_by_side_are_one_tree() -> None:
    paths = [
        "params/Conv_0/kernel", "params/BatchNorm_0/scale", "params/Dense_0/kernel",
        "batch_stats/BatchNorm_0/mean", "batch_stats/BatchNorm_0/var",
    ]  # fmt: skip
    assert names_of(*paths) == ["Conv_0", "BatchNorm_0", "Dense_0", "BatchNorm_0", "BatchNorm_0"]


@pytest.mark.parametrize("prefix", ["Block_", "", "layers/"])
def test_blocks_side_by_side_are_no_collections(prefix: str) -> None:
    assert layers_of(*blocks(prefix, 3, *ATTENTION)) == [f"{prefix}{i}" for i in range(3)]


def test_an_encoder_beside_a_decoder_is_no_collection() -> None:
    paths = [*blocks("encoder/layers_", 2, *ATTENTION), *blocks("decoder/layers_", 2, *ATTENTION)]
    assert layers_of(*paths) == [
        f"{half}/layers_{i}" for half in ("encoder", "decoder") for i in range(2)
    ]


def test_bare_arrays_are_told_from_modules() -> None:
    modules = modules_of(
        [("embed", "table"), ("positions",), ("blocks", "0", "kernel"), ("blocks", "1", "kernel")]
    )
    assert [(module.name, module.is_bare) for module in modules] == [
        ("embed", False), ("positions", True), ("blocks/0", False), ("blocks/1", False),
    ]  # fmt: skip


def test_flat_lists_of_arrays_are_modules_by_themselves() -> None:
    modules = modules_of([("0",), ("1",), ("2",)])
    assert [module.name for module in modules] == ["0", "1", "2"]
    assert all(module.is_bare for module in modules)


def test_a_list_of_arrays_beside_others_is_a_family() -> None:
    assert layers_of("layers/0", "layers/1", "scale") == ["layers/0", "layers/1", "scale"]
    assert layers_of(*blocks("layers/", 2, "0", "1"), "out/0", "out/1")[-1].startswith("out/")


def test_a_single_array_has_a_name() -> None:
    assert [module.name for module in modules_of([()])] == ["params"]


@pytest.mark.parametrize(
    ("tree", "wanted"),
    [
        ({"a": [0, {"b": 1}]}, [("a", "0"), ("a", "1", "b")]),
        ({"layer": {"kernel": {"value": 0}}}, [("layer", "kernel")]),
        ([0], [("0",)]),
        ({"value": 0}, [("value",)]),
    ],
)
def test_key_paths_become_names_without_the_wrappers_of_variables(
    tree: object, wanted: list[tuple[str, ...]]
) -> None:
    assert [path_names(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]] == wanted
