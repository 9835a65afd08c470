"""Assignment of weights to slots. Stages are assigned to devices round-robin."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerwise_jax.schedule.table import round_robin_device
from layerwise_jax.stage.align import Alignment
from layerwise_jax.stage.cut import Stage
from layerwise_jax.stage.placement import Placement, Slot
from layerwise_jax.stage.slot_names import slot_names
from layerwise_jax.trace.layers import Signature
from layerwise_jax.trace.program import Program, Value, Weight


@dataclass(frozen=True, eq=False)
class _OpenSlot:
    """A slot being filled: type of a shard, and the weight of every device so far."""

    aval: Any
    weights: list[Weight | None]


def assign_slots(
    program: Program,
    stages: Sequence[Stage],
    alignment: Alignment,
    signature: Signature,
    num_devices: int,
    *,
    state: Mapping[int, Weight],
    kinds: Mapping[Weight, Hashable] | None = None,
) -> Placement:
    """Give every weight of every stage a slot.

    Outside of the common body, only weights of one kind share a slot. State, which changes with
    each microbatch, is a kind.

    Args:
      program: the program.
      stages: its stages; assigned to devices round-robin.
      alignment: the weights at each place of the stages' common body.
      signature: trees and types of the parameters.
      num_devices: devices of a replica.
      state: output position -> the weight whose new value that output is.
      kinds: the kind of each weight; weights that are not in it form one more kind.
    """
    kind_of = dict(kinds or {})
    # A slot of state is renewed as a whole, and has no gradient: nothing trained may be in it.
    kind_of.update({weight: ("state", kind_of.get(weight)) for weight in state.values()})
    slots, body_slots = _slots_of_body(program, alignment, num_devices)
    num_common = len(slots)
    outside = _weights_outside_body(program, stages, slots, num_devices, state)
    for (value, weight), devices in outside.items():
        # Slots behind `num_common`: those of the body hold the same weight of every stage.
        shareable = [
            j
            for j in range(num_common, len(slots))
            if _kinds(slots[j], kind_of) == {kind_of.get(weight)}
        ]
        j = _free_slot(slots, shareable, program.avals[value], devices, num_devices)
        for device in devices:
            slots[j].weights[device] = weight
    names = slot_names([slot.weights for slot in slots], signature.path)
    named = tuple(
        Slot(name, slot.aval, tuple(slot.weights)) for name, slot in zip(names, slots, strict=True)
    )
    return Placement(named, num_devices, signature, body_slots)


def _slots_of_body(
    program: Program, alignment: Alignment, num_devices: int
) -> tuple[list[_OpenSlot], tuple[tuple[int, ...], ...]]:
    """Slots of the common body, and their indices for every chunk."""
    of_stage = [part.shape.weights for part in alignment.parts]  # [stages][weights of the body]
    slots: list[_OpenSlot] = []
    body_slots = []
    for first in range(0, len(of_stage), num_devices):  # the first stage of every chunk
        start = len(slots)
        # values at one place of the body, one a device
        for values in zip(*of_stage[first : first + num_devices], strict=True):
            weights: list[Weight | None] = [program.weights[value] for value in values]
            slots.append(_OpenSlot(program.avals[values[0]], weights))
        body_slots.append(tuple(range(start, len(slots))))
    return slots, tuple(body_slots)


def _kinds(slot: _OpenSlot, kind_of: Mapping[Weight, Hashable]) -> set[Hashable]:
    return {kind_of.get(weight) for weight in slot.weights if weight is not None}


def _weights_outside_body(
    program: Program,
    stages: Sequence[Stage],
    slots: Sequence[_OpenSlot],
    num_devices: int,
    state: Mapping[int, Weight],
) -> dict[tuple[Value, Weight], list[int]]:
    """The devices that need each weight and do not hold it in a slot of the body.

    An unused weight lives on device 0. Weights of many devices come first: they fit fewer slots.
    """
    # by device: the weights that slots of the body hold there
    held = [{slot.weights[device] for slot in slots} for device in range(num_devices)]
    updated = [{state[p] for p in stage.outputs if p in state} for stage in stages]
    read = {value for stage in stages for value in stage.weights}
    outside: dict[tuple[Value, Weight], list[int]] = {}
    for value, weight in program.weights.items():
        # Devices of the stages that read the weight or give it a new value.
        users = {
            round_robin_device(s, num_devices)
            for s, stage in enumerate(stages)
            if value in stage.weights or weight in updated[s]
        }
        devices = [device for device in sorted(users) if weight not in held[device]]
        # Weights that the body holds on all their devices need no further slot.
        if devices or value not in read:
            outside[value, weight] = devices or [0]
    # stable: equal counts keep the order of the program
    return dict(sorted(outside.items(), key=lambda item: -len(item[1])))


def _free_slot(
    slots: list[_OpenSlot],
    shareable: Sequence[int],
    aval: Any,
    devices: Sequence[int],
    num_devices: int,
) -> int:
    """The first shareable slot of this type that is empty on these devices, or a new slot."""
    for j in shareable:
        slot = slots[j]
        is_same_type = (slot.aval.shape, slot.aval.dtype) == (aval.shape, aval.dtype)
        if is_same_type and all(slot.weights[device] is None for device in devices):
            return j
    slots.append(_OpenSlot(aval, [None] * num_devices))
    return len(slots) - 1
