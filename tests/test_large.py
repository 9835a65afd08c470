"""A model far larger than this machine is traced, cut, costed and partitioned, in bounded memory.

`python -m tests.test_large 48` prints the plan of 48 blocks.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from experiments.memory import peak_memory_bytes
from layerwise_jax.measure.layers import measure_costs
from layerwise_jax.partition.solver import partition_layers
from layerwise_jax.stage.cut import cut_stages
from layerwise_jax.trace.layers import trace_layers

# The shape of GPT-3.
WIDTH, HEADS, HIDDEN, VOCABULARY, CONTEXT = 12288, 96, 49152, 50257, 2048
NUM_STAGES = 16
MAX_BYTES = 2**30
BLOCK_PARAMS = 4 * WIDTH * (WIDTH + 1) + 2 * WIDTH * HIDDEN + HIDDEN + WIDTH + 4 * WIDTH


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS)(y, mask=mask)
        y = nn.gelu(nn.Dense(HIDDEN)(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH)(y)


class GPT(nn.Module):
    depth: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(VOCABULARY, WIDTH)
        positions = self.param("positions", nn.initializers.normal(0.02), (CONTEXT, WIDTH))
        x, mask = embed(tokens) + positions, nn.make_causal_mask(tokens)
        for _ in range(self.depth):
            x = Block()(x, mask)
        return embed.attend(nn.LayerNorm()(x))


def plan_abstractly(depth: int) -> dict[str, Any]:
    """Trace, cut, cost and partition a model of `depth` blocks, of which no weight is ever in
    memory.
    """
    model = GPT(depth)
    tokens = jax.ShapeDtypeStruct((1, CONTEXT), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    layers = trace_layers(model.apply, params, tokens)
    costs = measure_costs(layers)
    partition = partition_layers(costs, min(NUM_STAGES, len(layers)))
    stages = cut_stages(layers, partition.boundaries)
    return {
        "peak_bytes": peak_memory_bytes(),
        "params": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "names": layers.names,
        "weight_bytes": [cost.weight_bytes for cost in costs],
        "sends": [sum(layers.program.avals[x].size for x in stage.sends) for stage in stages],
    }


def test_a_model_of_175_billion_parameters_is_planned_in_a_gigabyte() -> None:
    command = [sys.executable, "-m", "tests.test_large", "96"]
    root = Path(__file__).parents[1]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    plan = json.loads(run.stdout)
    assert plan["params"] == 96 * BLOCK_PARAMS + (VOCABULARY + CONTEXT) * WIDTH + 2 * WIDTH
    assert plan["params"] == pytest.approx(175e9, rel=0.01)
    blocks = [f"Block_{i}" for i in range(96)]
    assert plan["names"] == ["Embed_0", *blocks, "LayerNorm_0", "Embed_0 (use 2)"]
    assert plan["weight_bytes"][1:-2] == [4 * BLOCK_PARAMS] * 96
    assert plan["sends"] == [CONTEXT * WIDTH] * (NUM_STAGES - 1) + [0]
    assert plan["peak_bytes"] < MAX_BYTES


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    print(json.dumps(plan_abstractly(int(sys.argv[1]))))
