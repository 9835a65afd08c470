"""The strategies with stages, all of them as `lw.decode_ring`: layer-wise, and the paper's pipeline
of tensor groups.

The baseline, tensor x pipeline, has few stages of many devices each. It is given the same ring,
with as many groups of sequences in flight as stages and no copy of a cache, so that where the
weights lie is all that differs.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import layerwise_jax as lw
from experiments.dense16.model import CACHE_SPEC, TENSOR, Dense
from experiments.dense16.strategy import Strategy
from layerwise_jax.decode import RingState, rotated
from layerwise_jax.mesh import STAGE


class Ring(Strategy):
    """Equal stages of whole layers; the batch is split into one group of sequences per stage."""

    def __init__(
        self,
        name: str,
        model: Dense,
        devices: Sequence[Any],
        shape: dict[str, int],
        transport: Any = "auto",
        rounds: int = 1,
    ):
        super().__init__(name, model, devices, shape, [STAGE, TENSOR])
        self.transport = transport
        self.rounds = rounds
        stages = self.shape[STAGE]
        if model.batch % stages or model.layers % stages:
            raise ValueError(
                f"batch and layers must be multiples of the {stages} stages, got {model.batch} and "
                f"{model.layers}. Use another number of stages."
            )
        self.groups = (stages, model.batch // stages)

    @cached_property
    def ring(self) -> Any:
        """The ring, traced."""
        model, axis = self.model, TENSOR if self.shape[TENSOR] > 1 else None
        ring = lw.decode_ring(
            lambda params, cache, tokens, positions: model.step(
                params, cache, tokens, positions, axis
            ),
            model.params(model.abstract),
            model.cache(self.groups[1], model.abstract),
            group_size=self.groups[1],
            mesh=self.mesh,
            param_specs=model.param_specs(),
            cache_specs=CACHE_SPEC,
            transport=self.transport,
        )
        ring.ring = replace(ring.ring, rounds_per_iteration=self.rounds)
        return ring

    def place(self, params: Any) -> Any:
        return self.ring.place(params)

    def start(self, cache: Any, tokens: np.ndarray, positions: np.ndarray) -> RingState:
        caches = [
            jax.tree.map(lambda x, g=g: x[self._rows(g)], cache) for g in range(self.groups[0])
        ]
        return self.ring.start(
            tokens.reshape(self.groups), positions.reshape(self.groups), caches=caches
        )

    def _rows(self, group: int) -> slice:
        return slice(group * self.groups[1], (group + 1) * self.groups[1])

    def rewind(self, state: RingState, tokens: np.ndarray, positions: np.ndarray) -> RingState:
        first, stand = (
            rotated(self.ring.ring, self.mesh, x.reshape(self.groups)) for x in (tokens, positions)
        )
        return state._replace(tokens=first, positions=stand)

    def run(self, weights: Any, state: RingState, steps: int) -> tuple[RingState, np.ndarray]:
        self.compile(steps)
        state, tokens = self.ring(weights, state, np.full((steps, *self.groups), -1))
        return state, tokens.reshape(steps, self.model.batch)

    def _compile(self, steps: int) -> Any:
        weights = self.ring.place(self.model.params(self.model.abstract))
        return self.ring.compiled(weights, self._state_types(), steps)

    def _state_types(self) -> RingState:
        """Types of the results of `start`, with shardings."""
        numbers = np.zeros(self.groups, np.int32)
        slots = self.ring.ring.loop.placement.slots
        types = jax.eval_shape(lambda: self.ring.start(numbers, numbers))
        specs = types._replace(
            caches=[{j: slots[j].spec for j in held} for held in types.caches],
            **{
                name: [PartitionSpec()] * len(types.caches)
                for name in types._fields
                if name != "caches"
            },
        )

        def typed(aval: Any, spec: PartitionSpec) -> Any:
            sharding = NamedSharding(self.mesh, PartitionSpec(STAGE, *spec))
            return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding)

        return jax.tree.map(typed, types, specs)
