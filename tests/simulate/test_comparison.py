"""Strategies side by side: what is chosen and why, and that traced models come out as their figures
say.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from layerwise_jax.comparison import compare, compare_decode
from layerwise_jax.cost.devices import CPU, H100, H200
from layerwise_jax.simulate.comparison import compare_dense, compare_work
from layerwise_jax.simulate.predictor import STOCK, Strategy, dense_decode, dense_prefill

SMALL = {"layers": 4, "heads": 8, "mlp": 4096, "batch": 128, "context": 128, "dtype": "bfloat16"}
RECORD = {
    "kind": "decode",
    "strategy": "layer-wise",
    "mesh": {"data": 1, "stage": 2, "tensor": 1},
    "model": {"layers": 4, "heads": 8, "mlp": 4096, "dtype": "bfloat16", "vocabulary": 256},
    "batch": 128,
    "context": 128,
    "seconds_per_step": 128 / 462_000,
}

WIDTH, DEPTH, VOCABULARY, CONTEXT, BATCH = 32, 4, 64, 16, 8


def test_rows_are_ranked_and_cover_all_strategies():
    found = compare_dense(H100, 16)
    assert [row.step_seconds for row in found.rows[:-1]] == sorted(
        row.step_seconds for row in found.rows[:-1]
    )
    assert not found.rows[-1].fits_memory, "one device cannot hold 342 GB, and so comes last"
    names = {row.strategy.name for row in found.rows}
    wanted = {
        "one device",
        "replicas",
        "tensor",
        "tensor x pipeline",
        "layer-wise",
        "layer-wise + tensor",
    }
    assert wanted <= names
    assert found.best_throughput is found.rows[0]
    assert found.row("tensor x pipeline", stage=2, tensor=8).strategy.num_devices == 16
    assert found.row(stage=16).strategy.name == "layer-wise"


def test_an_unknown_row_names_those_there_are():
    with pytest.raises(ValueError, match=r"layer-wise \(stage 2\)"):
        compare_dense(H200, 2, **SMALL).row("layerwise")


def test_no_devices_are_refused():
    with pytest.raises(ValueError, match="num_devices must be"):
        compare_dense(H100, 0)


def test_advice_says_when_layer_wise_is_not_it():
    found = compare_dense(H200, 2, **SMALL)
    assert found.best_throughput.strategy.name == "replicas"
    assert "Layer-wise is not the fastest here: replicas (data 2) is 1." in found.advice
    assert "more of a step on latency (2 ticks with 2 collectives" in found.advice


def test_advice_says_when_layer_wise_is_it():
    # Weights of 103 GB fit no device, and at these lengths tensor ways send more than they compute.
    found = compare_work(dense_prefill(layers=256, batch=512), H100, 8)
    assert found.best_throughput.strategy.name.endswith("layer-wise")
    assert "Layer-wise is the fastest here, " in found.advice
    assert "on links (" in found.advice


def test_advice_says_when_nothing_fits():
    found = compare_dense(H100, 2, batch=4096)
    assert found.advice.startswith("Nothing fits a device's memory of 85,899,345,920 bytes")
    assert not found.best_throughput.fits_memory


def test_one_device_has_nothing_to_be_layer_wise_over():
    found = compare_dense(H200, 1, **SMALL)
    assert [row.strategy.name for row in found.rows] == ["one device"]
    assert "Layer-wise is not possible here" in found.advice


def test_advice_names_what_stays_in_the_cache():
    small = SMALL | {"heads": 8, "mlp": 2048, "batch": 16}
    found = compare_dense(H200, 4, **small)
    assert found.row("layer-wise", stage=4).is_resident
    assert "layer-wise (stage 4)" in found.advice.split("Weights stay in the cache under")[1]
    assert "No strategy keeps its weights in the cache." in compare_dense(H100, 16).advice


def test_latency_is_that_of_one_sequence_alone():
    found = compare_dense(H100, 16)
    assert found.best_latency.strategy.name == "tensor"
    assert found.best_latency.work.batch == 1
    assert found.best_latency.step_seconds < found.best_throughput.step_seconds
    training = compare_work(dataclasses.replace(dense_prefill(), kind="training"), H100, 4)
    assert training.alone == ()
    assert training.best_latency is training.best_throughput


def test_measurements_stand_beside_the_rows_that_they_belong_to():
    other = RECORD | {"batch": 32, "seconds_per_step": 1.0}
    found = compare_dense(H200, 2, **SMALL).beside(
        [RECORD | {"seconds_per_step": 1.0}, RECORD, other]
    )
    measured = dict(zip((row.strategy.name for row in found.rows), found.measured, strict=True))
    assert [name for name, each in measured.items() if each] == ["layer-wise"]
    assert measured["layer-wise"].tokens_per_second == pytest.approx(462_000)
    assert abs(measured["layer-wise"].error(found.row("layer-wise"))) < 0.15
    assert "462,000" in str(found)
    assert max(map(len, str(found).splitlines())) <= 80
    assert "error" not in str(compare_dense(H200, 2, **SMALL))


def test_rows_of_ones_own_can_be_added():
    unfilled = Strategy("layer-wise, unfilled", stage=2, groups=1)
    found = compare_dense(H200, 2, **SMALL).beside([RECORD]).with_rows(unfilled)
    assert found.row("layer-wise, unfilled").bubble_share == 0.5
    assert sum(each is not None for each in found.measured) == 1


def test_the_table_has_a_line_for_every_row_and_the_verdict():
    found = compare_dense(H100, 16)
    lines, text = str(found).splitlines(), " ".join(str(found).split())
    meshes = [f"{'x'.join(map(str, row.strategy.mesh.values()))}" for row in found.rows]
    shown = [line for line in lines if any(f" {mesh}" in line for mesh in meshes)]
    assert len(shown) == len(found.rows)
    assert max(map(len, lines)) <= 80
    assert "…" not in text
    assert "ideally 20,062 tokens/s" in text
    assert "tensor ways: 11 at fp16, 6 at fp8, 3 at 4 bits" in text
    assert found.advice in text
    assert STOCK.source in text


def test_json_has_all_figures():
    document = json.loads(compare_dense(H200, 2, **SMALL).beside([RECORD]).to_json())
    assert document["num_devices"] == 2
    layer_wise = next(row for row in document["rows"] if row["strategy"] == "layer-wise")
    assert layer_wise["mesh"] == {"data": 1, "stage": 2, "tensor": 1}
    assert layer_wise["measured_step_seconds"] == pytest.approx(128 / 462_000)
    assert sum(layer_wise["seconds_by_part"].values()) == pytest.approx(layer_wise["step_seconds"])
    assert document["best_throughput"]["strategy"] == "replicas"


def parameters():
    keys = jax.ShapeDtypeStruct
    blocks = [
        {
            "up": keys((WIDTH, 4 * WIDTH), jnp.float32),
            "down": keys((4 * WIDTH, WIDTH), jnp.float32),
            "mix": keys((WIDTH, 2 * WIDTH), jnp.float32),
        }
        for _ in range(DEPTH)
    ]
    head = {"kernel": keys((WIDTH, VOCABULARY), jnp.float32)}
    return {
        "embed": {"table": keys((VOCABULARY, WIDTH), jnp.float32)},
        "blocks": blocks,
        "head": head,
    }


def logits(params, tokens):
    x = params["embed"]["table"][tokens]
    for block in params["blocks"]:
        x = x + jax.nn.gelu(x @ block["up"]) @ block["down"]
    return x @ params["head"]["kernel"]


def loss(params, tokens):
    return jnp.mean(jax.nn.logsumexp(logits(params, tokens), axis=-1))


def step(params, cache, tokens, positions):
    """One token: every block averages its cache, into which the token's row has been written."""
    x, new = params["embed"]["table"][tokens], []
    rows = jnp.arange(tokens.shape[0])
    for block, held in zip(params["blocks"], cache, strict=True):
        key, value = jnp.split(x @ block["mix"], 2, axis=-1)
        held = {
            "k": held["k"].at[rows, positions].set(key),
            "v": held["v"].at[rows, positions].set(value),
        }
        scores = jax.nn.softmax(jnp.einsum("bd,bcd->bc", x, held["k"]), axis=-1)
        x = x + jnp.einsum("bc,bcd->bd", scores, held["v"])
        x = x + jax.nn.gelu(x @ block["up"]) @ block["down"]
        new.append(held)
    return x @ params["head"]["kernel"], new


