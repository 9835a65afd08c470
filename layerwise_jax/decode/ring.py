"""Decode ring: places weights, starts groups of sequences, compiles and runs its programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from layerwise_jax import processes
from layerwise_jax._arguments import checked_int32
from layerwise_jax.decode.generation import Generation, GenerationRun, generate
from layerwise_jax.decode.lockstep import CacheForm
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
    """A step of token generation run as a ring of stages. Made by `decode_ring`.

    Attributes:
      layers: layers of the step, the sampler in the last.
      mesh: the mesh.
      ring: the loop.
      plan: its stages; a microbatch of the plan is a group.
      sharding: sharding of parameters and cache inside a stage.
      group_size: sequences of a group.
      cache: the cache of a group before its first token, in the ring's form.
      rows: the ring's form of the user's cache: split by layer, lockstep leaves once a group.
      draws: whether the sampler draws tokens, which takes a random key a sequence.
      reader: the prefill program; None if prompts are read one token a step.
    """

    layers: LayerSequence
    mesh: Mesh
    ring: RingLoop
    plan: Plan
    sharding: InnerSharding
    group_size: int
    cache: Any
    rows: CacheForm
    draws: bool = False
    reader: Prefill | None = None
    _compiled: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        devices = self.mesh.devices
        return (
            f"DecodeRing({self.ring.loop.num_stages} stages, groups of {self.group_size} "
            f"sequences, {len(self.layers)} layers, {devices.size} x "
            f"{devices.flat[0].platform} {dict(self.mesh.shape)})"
        )

    def __deepcopy__(self, memo: Any) -> DecodeRing:
        """The ring itself: it is frozen, and its traced operations cannot be copied."""
        return self

    @property
    def num_params(self) -> int:
        """Leaves of the parameters. The cache's leaves are numbered from here."""
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
        """Most tokens of a prompt that are read at once; 0 without a prefill program."""
        return 0 if self.reader is None else self.reader.length

    @property
    def sequences_are_independent(self) -> bool:
        """True if sequences can come and go one by one; else a group starts and ends together."""
        return self.ring.step.sequences_are_independent

    def place(self, params: Any) -> Staged:
        """Put every stage's weights on its devices; returns arrays by slot name. The cache is
        placed by `start`.

        Raises:
          ValueError: `params` differ from the ring's in tree, shape or dtype.
        """
        # Cache slots are placed by `start`, one array a place; weights are one array a slot.
        placement, state = self.ring.loop.placement, set(self.ring.loop.state_slots)
        leaves = self.sharding.check(params)
        return {
            slot.name: placement.fill(slot, leaves, self.mesh)
            for j, slot in enumerate(placement.slots)
            if j not in state
        }

    def start(
        self, tokens: Any, positions: Any = 0, keys: Any = None, caches: Sequence[Any] | None = None
    ) -> RingState:
        """The state of all groups before their first step.

        Args:
          tokens: int[groups, sequences], the first input of every sequence.
          positions: int[groups, sequences], positions of these tokens, or one int.
          keys: random keys [groups, sequences]; None for a greedy sampler.
          caches: one cache a group, where they hold something already; None for the first cache.

        Raises:
          ValueError: another shape or number, or keys are missing.
        """
        shape = (self.num_groups, self.group_size)
        held = (
            [self.cache] * self.num_groups
            if caches is None
            else [self.rows.checked(each, self.cache) for each in caches]
        )
        if len(held) != self.num_groups:
            raise ValueError(f"caches must be one a group, {self.num_groups}, got {len(held)}.")
        return start_places(
            self.ring,
            self.mesh,
            checked_int32("tokens", tokens, shape),
            # One position for all sequences is common: every prompt starts at 0.
            checked_int32("positions", np.broadcast_to(positions, shape), shape),
            self._key_data(keys),
            [self._by_leaf(cache) for cache in held],
        )

    def _key_data(self, keys: Any) -> np.ndarray:
        aval = self.layers.signature.inputs_avals[KEYS]
        # A greedy sampler gets zeros as key data, which nothing reads.
        if keys is None and self.draws:
            raise ValueError(
                "keys must be a random key a sequence where the sampler draws tokens, got None."
            )
        if keys is None:
            return np.zeros((self.num_groups, *aval.shape), aval.dtype)
        return data_of_keys(keys, self.num_groups, self.group_size)

    def _by_leaf(self, cache: Any) -> dict[int, Any]:
        return {self.num_params + i: leaf for i, leaf in enumerate(jax.tree.leaves(cache))}

    def __call__(
        self, staged: Staged, places: RingState, forced: Any
    ) -> tuple[RingState, np.ndarray]:
        """Run the step for every sequence as often as `forced` has steps. The state is donated.

        Args:
          staged: placed parameters, from `place`.
          places: the state, from `start`, `restart`, `prefill` or the call before.
          forced: int32[steps, groups, sequences], teacher-forced prompt tokens, or -1 to sample.

        Returns:
          The new state, and int32[steps, groups, sequences]: the tokens, forced ones included.

        Raises:
          ValueError: another shape.
          TransportError: a stage's message did not arrive; the state is lost.
        """
        # [steps, groups, sequences]
        forced = np.atleast_1d(forced)
        steps = len(forced)
        if not steps:
            raise ValueError("forced must have at least 1 step, got 0.")
        checked = checked_int32(
            "forced", forced, (steps, self.num_groups, self.group_size), least=-1
        )
        inputs = (weights_of(self.ring, staged), places, by_arrival(self.ring, checked, -1), None)
        # arrived: [stages, steps + 1, length, sequences], of which stage 0 has the tokens.
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
        """The program of so many steps; compiled on first use."""
        # A program for each number of steps: XLA records graphs of loops with a known trip count.
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
        """Read prompts in one pass of all groups through the stages. The state is donated.

        Args:
          staged: placed parameters, from `place`.
          places: the state of sequences at their start, from `start` or `restart`.
          prompts: int[groups, sequences, prefill_length], padded on the right.
          lengths: int[groups, sequences], tokens of each prompt; 0 throughout a group that keeps
            its state.
          following: int[groups, sequences] or one int: the token behind those read, where a prompt
            is longer, or -1 to sample.

        Returns:
          The new state, every sequence at the position of its length, and int32[groups, sequences]:
          the first new tokens, or `following` where it is not -1. A group that reads nothing keeps
          its tokens.

        Raises:
          ValueError: the ring has no prefill_fn, or shapes or lengths are wrong.
        """
        if self.reader is None:
            raise ValueError(
                "prefill needs a ring with a prefill_fn, got one without. Pass prefill_fn and "
                "prefill_length to decode_ring."
            )
        held = self.reader.prompts(self.mesh, prompts, lengths, self.group_size)
        shape = (1, self.num_groups, self.group_size)
        forced = checked_int32("following", np.broadcast_to(following, shape), shape, least=-1)
        # One round: its first token arrives at the first stage in the round after.
        inputs = (weights_of(self.ring, staged), places, by_arrival(self.ring, forced, -1), held)
        places, arrived = self.compiled_prefill(staged, places)(*inputs, None)
        return places, self._tokens(arrived)[0]

    def compiled_prefill(self, staged: Staged, places: RingState) -> Any:
        """The prefill program; compiled on first use."""
        assert self.reader is not None
        if "prefill" not in self._compiled:
            forced = jax.ShapeDtypeStruct((2, self.ring.length, self.group_size), jnp.int32)
            shape = (self.num_groups, self.group_size, self.reader.length)
            # Values do not matter here, only types and shardings.
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
        """The state with new sequences where `mask` is true. The state is donated.

        Args:
          places: the state.
          mask: bool[groups, sequences]; whole groups unless sequences are independent.
          tokens: int32[groups, sequences], first inputs of the new sequences.
          positions: int32[groups, sequences], positions of these tokens.
          keys: random keys [groups, sequences]; None for a greedy sampler.

        Raises:
          ValueError: another shape, a part of a group that shares cache, or keys are missing.
        """
        mask = np.asarray(mask)
        shape = (self.num_groups, self.group_size)
        if mask.shape != shape or mask.dtype != bool:
            raise ValueError(f"mask must be bool{list(shape)}, got {mask.dtype}{list(mask.shape)}.")
        # A shared leaf belongs to all of the group: it cannot start anew for some.
        if not self.sequences_are_independent and (mask.any(axis=1) != mask.all(axis=1)).any():
            raise ValueError(
                "mask must have whole groups where sequences share a part of the cache, got "
                f"{mask.tolist()}."
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
        """The first cache by slot, [stages, ...]; None if it is all zeros."""
        # A first cache of zeros is made in the program and takes no memory between calls.
        if all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(self.cache)):
            return None
        return first_cache(self.ring, self.mesh, self._by_leaf(self.cache))

    @cached_property
    def _restart(self) -> Any:
        # Donated: caches are changed in place.
        return jax.jit(restarted, donate_argnums=1)

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
        progress: bool = False,
        **options: Any,
    ) -> Generation:
        """Generate for any number of prompts; arguments are those of `GenerationRun`.

        Options are `keys`, `stop_sequences` and `steps_per_call`.
        """
        return generate(self.stream(staged, prompts, max_new_tokens, **options), progress)

    def stream(
        self, staged: Staged, prompts: Sequence[Any], max_new_tokens: int, **options: Any
    ) -> GenerationRun:
        """Generate as `generate` does: an iterable of `Chunk`, with `result()` afterwards."""
        return GenerationRun(self, staged, prompts, max_new_tokens, **options)
