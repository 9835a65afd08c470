"""Which weight goes into which slot. Stage s lives on device s % devices."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from layerwise_jax.stage.align import Alignment
from layerwise_jax.stage.cut import Stage
from layerwise_jax.stage.placement import Placement, Slot
from layerwise_jax.stage.slot_names import slot_names
from layerwise_jax.trace.layers import Signature
from layerwise_jax.trace.program import Program, Value, Weight

# A slot being filled: its type, and the weight in every row.
SlotShards = tuple[Any, list[Weight | None]]


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

    Outside of the common body, weights share a slot with their own kind only; state, which changes
    with each microbatch, is a kind of its own.

    Args:
      program: the program.
      stages: its stages; stage s lives on device s % num_devices.
      alignment: which weights stand at the same place of the stages' common body.
      signature: trees and types of the parameters.
      num_devices: devices of a replica.
      state: for outputs that are new values of weights, which weight.
      kinds: the kinds of weights; those that are not in it are of one kind.
    """
    kind_of = dict(kinds or {})
    kind_of.update({weight: ("state", kind_of.get(weight)) for weight in state.values()})
    rows = _body_rows(program, alignment, num_devices)
    common = len(rows)
    for (value, weight), users in _odd_weights(program, stages, rows, num_devices, state).items():
        shareable = [
            j
            for j in range(common, len(rows))
            if _kinds(rows[j][1], kind_of) == {kind_of.get(weight)}
        ]
        slot = _free_slot(rows, shareable, program.avals[value], users, num_devices)
        for device in users:
            rows[slot][1][device] = weight
    names = slot_names([weights for _, weights in rows], signature.params_paths)
    slots = tuple(
        Slot(name, aval, tuple(weights)) for name, (aval, weights) in zip(names, rows, strict=True)
    )
    return Placement(slots, num_devices, signature)


def _body_rows(program: Program, alignment: Alignment, num_devices: int) -> list[SlotShards]:
    """Slots of the common body, those of the first stage of every device first."""
    weights = [part.shape.weights for part in alignment.parts]
    return [
        (program.avals[values[0]], [program.weights[value] for value in values])
        for first in range(0, len(weights), num_devices)
        for values in zip(*weights[first : first + num_devices], strict=True)
    ]


def _kinds(weights: Sequence[Weight | None], kind_of: Mapping[Weight, Hashable]) -> set[Hashable]:
    return {kind_of.get(weight) for weight in weights if weight is not None}


def _odd_weights(
    program: Program,
    stages: Sequence[Stage],
    rows: Sequence[SlotShards],
    num_devices: int,
    state: Mapping[int, Weight],
) -> dict[tuple[Value, Weight], list[int]]:
    """The devices that use each weight outside the common body; a weight that nothing uses lives on
    device 0.
    """
    placed = [{weights[device] for _, weights in rows} for device in range(num_devices)]
    renewed = [{state[p] for p in stage.outputs if p in state} for stage in stages]
    used = {value for stage in stages for value in stage.weights}
    odd: dict[tuple[Value, Weight], list[int]] = {}
    for value, weight in program.weights.items():
        readers = [
            s for s, stage in enumerate(stages) if value in stage.weights or weight in renewed[s]
        ]
        users = [
            device
            for device in sorted({s % num_devices for s in readers})
            if weight not in placed[device]
        ]
        if users or value not in used:
            odd[value, weight] = users or [0]
    return dict(sorted(odd.items(), key=lambda item: -len(item[1])))


def _free_slot(
    rows: list[SlotShards],
    shareable: Sequence[int],
    aval: Any,
    users: Sequence[int],
    num_devices: int,
) -> int:
    """The first of the slots that may be shared that has this type and room on these devices, or a
    new one.
    """
    for j in shareable:
        other, weights = rows[j]
        if (other.shape, other.dtype) == (aval.shape, aval.dtype) and all(
            weights[d] is None for d in users
        ):
            return j
    rows.append((aval, [None] * num_devices))
    return len(rows) - 1
