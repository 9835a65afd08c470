"""One stage on one device in a ring's steady state: every tick has another group of sequences."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.dense16.model import Cache, Dense, random_array


class Groups(NamedTuple):
    """Loop-carried state of a stage: per group a cache and int32[b] positions; x[b, d], tokens
    int32[b].
    """

    caches: list[Cache]
    positions: list[Any]
    x: Any
    tokens: Any


@dataclass(frozen=True, eq=False)
class StageLoop:
    """Loop over ticks of one stage without neighbours.

    A round of ticks is written out, as a ring's is, and a loop goes over rounds. Ticks depend on
    each other through x, since the compiler would merge the products of independent ones, which no
    pipeline could.

    Attributes:
      model: the stage: its layers, and as batch the sequences of one group.
      device: where it runs.
      groups: groups of sequences, each with its own cache.
      copies: sets of weights that take turns; with one, every tick reads the same.
      ticks: of a round; a multiple of `groups` and `copies`.
      rounds: of one program.
      has_ends: whether every tick also does what the first and the last stage do: embedding, head
        and sampling.
    """

    model: Dense
    device: Any
    groups: int
    copies: int
    ticks: int
    rounds: int
    has_ends: bool = False

    def __post_init__(self) -> None:
        if self.ticks % self.groups or self.ticks % self.copies:
            raise ValueError(
                f"ticks must be a multiple of groups={self.groups} and copies={self.copies}, got "
                f"{self.ticks}."
            )

    @property
    def ticks_of_program(self) -> int:
        return self.ticks * self.rounds

    @cached_property
    def program(self) -> Any:
        """Compiled program from (weights, groups) to groups; the groups are donated."""
        return jax.jit(self._run, donate_argnums=1).lower(*self._types()).compile()

    def weights(self, seed: int = 0) -> list[Any]:
        """Random weights, one set per copy."""
        sharding = jax.sharding.SingleDeviceSharding(self.device)
        return [
            self.model.params(random_array(self.model, seed + j, sharding))
            for j in range(self.copies)
        ]

    def start(self, seed: int = 1000) -> Groups:
        """Random caches; the next token of every sequence is near the end of its context."""
        model, sharding = self.model, jax.sharding.SingleDeviceSharding(self.device)
        make = [random_array(model, seed + j, sharding) for j in range(self.groups)]
        caches = [model.cache(model.batch, each) for each in make]
        x = random_array(model, seed - 1, sharding)((model.batch, model.width), 1.0, 0)
        tokens = jax.device_put(np.zeros(model.batch, np.int32), self.device, may_alias=False)
        return Groups(caches, self.positions(), x, tokens)

    def positions(self) -> list[Any]:
        """Positions of the groups, with room for the rounds of one program."""
        first = self.model.context - self.rounds * (self.ticks // self.groups)
        numbers = np.full(self.model.batch, first, np.int32)
        return [jax.device_put(numbers, self.device, may_alias=False) for _ in range(self.groups)]

    def _types(self) -> tuple[Any, Groups]:
        model, sharding = self.model, jax.sharding.SingleDeviceSharding(self.device)
        caches = [model.cache(model.batch, model.abstract) for _ in range(self.groups)]
        positions = [jax.ShapeDtypeStruct((model.batch,), jnp.int32)] * self.groups
        state = Groups(caches, positions, model.abstract((model.batch, model.width)), positions[0])
        types = [model.params(model.abstract)] * self.copies, state
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), types
        )

    def _run(self, weights: list[Any], state: Groups) -> Groups:
        return lax.scan(
            lambda state, _: (self._round(weights, state), None), state, length=self.rounds
        )[0]

    def _round(self, weights: list[Any], state: Groups) -> Groups:
        caches, positions, x, tokens = (
            list(state.caches),
            list(state.positions),
            state.x,
            state.tokens,
        )
        for t in range(self.ticks):
            g, params = t % self.groups, weights[t % self.copies]
            if self.has_ends:
                x = x + params["embed"][tokens]
            x, caches[g] = self._layers(params, caches[g], x, positions[g])
            if self.has_ends:
                tokens = jnp.argmax(self.model.logits(params, x), axis=-1).astype(jnp.int32)
            positions[g] += 1
        return Groups(caches, positions, x, tokens)

    def _layers(self, params: Any, cache: Cache, x: Any, positions: Any) -> tuple[Any, Cache]:
        new = []
        for block, held in zip(params["blocks"], cache, strict=True):
            x, held = self.model.block(block, held, x, positions)
            new.append(held)
        return x, new
