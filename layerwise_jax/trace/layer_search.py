"""Layer search: splits the pinned operations of a program into layers.

No annotation is needed. Pinned operations are visited in trace order. Each belongs to the module
whose parameters it reads. Between the last use of one module's parameters and the first use of the
next module's, the program is cut where the fewest bytes are alive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from layerwise_jax.trace.modules import Module
from layerwise_jax.trace.pinned import live_bytes, pinned_ops
from layerwise_jax.trace.primitives import LAYER_STARTS
from layerwise_jax.trace.program import FROM_WEIGHTS, Program, Value, Weight, source_flags

WeightsOf = Mapping[Value, frozenset[Weight]]


@dataclass(frozen=True)
class Layer:
    """Layer: its name and its run of pinned operations, `program.ops[i]` for i in `pinned`."""

    name: str
    pinned: tuple[int, ...]


def find_layers(program: Program, modules: Sequence[Module | None]) -> tuple[Layer, ...]:
    """Layers of a program.

    Args:
      program: the program.
      modules: the module of every parameter leaf; None for state, which belongs to the layer that
        reads it.
    """
    pinned = pinned_ops(program)
    weights_of = _weights_behind(program)
    runs = _runs_of_modules(program, pinned, modules, weights_of)
    if not runs:
        return ()
    widths = live_bytes(program, pinned)  # [len(pinned) + 1]
    parted = _positions_that_part_state(program, pinned, modules, weights_of)
    starts = [0]
    for (_, _, last), (_, first, _) in pairwise(runs):
        candidates = range(last + 1, first + 1)
        starts.append(
            min(candidates, key=lambda position: (position in parted, widths[position], -position))
        )
    stops = [*starts[1:], len(pinned)]
    names = _unique([name for name, _, _ in runs])
    return tuple(
        Layer(name, tuple(pinned[start:stop]))
        for name, start, stop in zip(names, starts, stops, strict=True)
    )


def _positions_that_part_state(
    program: Program,
    pinned: Sequence[int],
    modules: Sequence[Module | None],
    weights_of: WeightsOf,
) -> set[int]:
    """Boundaries at which a cut would separate two uses of one leaf of state."""
    uses: dict[Weight, list[int]] = {}
    for position, i in enumerate(pinned):
        for weight in set().union(*(weights_of.get(x, frozenset()) for x in program.ops[i].values)):
            if modules[weight.leaf] is None:
                uses.setdefault(weight, []).append(position)
    return {position for used in uses.values() for position in range(used[0] + 1, used[-1] + 1)}


def _runs_of_modules(
    program: Program,
    pinned: Sequence[int],
    modules: Sequence[Module | None],
    weights_of: WeightsOf,
) -> list[tuple[str, int, int]]:
    """Runs of pinned positions that read one module's parameters, as (name, first, last).

    A module that is used again after a contraction with the same weights starts another run.
    """
    with_state = _contractions_with_state(program, weights_of, modules)
    runs: list[tuple[str, int, int]] = []
    contracted: set[Weight] = set()
    for position, i in enumerate(pinned):
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
    """Values computed by contractions of weights with state, without inputs.

    A recurrent layer may begin with such a contraction, which is then its first use.
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
    """Weights that every value depends on, for values that depend on weights only."""
    flags = source_flags(program)
    own = {x: weight for x, weight in program.weights.items() if not weight.is_captured}
    behind = {x: frozenset([weight]) for x, weight in own.items()}
    for op in program.ops:
        if op.results and flags[op.results[0]] == FROM_WEIGHTS:
            union = frozenset().union(*(behind.get(x, frozenset()) for x in op.values))
            behind.update(dict.fromkeys(op.results, union))
    return behind


def _unique(names: Sequence[str]) -> list[str]:
    """Names with `(use n)` appended where a module is used more than once."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name} (use {seen[name]})")
    return result
