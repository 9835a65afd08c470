"""Cut a sequence of layers into stages, each a program with explicit inputs and outputs.

Holds afterwards, and is checked: every anchored operation is in exactly one stage; whatever a stage
reads is a weight of its own, an input, a constant, or has arrived over the boundary before it;
every output is made by one stage.
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
    """The program cannot be cut there, or not into programs that keep its meaning."""


@dataclass(frozen=True, eq=False)
class Stage:
    """A contiguous group of layers as a program.

    Attributes:
      layers: the names of its layers.
      ops: its operations, in the order of the trace.
      weights: the weights it reads, by value.
      inputs: the input values it reads.
      receives: the values that cross the boundary before it (some only to be sent on).
      sends: the values that cross the boundary after it.
      outputs: which outputs of the program it makes, and as what value.
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
    """What the stage sends, then what it outputs, given its weights, inputs and received values in
    `env`.
    """
    return evaluate(
        stage.ops, {**program.constants, **env}, [*stage.sends, *stage.outputs.values()], rows
    )


def cut_stages(layers: LayerSequence, boundaries: Sequence[int]) -> tuple[Stage, ...]:
    """The stages between `boundaries` (0, ..., number of layers).

    Raises:
      ValueError: the boundaries do not split the layers into stages of one layer or more.
      CutError: a mutable reference would be alive across a boundary.
    """
    _check_boundaries(boundaries, len(layers))
    program = layers.program
    anchors = [
        [i for layer in layers.layers[a:b] for i in layer.anchors] for a, b in pairwise(boundaries)
    ]
    free = free_producers(program, pinned_ops(program))
    outputs = _outputs_of_stages(program, anchors, free)
    ops = [
        sorted(
            {
                *own,
                *free_ops_behind(
                    program, [x for i in own for x in program.ops[i].values] + [*out.values()], free
                ),
            }
        )
        for own, out in zip(anchors, outputs, strict=True)
    ]
    crossing = _crossing(program, anchors, ops)
    stages = tuple(
        _stage(program, layers.names[a:b], ops[s], crossing[s], crossing[s + 1], outputs[s])
        for s, (a, b) in enumerate(pairwise(boundaries))
    )
    check_cut(program, stages, anchors)
    return stages


def _check_boundaries(boundaries: Sequence[int], num_layers: int) -> None:
    whole = len(boundaries) > 1 and (boundaries[0], boundaries[-1]) == (0, num_layers)
    if not whole or any(start >= stop for start, stop in pairwise(boundaries)):
        raise ValueError(
            f"The boundaries {tuple(boundaries)} do not split {num_layers} layers into "
            f"{len(boundaries) - 1} stages of "
            f"one layer or more. Start at 0, rise, end at {num_layers}; there can be no more "
            "stages than layers."
        )


def _outputs_of_stages(
    program: Program, anchors: Sequence[Sequence[int]], free: dict[Value, int]
) -> list[dict[int, Operand]]:
    """Each output at the stage that makes it.

    What no stage in particular makes stands with the first that reads one of the weights it comes
    from, or at the last.
    """
    maker = {x: s for s, own in enumerate(anchors) for i in own for x in program.ops[i].results}
    first_reader: dict[Value, int] = {}
    for s, own in enumerate(anchors):
        for x in _weights_behind(program, [x for i in own for x in program.ops[i].values], free):
            first_reader.setdefault(x, s)
    last = len(anchors) - 1
    outputs: list[dict[int, Operand]] = [{} for _ in anchors]
    for position, operand in enumerate(program.outputs):
        if isinstance(operand, Literal) or operand not in maker:
            readers = [
                first_reader[x]
                for x in _weights_behind(program, [operand], free)
                if x in first_reader
            ]
            outputs[min(readers, default=last)][position] = operand
        else:
            outputs[maker[operand]][position] = operand
    return outputs


def _weights_behind(
    program: Program, operands: Sequence[Operand], free: dict[Value, int]
) -> set[Value]:
    """The weights among `operands`, and those that unanchored operations make them from."""
    behind = [x for i in free_ops_behind(program, operands, free) for x in program.ops[i].values]
    return {x for x in (*operands, *behind) if not isinstance(x, Literal) and x in program.weights}


def _crossing(program: Program, anchors: Any, ops: Any) -> list[tuple[Value, ...]]:
    """The values that cross each boundary 0..k; a value used several stages on crosses every
    boundary between.
    """
    made = {x: s for s, own in enumerate(anchors) for i in own for x in program.ops[i].results}
    last = dict(made)
    for s, own in enumerate(ops):
        for x in (x for i in own for x in program.ops[i].values):
            if x in made:
                last[x] = max(last[x], s)
    return [tuple(x for x in made if made[x] < b <= last[x]) for b in range(len(anchors) + 1)]


def _stage(
    program: Program,
    names: Sequence[str],
    positions: Sequence[int],
    receives: tuple[Value, ...],
    sends: tuple[Value, ...],
    outputs: Mapping[int, Operand],
) -> Stage:
    ops = tuple(program.ops[i] for i in positions)
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


def check_cut(program: Program, stages: Sequence[Stage], anchors: Sequence[Sequence[int]]) -> None:
    """Hold the parts against the whole."""
    for s, stage in enumerate(stages):
        for x in stage.sends:
            if isinstance(program.avals[x], AbstractRef):
                maker = next(op for op in program.ops if x in op.results)
                raise CutError(
                    f"A mutable reference made at {source_line(maker.eqn)} is alive after stage "
                    f"{s} "
                    f"({stage.layers[-1]}); references cannot leave their device. Keep its uses "
                    "within one layer."
                )
        known = {*stage.weights, *stage.inputs, *stage.receives, *program.constants}
        for op in stage.ops:
            assert known.issuperset(op.values), f"stage {s} reads what it does not have: {op.eqn}"
            known.update(op.results)
        wanted = [x for x in (*stage.sends, *stage.outputs.values()) if not isinstance(x, Literal)]
        assert known.issuperset(wanted), f"stage {s} does not make what it must send"
    flat = [i for own in anchors for i in own]
    assert len(flat) == len(set(flat)), "an operation is in two stages"
    assert sorted(p for stage in stages for p in stage.outputs) == list(range(len(program.outputs)))
