"""Cut of a layer sequence into stages, each a program with explicit inputs and outputs.

Holds afterwards, and is checked: every pinned op is in exactly one stage; whatever a stage reads is
one of its weights, an input, a constant, or a value received over the boundary before it; every
output is made by one stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from layerwise_jax._jax import AbstractRef, Literal, source_line
from layerwise_jax.trace.layers import LayerSequence
from layerwise_jax.trace.pinned import free_ops_behind, free_producers, pinned_ops
from layerwise_jax.trace.program import BatchSlice, Op, Operand, Program, Value, Weight, evaluate


class CutError(ValueError):
    """Refusal of a program that cannot be cut there into programs with the same meaning."""


@dataclass(frozen=True, eq=False)
class Stage:
    """A contiguous group of layers as a program.

    Attributes:
      layers: the names of its layers.
      ops: its operations, in the order of the trace.
      weights: the weights it reads, by value.
      inputs: the input values it reads.
      receives: the values that cross the boundary before it (some only to be passed on).
      sends: the values that cross the boundary after it.
      outputs: the outputs of the program that it makes: position -> value or literal.
    """

    layers: tuple[str, ...]
    ops: tuple[Op, ...]
    weights: Mapping[Value, Weight]
    inputs: tuple[Value, ...]
    receives: tuple[Value, ...]
    sends: tuple[Value, ...]
    outputs: Mapping[int, Operand]

    @property
    def made(self) -> set[Value]:
        return {x for op in self.ops for x in op.results}


def run_stage(
    program: Program, stage: Stage, env: Mapping[Value, Any], rows: BatchSlice | None = None
) -> list[Any]:
    """Evaluate one stage: the values it sends, then its outputs.

    Args:
      program: the whole program, for its constants.
      stage: the stage.
      env: weights, inputs and received values, by value.
      rows: the slice of the full batch that this microbatch is.
    """
    wanted = [*stage.sends, *stage.outputs.values()]
    return evaluate(stage.ops, {**program.constants, **env}, wanted, rows)


def cut_stages(layers: LayerSequence, boundaries: Sequence[int]) -> tuple[Stage, ...]:
    """Cut at `boundaries` (0, ..., number of layers): one stage between each two.

    Raises:
      ValueError: the boundaries do not split the layers into stages of one layer or more.
      CutError: a mutable reference would be alive across a boundary.
    """
    _check_boundaries(boundaries, len(layers))
    program = layers.program
    # positions of pinned ops, by stage
    pinned = [
        [i for layer in layers.layers[a:b] for i in layer.pinned] for a, b in pairwise(boundaries)
    ]
    free = free_producers(program, pinned_ops(program))
    outputs = _outputs_of_stages(program, pinned, free)
    ops = [
        _with_free_ops(program, own, made, free) for own, made in zip(pinned, outputs, strict=True)
    ]
    crossing = _crossing(program, pinned, ops)  # [boundaries 0..k], empty at both ends
    stages = tuple(
        _stage(program, layers.names[a:b], ops[s], crossing[s], crossing[s + 1], outputs[s])
        for s, (a, b) in enumerate(pairwise(boundaries))
    )
    check_cut(program, stages, pinned)
    return stages


def _check_boundaries(boundaries: Sequence[int], num_layers: int) -> None:
    has_ends = len(boundaries) > 1 and (boundaries[0], boundaries[-1]) == (0, num_layers)
    if not has_ends or any(start >= stop for start, stop in pairwise(boundaries)):
        raise ValueError(
            f"boundaries must rise from 0 to {num_layers}, the number of layers, got "
            f"{tuple(boundaries)}. Give {num_layers} layers to {len(boundaries) - 1} stages of one "
            "layer or more each."
        )


def _with_free_ops(
    program: Program, own: Sequence[int], outputs: Mapping[int, Operand], free: dict[Value, int]
) -> list[int]:
    """Positions of a stage's ops: its pinned ops, and the free ops that they or `outputs` read."""
    reads = [x for i in own for x in program.ops[i].values]
    return sorted({*own, *free_ops_behind(program, [*reads, *outputs.values()], free)})


