"""A ring of stages that generates tokens: its weights placed, its groups started, its program
compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from layerwise_jax import processes
from layerwise_jax._arguments import checked_int32
from layerwise_jax.decode.cache import CacheLayers
from layerwise_jax.decode.generation import Generation, generate
from layerwise_jax.decode.loop import RingLoop
from layerwise_jax.decode.prefill import Prefill
from layerwise_jax.decode.sampling import data_of_keys
from layerwise_jax.decode.sharding import InnerSharding
from layerwise_jax.decode.spmd import ring_program, weights_of
from layerwise_jax.decode.state import (
    by_arrival,
    first_cache,
    from_arrival,
    gather_cache,
    restarted,
    rotated,
    start_places,
)
from layerwise_jax.decode.step import KEYS
from layerwise_jax.decode.transport import Channel
from layerwise_jax.decode.values import RingState
from layerwise_jax.plan import Plan
from layerwise_jax.stage.placement import Staged
from layerwise_jax.trace.layers import LayerSequence


@dataclass(eq=False)
class DecodeRing:
    """A step of token generation run as a ring.

    Attributes:
      layers: the layers of the step, the sampler in the last.
      mesh: the mesh.
      ring: the loop.
      plan: its stages; a microbatch of the plan is a group.
      sharding: how parameters and cache are sharded inside a stage.
      group_size: sequences of a group.
      cache: the first cache of a group, what is stacked over layers as a list of rows.
      rows: which leaves of the user's cache are stacked.
      draws: whether tokens are drawn, which takes a key a sequence.
      reader: the pass that reads prompts at once; None if they are read a token a step.
    """

    layers: LayerSequence
    mesh: Mesh
    ring: RingLoop
    plan: Plan
    sharding: InnerSharding
    group_size: int
    cache: Any
    rows: CacheLayers
    draws: bool = False
    reader: Prefill | None = None
    _compiled: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def num_params(self) -> int:
        """Leaves of the parameters; those of the cache are counted on from there."""
        return self.sharding.num_params

    @property
    def num_groups(self) -> int:
        """Groups in flight."""
        return self.ring.num_groups

    @property
    def num_sequences(self) -> int:
        """Sequences in flight."""
        return self.num_groups * self.group_size

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Tokens that end a sequence."""
        return self.ring.stop_tokens

    @property
    def prefill_length(self) -> int:
        """Tokens of a prompt that are read at once; 0 if they are read a token a step."""
        return 0 if self.reader is None else self.reader.length

    @property
    def sequences_are_independent(self) -> bool:
        """Whether sequences can come and go one by one; else a group starts and ends together."""
        return self.ring.step.sequences_are_independent

    def place(self, params: Any) -> Staged:
        """Every stage's weights on its own device: see `Placement.place`. The cache is not among
        them.
        """
        placement, state = self.ring.loop.placement, set(self.ring.loop.state_slots)
        leaves = self.sharding.check(params)
        return {
            slot.name: placement.fill(
                replace(slot, spec=self.ring.specs.get(j, PartitionSpec())), leaves, self.mesh
            )
            for j, slot in enumerate(placement.slots)
            if j not in state
        }

    def start(
        self, tokens: Any, positions: Any = 0, keys: Any = None, caches: Sequence[Any] | None = None
    ) -> RingState:
        """All groups before their first step.

        Args:
          tokens: int[groups, sequences], the first token of every sequence.
          positions: where they stand, likewise or one number.
          keys: random keys [groups, sequences]; None where nothing is drawn.
          caches: every group's cache, where there is something in it already; None for the first
            cache.
        """
        shape = (self.num_groups, self.group_size)
        held = (
            [self.cache] * self.num_groups
            if caches is None
            else [self._cache(each) for each in caches]
        )
        if len(held) != self.num_groups:
            raise ValueError(
                f"{len(held)} caches came for {self.num_groups} groups; one each is wanted."
            )
        return start_places(
            self.ring,
            self.mesh,
            checked_int32("tokens", tokens, shape),
            checked_int32("positions", np.broadcast_to(positions, shape), shape),
            self._key_data(keys),
            [self._by_leaf(cache) for cache in held],
        )

    def _key_data(self, keys: Any) -> np.ndarray:
        aval = self.layers.signature.inputs_avals[KEYS]
        if keys is None and self.draws:
            raise ValueError(
                "The sampler draws tokens, and no keys came; a random key a sequence is wanted."
            )
        if keys is None:
            return np.zeros((self.num_groups, *aval.shape), aval.dtype)
        return data_of_keys(keys, self.num_groups, self.group_size)

    def _cache(self, cache: Any) -> Any:
        """A group's cache as the ring has it."""
        split = self.rows.split(cache)
        for (path, came), wanted in zip(
            jax.tree_util.tree_leaves_with_path(split), jax.tree.leaves(self.cache), strict=True
        ):
            types = [f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}" for leaf in (came, wanted)]
            if types[0] != types[1]:
                raise ValueError(
                    f"A cache's {jax.tree_util.keystr(path)} came as {types[0]}; {types[1]} is "
                    "wanted."
                )
        return split

    def _by_leaf(self, cache: Any) -> dict[int, Any]:
        return {self.num_params + i: leaf for i, leaf in enumerate(jax.tree.leaves(cache))}

    def __call__(
        self, staged: Staged, places: RingState, forced: Any
    ) -> tuple[RingState, np.ndarray]:
        """Generate a token for every sequence, as often as `forced` has steps. The places are
        donated.

        Args:
          staged: what `place` returned.
          places: what `start` or the last call returned.
          forced: int32[steps, groups, sequences]: what stands there in a prompt, or -1.

        Returns:
          The places afterwards. Tokens int32[steps, groups, sequences], `forced` ones included.
        """
        forced = np.atleast_1d(forced)
        steps = len(forced)
        if not steps:
            raise ValueError("forced came with 0 steps; a step or more is wanted.")
        wanted = checked_int32(
            "forced", forced, (steps, self.num_groups, self.group_size), least=-1
        )
        inputs = (weights_of(self.ring, staged), places, by_arrival(self.ring, wanted, -1), None)
        places, arrived = self._channel.run(self.compiled(staged, places, steps), *inputs)
        return places, self._tokens(arrived)

    @cached_property
    def _channel(self) -> Channel:
        """The transport's resources on this ring's devices."""
        return self.ring.transport.open(self.mesh, self.ring.message.avals)

    def _tokens(self, arrived: jax.Array) -> np.ndarray:
        """Tokens [step, group, sequence], which the first stage has."""
        return from_arrival(self.ring, processes.read_shard(arrived, 0))

    def compiled(self, staged: Staged, places: RingState, steps: int) -> Any:
        """The program of so many steps, compiled the first time that it is asked for."""
        if steps not in self._compiled:
            forced = jax.ShapeDtypeStruct((steps + 1, self.ring.length, self.group_size), jnp.int32)
            program = ring_program(self.ring, self.mesh)
            self._compiled[steps] = program.lower(
                weights_of(self.ring, staged), places, forced, None, self._channel.operand_type
            ).compile()
        return self._compiled[steps]

    def prefill(
        self, staged: Staged, places: RingState, prompts: Any, lengths: Any, following: Any = -1
    ) -> tuple[RingState, np.ndarray]:
        """Read prompts at once, in one pass of all groups through the stages. The places are
        donated.

        Args:
          staged: what `place` returned.
          places: those of sequences at their start: what `start` or `restart` returned.
          prompts: int[groups, sequences, prefill_length], padded on the right.
          lengths: int[groups, sequences], how many of a prompt's tokens count; 0 for all sequences
            of a group that stays as it is.
          following: what stands behind the tokens in a longer prompt, likewise, or -1.

        Returns:
          The places afterwards, every sequence at the position of its length. Tokens int32[groups,
          sequences], the first new ones; `following` where that is not -1; those of groups that
          read nothing are what they were.

        Raises:
          ValueError: the ring has no prefill_fn, or shapes or lengths are wrong.
        """
        if self.reader is None:
            raise ValueError(
                "This ring has no prefill_fn; give one to decode_ring, with prefill_length."
            )
        held = self.reader.prompts(self.mesh, prompts, lengths, self.group_size)
        shape = (1, self.num_groups, self.group_size)
        forced = checked_int32("following", np.broadcast_to(following, shape), shape, least=-1)
        inputs = (weights_of(self.ring, staged), places, by_arrival(self.ring, forced, -1), held)
        places, arrived = self.compiled_prefill(staged, places)(*inputs, None)
        return places, self._tokens(arrived)[0]

    def compiled_prefill(self, staged: Staged, places: RingState) -> Any:
        """The program that reads prompts, compiled the first time that it is asked for."""
        assert self.reader is not None
        if "prefill" not in self._compiled:
            forced = jax.ShapeDtypeStruct((2, self.ring.length, self.group_size), jnp.int32)
            shape = (self.num_groups, self.group_size, self.reader.length)
            nothing = np.zeros(shape, np.int32)
            prompts = self.reader.prompts(self.mesh, nothing, nothing[..., 0], self.group_size)
            program = ring_program(self.reader.ring, self.mesh, prompts)
            self._compiled["prefill"] = program.lower(
                weights_of(self.ring, staged), places, forced, prompts, None
            ).compile()
        return self._compiled["prefill"]

    def restart(
        self, places: RingState, mask: Any, tokens: Any, positions: Any, keys: Any = None
    ) -> RingState:
        """The places with new sequences where `mask` is true. The places are donated.

        Args:
          places: the places.
          mask: bool[groups, sequences]; whole groups unless the ring keeps rows.
          tokens: int32[groups, sequences], the first tokens of the new sequences.
          positions: where they stand, likewise.
          keys: random keys [groups, sequences]; None where nothing is drawn.
        """
        mask, shape = np.asarray(mask), (self.num_groups, self.group_size)
        if mask.shape != shape or mask.dtype != bool:
            raise ValueError(
                f"mask came as {mask.dtype}{list(mask.shape)}; bool{list(shape)} is wanted."
            )
        if not self.sequences_are_independent and (mask.any(axis=1) != mask.all(axis=1)).any():
            raise ValueError(
                f"mask came as {mask.tolist()}; the sequences of a group share a part of the "
                "cache, so all or none "
                "start anew."
            )
        fresh = RingState(
            caches=[],
            tokens=rotated(self.ring, self.mesh, checked_int32("tokens", tokens, shape)),
            positions=rotated(self.ring, self.mesh, checked_int32("positions", positions, shape)),
            keys=rotated(self.ring, self.mesh, self._key_data(keys)),
            done=rotated(self.ring, self.mesh, np.zeros(shape, bool)),
        )
        return self._restart(rotated(self.ring, self.mesh, mask), places, fresh, self._first_cache)

    @cached_property
    def _first_cache(self) -> dict[int, Any] | None:
        """The first cache, a row a stage; None if it is all zeros."""
        if all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(self.cache)):
            return None
        return first_cache(self.ring, self.mesh, self._by_leaf(self.cache))

    @cached_property
    def _restart(self) -> Any:
        def restart(mask: Any, places: RingState, fresh: RingState, first: Any) -> RingState:
            def initial(slot: int) -> Any:
                return jnp.zeros_like(places.caches[0][slot]) if first is None else first[slot]

            return restarted(initial, mask, places, fresh)

        return jax.jit(restart, donate_argnums=1)

    def gather_cache(self, places: RingState, group: int) -> Any:
        """One group's cache as the user's tree."""
        found = gather_cache(self.ring, places, group)
        leaves, tree = jax.tree.flatten(self.cache)
        return self.rows.join(
            tree.unflatten([found[self.num_params + i] for i in range(len(leaves))])
        )

    def generate(
        self,
        staged: Staged,
        prompts: Sequence[Any],
        max_new_tokens: int,
        *,
        keys: Any = None,
        steps_per_call: int = 64,
        progress: bool = False,
    ) -> Generation:
        """Generate for any number of prompts: see `generate`."""
        return generate(self, staged, prompts, max_new_tokens, keys, steps_per_call, progress)