TOKENS = jax.ShapeDtypeStruct((BATCH, CONTEXT), jnp.int32)


def test_a_traced_function_has_its_bytes_and_operations():
    params = parameters()
    for block in params["blocks"]:
        del block["mix"]
    found = compare(logits, params, TOKENS, num_devices=2, device=CPU, tokens=CONTEXT)
    assert found.work.kind == "forward"
    assert found.work.batch == BATCH
    blocks = found.work.layers[1:-1]
    assert {layer.weight_bytes for layer in blocks} == {4 * 8 * WIDTH**2}
    # Two operations a weight and token, and those of the gelu and the sum.
    products = 2 * 8 * WIDTH**2 * CONTEXT
    assert all(products <= layer.flops < 1.2 * products for layer in blocks)
    assert all(layer.send_bytes == 4 * WIDTH * CONTEXT for layer in blocks)
    assert all((layer.kernels, layer.all_reduces) == (2, 1) for layer in blocks)
    assert {"one device", "replicas", "tensor", "layer-wise"} == {
        row.strategy.name for row in found.rows
    }


def test_a_loss_is_trained():
    params = parameters()
    for block in params["blocks"]:
        del block["mix"]
    found = compare(loss, params, TOKENS, num_devices=2, device=CPU)
    assert found.work.kind == "training"
    assert found.row("replicas").link_bytes > 0
    assert "examples/s" in str(found)


