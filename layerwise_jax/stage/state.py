"""State of a staged function: leaves of the parameters that a call gives new values.

Two kinds, which the batch analysis tells apart:

    renewed   does not depend on the examples (a count, a random key, a schedule's step): every
              microbatch reads the old value, and a call replaces it once
    carried   depends on the examples (batch statistics): microbatches update it in their order,
              each reading the value that the one before it left
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax

from layerwise_jax._jax import source_line
from layerwise_jax.stage.cut import CutError, Stage
from layerwise_jax.trace.layers import LayerSequence, Signature
from layerwise_jax.trace.program import Program, Weight

StatePick = Callable[[Any], Any] | Literal["mutated"] | None


@dataclass(frozen=True)
class State:
    """New state by the position of the output that has it.

    Attributes:
      carried: the weight that the output replaces after every microbatch.
      renewed: the leaf that the output replaces once a call.
    """

    carried: Mapping[int, Weight] = field(default_factory=dict)
    renewed: Mapping[int, int] = field(default_factory=dict)

    def renewed_weights(self, program: Program) -> frozenset[Weight]:
        """The weights of the renewed leaves: each leaf whole, or its slices."""
        leaves = set(self.renewed.values())
        return frozenset(w for w in program.weights.values() if w.leaf in leaves)


def find_state(layers: LayerSequence, pick: StatePick) -> dict[int, int]:
    """The outputs that are new values of parameters: output position -> leaf.

    Args:
      layers: the traced function.
      pick: takes a tree of the function's outputs from it, whose paths are paths of the parameters;
        "mutated" for the Variables that the function mutates.

    Raises:
      ValueError: a picked output is not a parameter or differs from it in type; or the function
        mutates a Variable that is not picked, whose new value would be lost.
    """
    signature = layers.signature
    num_outputs = signature.outputs_tree.num_leaves
    mutated = {num_outputs + i: leaf for i, leaf in enumerate(signature.mutated)}
    if pick == "mutated":
        if not mutated:
            raise ValueError(
                "state='mutated' needs a function that mutates Variables of its parameters, got "
                "one that mutates none. Leave state= out."
            )
        found = mutated
    else:
        picked = {} if pick is None else _picked(signature, pick)
        _check_mutated(layers, mutated, picked)
        found = {**picked, **mutated}
    for position, leaf in found.items():
        expected, given = signature.params_avals[leaf], signature.outputs_avals[position]
        if (expected.shape, expected.dtype) != (given.shape, given.dtype):
            raise ValueError(
                f"The new state {signature.params_names[leaf]} must be "
                f"{expected.dtype}{list(expected.shape)}, as the parameter is, got "
                f"{given.dtype}{list(given.shape)}. Return it in the parameter's shape and dtype."
            )
    return found


def _picked(signature: Signature, pick: Callable[[Any], Any]) -> dict[int, int]:
    """The outputs that `pick` takes: position -> leaf."""
    # `pick` runs on output positions in place of arrays.
    positions = signature.outputs(range(signature.outputs_tree.num_leaves))
    picked = jax.tree_util.tree_flatten_with_path(pick(positions))[0]
    leaves = {name: leaf for leaf, name in enumerate(signature.params_names)}
    found: dict[int, int] = {}
    for path, position in picked:
        name = jax.tree_util.keystr(path)
        if name not in leaves:
            given = f"an output at {name}" if path else "a bare output without a path"
            raise ValueError(
                "state= must pick outputs under the paths of the parameters that they replace, got "
                f"{given}. Return new values in a tree with the parameters' own paths, such as "
                f"{signature.params_names[0]}."
            )
        found[position] = leaves[name]
    return found


def _check_mutated(
    layers: LayerSequence, mutated: Mapping[int, int], picked: Mapping[int, int]
) -> None:
    """Refuse new values of Variables that nothing takes out of the function."""
    names, outputs = layers.signature.params_names, layers.program.outputs
    taken = {leaf: position for position, leaf in picked.items()}
    lost = [names[leaf] for leaf in mutated.values() if leaf not in taken]
    if lost:
        raise ValueError(
            f"fn mutates {', '.join(lost)} of its parameters, and the new "
            f"{'values' if len(lost) > 1 else 'value'} would be lost. Pass state='mutated': a call "
            "then returns (value, placed parameters with the new state), as nnx.jit updates the "
            "module. Or make fn mutate nothing (evaluation mode)."
        )
    for position, leaf in mutated.items():
        if outputs[position] is not outputs[taken[leaf]] and (
            outputs[position] != outputs[taken[leaf]]
        ):
            raise ValueError(
                f"state= must pick the value that fn leaves in {names[leaf]}, got another output. "
                "Pick the mutated value itself, or pass state='mutated'."
            )


def split_state(
    layers: LayerSequence, found: Mapping[int, int], kinds: Sequence[str], replicas: int
) -> State:
    """Separate carried state (depends on examples) from renewed state (does not).

    Args:
      layers: the traced function.
      found: output position -> leaf, from `find_state`.
      kinds: how every output combines over parts of the batch: "whole" for what no example touches.
      replicas: replicas of the pipeline.

    Raises:
      ValueError: replicas would each carry their own state; or carried state is stacked over the
        layers of a scan.
    """
    renewed = {p: leaf for p, leaf in found.items() if kinds[p] == "whole"}
    names = layers.signature.params_names
    whole = {w.leaf: w for w in layers.program.weights.values() if w.start is None}
    carried: dict[int, Weight] = {}
    for position, leaf in found.items():
        if position in renewed:
            continue
        if replicas > 1:
            raise ValueError(
                f"The state {names[leaf]} depends on the examples and must be updated by one "
                f"replica, got {replicas} on the axis 'data'. Use a mesh without that axis."
            )
        if leaf not in whole:
            raise ValueError(
                f"The state {names[leaf]} is stacked over the layers of a scan, which live on "
                "several stages. Unroll the layers, or keep that state out of the scan."
            )
        carried[position] = whole[leaf]
    return State(carried, renewed)


def check_draws(program: Program, carried: Mapping[int, Weight]) -> None:
    """Refuse random draws with a key that every microbatch changes.

    Draws are made for the full batch, and each microbatch slices out its rows; so all microbatches
    must draw with one key.

    Raises:
      CutError: naming the draw.
    """
    changing = set(carried.values())
    # values that depend on carried state, found in the order of the trace
    from_state = {value for value, weight in program.weights.items() if weight in changing}
    for op in program.ops:
        if from_state.isdisjoint(op.values):
            continue
        from_state.update(op.results)
        if op.full_rows is not None:
            raise CutError(
                f"{op.name} at {source_line(op.eqn)} draws numbers for every example from state "
                "that each microbatch changes; no unstaged batch draws those numbers. Leave that "
                "state out of state=, or use one microbatch."
            )


def check_carried(carried: Mapping[int, Weight], stages: Sequence[Stage]) -> None:
    """Refuse carried state that is not read and updated on one and the same stage.

    Raises:
      CutError: naming the stages.
    """
    for position, weight in carried.items():
        readers = [s for s, stage in enumerate(stages) if weight in stage.weights.values()]
        (maker,) = [s for s, stage in enumerate(stages) if position in stage.outputs]
        if readers and readers != [maker]:
            raise CutError(
                f"The state of leaf {weight.leaf} is read on stages {readers} and updated on "
                f"stage {maker}; it can only live on one. Choose boundaries that keep its layer "
                "together."
            )
