"""Rivals without stages: one device, replicas and tensor parallelism, under `shard_map`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from experiments.dense16.model import CACHE_SPEC, TENSOR, Cache, Dense
from experiments.dense16.strategy import Strategy

WHOLE = PartitionSpec()


class Sequences(NamedTuple):
    """Loop-carried state of the batch: cache, next tokens int32[b], their positions."""

    cache: Cache
    tokens: Any
    positions: Any


class Unstaged(Strategy):
    """Every device runs all layers: on its share of the batch (replicas), or on its share of a
    layer (tensor).

    A tensor-parallel layer sums twice over the devices, as Megatron's does; embedding and head,
    small here, are whole on every device.
    """

    def __init__(self, name: str, model: Dense, devices: Sequence[Any], shape: dict[str, int]):
        axis = TENSOR if shape.get(TENSOR, 1) > 1 else "data"
        super().__init__(name, model, devices, shape, [axis])
        self.axis = axis if axis == TENSOR else None
        split = WHOLE if self.axis else PartitionSpec(axis)
        cache = CACHE_SPEC if self.axis else split
        self._params = model.param_specs() if self.axis else WHOLE
        self._specs = Sequences([{"k": cache, "v": cache}] * model.layers, split, split)
        self._made = PartitionSpec(None, *split)

    def place(self, params: Any) -> Any:
        return jax.device_put(params, self._sharded(self._params, params))

    def start(self, cache: Any, tokens: np.ndarray, positions: np.ndarray) -> Sequences:
        # A step overwrites its cache, so that it must not lie in the memory of what came.
        held = jax.device_put(cache, self._sharded(self._specs.cache, cache), may_alias=False)
        return self.rewind(Sequences(held, None, None), tokens, positions)

    def rewind(self, state: Sequences, tokens: np.ndarray, positions: np.ndarray) -> Sequences:
        sharding = NamedSharding(self.mesh, self._specs.tokens)
        return state._replace(
            tokens=jax.device_put(tokens, sharding), positions=jax.device_put(positions, sharding)
        )

    def run(self, weights: Any, state: Sequences, steps: int) -> tuple[Sequences, np.ndarray]:
        state, made = self.compile(steps)(weights, state)
        return state, np.asarray(made)

    def _compile(self, steps: int) -> Any:
        def generate(params: Any, state: Sequences) -> tuple[Sequences, Any]:
            return lax.scan(lambda state, _: self._step(params, state), state, length=steps)

        mapped = jax.shard_map(
            generate,
            mesh=self.mesh,
            in_specs=(self._params, self._specs),
            out_specs=(self._specs, self._made),
            check_vma=False,
        )
        return jax.jit(mapped, donate_argnums=1).lower(*self._types()).compile()

    def _step(self, params: Any, state: Sequences) -> tuple[Sequences, Any]:
        logits, cache = self.model.step(
            params, state.cache, state.tokens, state.positions, self.axis
        )
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return Sequences(cache, tokens, state.positions + 1), tokens

    def _types(self) -> tuple[Any, Sequences]:
        model = self.model
        numbers = jax.ShapeDtypeStruct((model.batch,), jnp.int32)
        state = Sequences(model.cache(model.batch, model.abstract), numbers, numbers)
        return self._typed(self._params, model.params(model.abstract)), self._typed(
            self._specs, state
        )

    def _typed(self, specs: Any, tree: Any) -> Any:
        def typed(aval: Any, sharding: Any) -> Any:
            return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding)

        return jax.tree.map(typed, tree, self._sharded(specs, tree))

    def _sharded(self, specs: Any, tree: Any) -> Any:
        return jax.tree.map(
            lambda spec: NamedSharding(self.mesh, spec), jax.tree.broadcast(specs, tree)
        )