def test_a_large_table_is_looked_up():
    def looked_up(params, tokens):
        return params["table"][tokens] @ params["kernel"]

    shapes = {"table": (10_000, WIDTH), "kernel": (WIDTH, WIDTH)}
    params = {
        name: {"w": jax.ShapeDtypeStruct(shape, jnp.float32)} for name, shape in shapes.items()
    }

    def fn(params, tokens):
        return looked_up({name: leaf["w"] for name, leaf in params.items()}, tokens)

    table = compare(fn, params, TOKENS, num_devices=1, device=CPU).work.layers[0]
    assert table.weight_bytes == 4 * 10_000 * WIDTH
    assert table.read_bytes < 0.1 * table.weight_bytes


def test_a_traced_step_has_its_weights_and_caches():
    shape = jax.ShapeDtypeStruct((BATCH, CONTEXT, WIDTH), jnp.float32)
    cache = [{"k": shape, "v": shape} for _ in range(DEPTH)]
    found = compare_decode(step, parameters(), cache, batch=BATCH, num_devices=2, device=CPU)
    assert found.work.kind == "decode"
    by_hand = dense_decode(DEPTH, 1, WIDTH, 4 * WIDTH, BATCH, CONTEXT, "float32")
    assert found.work.state_bytes == by_hand.state_bytes
    blocks = [layer for layer in found.work.layers if layer.state_bytes]
    assert len(blocks) == DEPTH
    assert {layer.weight_bytes for layer in blocks} == {4 * 10 * WIDTH**2}
    # Five products, two writes, two reductions of the softmax.
    assert {(layer.kernels, layer.all_reduces) for layer in blocks} == {(9, 2)}
    assert found.row("layer-wise").state_bytes == by_hand.state_bytes / 2
    assert found.row("layer-wise").num_groups == 2
