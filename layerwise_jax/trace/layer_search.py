"""Find the layers of a program.

No annotation is needed. The operations that meet both parameters and data are walked in the order
of the trace; each belongs to the module whose parameters it reads, and between the last use of one
module's parameters and the first use of the next's the program is cut where the fewest bytes are
alive. Operations that meet no data, or no parameters (masks, casts, keys), have no place of their
own: they go with whatever uses them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from layerwise_jax.trace.flatten import FROM_WEIGHTS, source_flags
from layerwise_jax.trace.modules import Module
from layerwise_jax.trace.pinned import live_bytes, pinned_ops
from layerwise_jax.trace.primitives import LAYER_STARTS
from layerwise_jax.trace.program import Program, Value, Weight

WeightsOf = Mapping[Value, frozenset[Weight]]


@dataclass(frozen=True)
class Layer:
    """A run of anchored operations: `program.ops[i]` for i in `anchors`."""

    name: str
    anchors: tuple[int, ...]


def find_layers(program: Program, modules: Sequence[Module | None]) -> tuple[Layer, ...]:
    """The layers of a program, given the module of every parameter leaf; None for state, which
    belongs to its user.
    """
    anchors, weights_of = pinned_ops(program), _weights_behind(program)
    runs = _runs_of_modules(program, anchors, modules, weights_of)
    if not runs:
        return ()
    widths, parted = (
        live_bytes(program, anchors),
        _positions_that_part_state(program, anchors, modules, weights_of),
    )
    starts = [0]
    for (_, _, last), (_, first, _) in pairwise(runs):
        candidates = range(last + 1, first + 1)
        starts.append(
            min(candidates, key=lambda position: (position in parted, widths[position], -position))
        )
    stops = [*starts[1:], len(anchors)]
    names = _unique([name for name, _, _ in runs])
    return tuple(
        Layer(name, tuple(anchors[start:stop]))
        for name, start, stop in zip(names, starts, stops, strict=True)
    )


def _positions_that_part_state(
    program: Program,
    anchors: Sequence[int],
    modules: Sequence[Module | None],
    weights_of: WeightsOf,
) -> set[int]:
    """The positions at which a cut would leave uses of one leaf of state on both sides."""
    uses: dict[Weight, list[int]] = {}
    for position, i in enumerate(anchors):
        for weight in set().union(*(weights_of.get(x, frozenset()) for x in program.ops[i].values)):
            if modules[weight.leaf] is None:
                uses.setdefault(weight, []).append(position)
    return {position for used in uses.values() for position in range(used[0] + 1, used[-1] + 1)}


def _runs_of_modules(
    program: Program,
    anchors: Sequence[int],
    modules: Sequence[Module | None],
    weights_of: WeightsOf,
) -> list[tuple[str, int, int]]:
    """(module, first, last): maximal runs of anchored positions that read one module's
    parameters.
    """
    with_state = _contractions_with_state(program, weights_of, modules)
    runs: list[tuple[str, int, int]] = []
    contracted: set[Weight] = set()
    for position, i in enumerate(anchors):
        op = program.ops[i]
        behind = set().union(*(weights_of.get(x, frozenset()) for x in op.values))
        weights = {weight for weight in behind if modules[weight.leaf] is not None}
        if not weights:
            continue
        contracts = op.name in LAYER_STARTS or not with_state.isdisjoint(op.values)
        weight = min(weights, key=lambda w: (w.leaf, w.start or 0))
        module = modules[weight.leaf]
        assert module is not None
        name = module.name if weight.start is None else f"{module.name}[{weight.start}]"
        again = contracts and bool(weights & contracted)
        joins = module.is_bare and not contracts
        if runs and (joins or (runs[-1][0] == name and not again)):
            runs[-1] = (runs[-1][0], runs[-1][1], position)
        else:
            runs.append((name, position, position))
            contracted = set()
        contracted |= weights if contracts else set()
    return runs


def _contractions_with_state(
    program: Program, weights_of: WeightsOf, modules: Sequence[Module | None]
) -> set[Value]:
    """What comes from contractions of weights with state, which meet no data: a recurrent layer may
    begin with one.
    """
    found: set[Value] = set()
    for op in program.ops:
        if op.results and op.results[0] in weights_of:
            contracts = op.name in LAYER_STARTS and any(
                modules[w.leaf] is None for w in weights_of[op.results[0]]
            )
            found.update(op.results if contracts or not found.isdisjoint(op.values) else ())
    return found


def _weights_behind(program: Program) -> WeightsOf:
    """For every value that comes from weights alone: which."""
    flags = source_flags(program)
    behind = {value: frozenset([weight]) for value, weight in program.weights.items()}
    for op in program.ops:
        if op.results and flags[op.results[0]] == FROM_WEIGHTS:
            union = frozenset().union(*(behind.get(x, frozenset()) for x in op.values))
            behind.update(dict.fromkeys(op.results, union))
    return behind


def _unique(names: Sequence[str]) -> list[str]:
    """Names told apart where a module is used more than once."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name} (use {seen[name]})")
    return result
