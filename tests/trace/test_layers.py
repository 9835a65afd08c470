"""Layers are found without annotations: the right names, cut where the fewest bytes are alive."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerwise_jax.trace.layers import LayerSequence, trace_layers
from layerwise_jax.trace.pinned import live_bytes, pinned_ops
from tests.models.zoo import CASES
from tests.support.zoo_case import TIME, WIDTH

ROWS = 2
FLOAT = 4
BLOCK_OF = {
    "gpt": "block_{}",
    "gpt_remat": "block_{}",
    "gpt_scan": "block[{}]",
    "gpt_scan_remat": "block[{}]",
}

USES = [f"Block_0 (use {i})" for i in range(2, 9)]


def layers_of(name: str) -> LayerSequence:
    case = CASES[name]()
    return trace_layers(case.fn, case.params, *case.inputs_of(slice(0, ROWS)))


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def squares(count: int) -> list[jax.ShapeDtypeStruct]:
    return [shape(WIDTH, WIDTH)] * count


@pytest.mark.parametrize("name", BLOCK_OF)
def test_a_transformer_is_embedding_blocks_norm_and_head(name: str) -> None:
    names = layers_of(name).names
    blocks = [BLOCK_OF[name].format(i) for i in range(len(names) - 3)]
    assert names == ("Embed_0", *blocks, "final_norm", "Embed_0 (use 2)")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("nnx_mlp", [f"layers/{i}" for i in range(8)]),
        (
            "nnx_transformer",
            ["embed", *(f"blocks/{i}" for i in range(6)), "final_norm", "embed (use 2)"],
        ),
        ("odd_outputs", [f"layers/{i}" for i in range(8)]),
        ("indexed", [f"weight[{i}]" for i in range(8)]),
        ("resnet", ["Conv_0", *(f"ResidualBlock_{i}" for i in range(4)), "Dense_0"]),
        ("shared_blocks", ["Embed_0", "Block_0", *USES, "LayerNorm_0", "Dense_0"]),
    ],
)
def test_layers_have_the_names_of_their_modules(name: str, wanted: list[str]) -> None:
    assert layers_of(name).names == tuple(wanted)


def test_encoder_and_decoder_layers_stand_in_the_order_of_the_trace() -> None:
    encoder, decoder = ([f"{kind}_{i}" for i in range(3)] for kind in ("encoder", "decoder"))
    wanted = ["Embed_0", *encoder, "Embed_0 (use 2)", *decoder, "final_norm", "Embed_0 (use 3)"]
    assert layers_of("encoder_decoder").names == tuple(wanted)


@pytest.mark.parametrize(
    "name", ["gpt", "gpt_scan", "gpt_scan_remat", "nnx_transformer", "gpt_dropout"]
)
def test_only_the_residual_stream_crosses(name: str) -> None:
    """Not the mask, not a key, nor a second copy of the stream."""
    inner = layers_of(name).boundary_bytes[1:-1]
    assert set(inner) == {ROWS * TIME * WIDTH * FLOAT}


@pytest.mark.parametrize(
    "name", ["mlp", "unet", "gpt_scan_remat", "encoder_decoder", "lstm", "branches", "inner_loops"]
)
def test_layers_hold_every_anchored_operation_once_and_in_order(name: str) -> None:
    layers = layers_of(name)
    assert [i for layer in layers.layers for i in layer.pinned] == pinned_ops(layers.program)
    assert all(layer.pinned for layer in layers.layers)
    assert layers.boundary_bytes[0] == layers.boundary_bytes[-1] == 0


@pytest.mark.parametrize("name", ["gpt_scan", "odd_outputs", "custom_derivatives"])
def test_calling_the_layers_runs_the_function(name: str) -> None:
    case = CASES[name]()
    inputs = case.inputs_of(slice(0, ROWS))
    came = trace_layers(case.fn, case.params, *inputs)(case.params, *inputs)
    wanted = jax.jit(case.fn)(case.params, *inputs)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), came, wanted)


def test_the_cut_goes_where_the_fewest_bytes_are_alive() -> None:
    """After one product the stream is narrowed, before the next it is widened: the cut is between
    those.
    """

    def fn(params: list[jax.Array], x: jax.Array) -> jax.Array:
        narrow = jnp.sum(jnp.sin(x @ params[0]), axis=-1)
        return jnp.broadcast_to(narrow[:, None, None], (ROWS, 9, WIDTH)) @ params[1]

    layers = trace_layers(fn, squares(2), shape(ROWS, WIDTH))
    assert layers.boundary_bytes == (0, ROWS * FLOAT, 0)


def test_live_bytes_of_a_chain_with_a_skip() -> None:
    def fn(params: list[jax.Array], x: jax.Array) -> jax.Array:
        first = x @ params[0]
        second = first @ params[1]
        return second @ params[2] + first

    program = trace_layers(fn, squares(3), shape(ROWS, WIDTH)).program
    stream = ROWS * WIDTH * FLOAT
    # Before each of dot, dot, dot, add, and after the last.
    assert live_bytes(program, pinned_ops(program)) == [0, stream, 2 * stream, 2 * stream, 0]


def test_what_meets_no_parameters_or_no_data_has_no_place() -> None:
    """A mask from the inputs, a cast of a weight and a constant go with their users; a product of
    data does not.
    """

    def fn(params: list[jax.Array], x: jax.Array) -> jax.Array:
        mask, gram = x > 0, x @ x.T
        weight = params[0].astype(jnp.bfloat16).astype(jnp.float32) * jnp.arange(WIDTH)
        return jnp.where(mask, gram @ (x @ weight), 0)

    program = trace_layers(fn, squares(1), shape(ROWS, WIDTH)).program
    names = [program.ops[i].name for i in pinned_ops(program)]
    assert names.count("dot_general") == 3
    assert not {"gt", "convert_element_type", "iota", "mul"}.intersection(names)


def test_a_bias_by_itself_joins_the_layer_before_it() -> None:
    def fn(params: list[jax.Array], x: jax.Array) -> jax.Array:
        for weight, bias in zip(params[::2], params[1::2], strict=True):
            x = jnp.tanh(x @ weight + bias)
        return x

    params = [shape(WIDTH, WIDTH), shape(WIDTH)] * 3
    assert trace_layers(fn, params, shape(ROWS, WIDTH)).names == ("0", "2", "4")


def test_a_scan_over_part_of_a_stack_is_cut_into_its_rows() -> None:
    def fn(stack: jax.Array, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(x @ weight), None

        x, _ = jax.lax.scan(layer, x, stack[1:3])
        return jax.lax.scan(layer, x, stack[3:5], reverse=True)[0]

    layers = trace_layers(fn, shape(6, WIDTH, WIDTH), shape(ROWS, WIDTH))
    assert layers.names == ("params[1]", "params[2]", "params[4]", "params[3]")
    spans = sorted((weight.start, weight.stop) for weight in layers.program.weights.values())
    assert spans == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6)]


ROWS_OF = {
    "iterated": list,
    "unstacked": jnp.unstack,
    "indexed": lambda stack: [stack[i] for i in range(4)],
    "split": lambda stack: [part[0] for part in jnp.split(stack, 4)],
}


@pytest.mark.parametrize("way", ROWS_OF)
def test_a_stack_is_cut_into_its_rows_however_they_are_taken(way: str) -> None:
    def fn(stack: jax.Array, x: jax.Array) -> jax.Array:
        for weight in ROWS_OF[way](stack):
            x = jnp.tanh(x @ weight)
        return x

    stack = jax.random.normal(jax.random.key(0), (4, 3, 3))
    layers = trace_layers(fn, stack, jnp.ones((2, 3)))
    assert len(layers) == 4
    assert {(w.start, w.stop) for w in layers.program.weights.values()} == {
        (0, 1),
        (1, 2),
        (2, 3),
        (3, 4),
    }
    np.testing.assert_array_equal(layers(stack, jnp.ones((2, 3))), fn(stack, jnp.ones((2, 3))))


def test_a_stack_that_is_used_whole_stays_whole() -> None:
    def fn(stack: jax.Array, x: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, stack)
        return x * jnp.sum(stack)

    layers = trace_layers(fn, shape(3, WIDTH, WIDTH), shape(ROWS, WIDTH))
    assert [(weight.start, weight.stop) for weight in layers.program.weights.values()] == [
        (None, None)
    ]


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda fn: jax.jit(jax.checkpoint(fn))])
def test_what_wraps_many_layers_is_opened(wrap: Callable[[Any], Any]) -> None:
    def fn(params: list[jax.Array], x: jax.Array) -> jax.Array:
        for weight in params:
            x = jnp.tanh(x @ weight)
        return x

    layers = trace_layers(wrap(fn), squares(4), shape(ROWS, WIDTH))
    assert layers.names == ("0", "1", "2", "3")
    policies = {remat.policy for op in layers.program.ops for remat in op.remats}
    assert policies == (set() if wrap is jax.jit else {None})


def test_custom_rules_conditionals_and_loops_over_data_are_one_operation() -> None:
    def fn(params: list[jax.Array], x: jax.Array) -> jax.Array:
        x = jax.nn.relu(x @ params[0])
        x = jax.lax.cond(jnp.sum(x) > 0, jnp.sin, jnp.cos, x)
        return jax.lax.scan(lambda carry, row: (carry + row @ params[1], None), x[0], x)[0]

    names = {op.name for op in trace_layers(fn, squares(2), shape(ROWS, WIDTH)).program.ops}
    assert {"custom_jvp_call", "cond", "scan"} <= names


def test_the_printed_layers_name_what_crosses() -> None:
    lines = str(layers_of("mlp")).splitlines()
    assert len(lines) == 9
    assert lines[0].split() == ["Dense_0", *lines[0].split()[1:]]
    assert lines[0].endswith(f"{ROWS * 24 * FLOAT} bytes out")


def test_layers_refuse_other_trees_than_the_traced() -> None:
    layers = trace_layers(
        lambda params, x: x @ params[0] @ params[1], squares(2), shape(ROWS, WIDTH)
    )
    x = jnp.ones((ROWS, WIDTH))
    for arguments in (([jnp.ones((WIDTH, WIDTH))], x), ([jnp.ones((WIDTH, WIDTH))] * 2, x, x)):
        with pytest.raises(ValueError, match=r"PyTreeDef\(\[\*, \*\]\)"):
            layers(*arguments)