def _outputs_of_stages(
    program: Program, pinned: Sequence[Sequence[int]], free: dict[Value, int]
) -> list[dict[int, Operand]]:
    """The outputs of every stage: position -> operand.

    An output of pinned ops belongs to the stage that makes it. Any other output belongs to the
    first stage that reads a weight behind it, or to the last stage if there is none.
    """
    # value -> the stage whose pinned ops make it; free ops are in any stage that needs them
    maker = {x: s for s, own in enumerate(pinned) for i in own for x in program.ops[i].results}
    first_reader: dict[Value, int] = {}
    for s, own in enumerate(pinned):
        for x in _weights_behind(program, [x for i in own for x in program.ops[i].values], free):
            first_reader.setdefault(x, s)
    last = len(pinned) - 1
    outputs: list[dict[int, Operand]] = [{} for _ in pinned]
    for position, operand in enumerate(program.outputs):
        if isinstance(operand, Literal) or operand not in maker:
            behind = _weights_behind(program, [operand], free)
            readers = [first_reader[x] for x in behind if x in first_reader]
            # such as a weight decay: with the first of its weights, so that nothing has to cross
            outputs[min(readers, default=last)][position] = operand
        else:
            outputs[maker[operand]][position] = operand
    return outputs


def _weights_behind(
    program: Program, operands: Sequence[Operand], free: dict[Value, int]
) -> set[Value]:
    """The weights among `operands`, and those that free ops make them from."""
    behind = [x for i in free_ops_behind(program, operands, free) for x in program.ops[i].values]
    return {x for x in (*operands, *behind) if not isinstance(x, Literal) and x in program.weights}


def _crossing(program: Program, pinned: Any, ops: Any) -> list[tuple[Value, ...]]:
    """The values that cross each of the boundaries 0..k.

    A value crosses every boundary between the stage that makes it and the last one that reads it.
    """
    made = {x: s for s, own in enumerate(pinned) for i in own for x in program.ops[i].results}
    last_reader = dict(made)
    for s, own in enumerate(ops):
        for x in (x for i in own for x in program.ops[i].values):
            if x in made:
                last_reader[x] = max(last_reader[x], s)  # a skip: read stages later
    return [tuple(x for x in made if made[x] < b <= last_reader[x]) for b in range(len(pinned) + 1)]


def _stage(
    program: Program,
    names: Sequence[str],
    positions: Sequence[int],
    receives: tuple[Value, ...],
    sends: tuple[Value, ...],
    outputs: Mapping[int, Operand],
) -> Stage:
    ops = tuple(program.ops[i] for i in positions)
    # A dict as an ordered set: weights keep the order in which they are first read.
    read = dict.fromkeys(x for op in ops for x in op.values)
    read.update(dict.fromkeys(x for x in outputs.values() if not isinstance(x, Literal)))
    return Stage(
        layers=tuple(names),
        ops=ops,
        weights={x: program.weights[x] for x in read if x in program.weights},
        inputs=tuple(x for x in program.inputs if x in read),
        receives=receives,
        sends=sends,
        outputs=dict(outputs),
    )


def check_cut(program: Program, stages: Sequence[Stage], pinned: Sequence[Sequence[int]]) -> None:
    """Check the stages against the whole program: the conditions at the top of this module.

    Raises:
      CutError: a mutable reference crosses a boundary.
    """
    for s, stage in enumerate(stages):
        for x in stage.sends:
            if isinstance(program.avals[x], AbstractRef):
                maker = next(op for op in program.ops if x in op.results)
                raise CutError(
                    f"A mutable reference made at {source_line(maker.eqn)} is alive after stage "
                    f"{s} ({stage.layers[-1]}); references cannot leave their device. Keep its "
                    "uses within one layer."
                )
        # Replay the stage on names only: each op may read only what is there by then.
        known = {*stage.weights, *stage.inputs, *stage.receives, *program.constants}
        for op in stage.ops:
            assert known.issuperset(op.values), f"stage {s} reads a value it lacks: {op.eqn}"
            known.update(op.results)
        wanted = [x for x in (*stage.sends, *stage.outputs.values()) if not isinstance(x, Literal)]
        assert known.issuperset(wanted), f"stage {s} does not make every value it sends"
    flat = [i for own in pinned for i in own]  # positions of pinned ops, all stages
    assert len(flat) == len(set(flat)), "an operation is in two stages"
    assert sorted(p for stage in stages for p in stage.outputs) == list(range(len(program.outputs)))
