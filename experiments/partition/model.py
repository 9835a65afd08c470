"""A model's layers as stages under each method, with costs from the compiler for an absent H100."""

from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console

from experiments.partition.picture import LayerFigures, draw_stages
from layerwise_jax.cost import H100
from layerwise_jax.examples import GPT
from layerwise_jax.measure import CompiledCosts, roofline_seconds
from layerwise_jax.trace import trace_layers

NUM_STAGES = 8
TOKENS = (1, 256)


def draw(folder: Path, console: Console) -> None:
    """Print the cost of every layer and draw the stages into `folder`."""
    jax.config.update("jax_platforms", "cpu")
    model = GPT(
        vocabulary=16384, width=512, depth=12, heads=8, context=TOKENS[1], dtype=jnp.float16
    )
    tokens = jax.ShapeDtypeStruct(TOKENS, jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float16), params)
    gauge = CompiledCosts(trace_layers(model.apply, half, tokens), H100)
    costs = gauge.costs()
    seconds, _ = roofline_seconds(gauge.layers, costs, H100)
    figures = [
        LayerFigures(cost.name, time, cost.size) for cost, time in zip(costs, seconds, strict=True)
    ]
    title = (
        f"GPT of 12 blocks, width 512, float16, {TOKENS[1]} tokens, on {NUM_STAGES} stages "
        f"({gauge.compiler})"
    )
    for figure in figures:
        print(f"{figure.name:20} {1e6 * figure.seconds:8.2f} us {figure.bytes:>12,} bytes")
    path = draw_stages(figures, NUM_STAGES, H100.usable_l2_bytes, folder / "model.png", title)
    console.print(f"Picture: {path}", soft_wrap=True)
