"""Two traces of one function, of a part of the batch and of the full batch, paired operation by
operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from layerwise_jax._jax import Jaxpr, Literal, source_line
from layerwise_jax.batch.lattice import described
from layerwise_jax.batch.one_example import LONGEST, equivalent_ops
from layerwise_jax.trace.flatten import flatten
from layerwise_jax.trace.program import Op, Operand, Program, Value


class BatchError(ValueError):
    """The function cannot be run on parts of the batch, or not with the same result.

    Attributes:
      finding: the reason by itself. The message adds advice for a pipeline, which other callers
        replace with their own.
    """

    def __init__(self, finding: str, advice: str = ""):
        super().__init__(f"{finding} {advice}".strip())
        self.finding = finding


@dataclass(frozen=True)
class PairedOp:
    """An operation in both traces; `micro` is None where a part needs none (to broadcast to one
    example, say).

    Attributes:
      position: of the operation in the part's program.
    """

    micro: Op | None
    full: Op
    position: int


@dataclass(frozen=True)
class ProgramPair:
    """Two programs whose operations are the same ones in the same places, but for shapes and
    numbers.
    """

    micro: Program
    full: Program
    ops: tuple[PairedOp, ...]


def pair_programs(micro: Program, full: Program) -> ProgramPair:
    """Pair a part's program with the full batch's.

    Raises:
      BatchError: they differ in more than shapes and numbers; names the first operation that
        differs.
    """
    # By value of the full program, the part's value or literal for it.
    micro_of: dict[Value, Operand] = dict(zip(full.inputs, micro.inputs, strict=True))
    weights = {weight: value for value, weight in micro.weights.items()}
    micro_of.update(
        {value: weights[weight] for value, weight in full.weights.items() if weight in weights}
    )
    micro_of.update(zip(full.constants, micro.constants, strict=False))
    ops: list[PairedOp] = []
    position = 0
    while len(ops) < len(full.ops):
        here = len(ops)
        op, rest = full.ops[here], micro.ops[position : position + LONGEST]
        # The same operation on paired operands.
        if rest and _are_same(rest[0], op, micro_of):
            ops.append(PairedOp(rest[0], op, position))
            micro_of.update(zip(op.results, rest[0].results, strict=True))
            position += 1
        # A broadcast to the batch, which a part of one example does without.
        elif _is_needless(op, micro, micro_of):
            ops.append(PairedOp(None, op, position))
            micro_of[op.results[0]] = micro_of[op.values[0]]
        # Another op sequence that JAX emits for one example.
        elif found := equivalent_ops(
            rest, full.ops[here : here + LONGEST], lambda x: _twin(x, micro_of)
        ):
            ops.extend(map(PairedOp, found.ops, full.ops[here:], [position] * found.length))
            micro_of[ops[-1].full.results[0]] = found.result
            position += found.length
        else:
            raise _difference(op, rest[0] if rest else None, ops)
    if position < len(micro.ops):  # the part does more
        raise _difference(None, micro.ops[position], ops)
    if not all(
        _is_same_operand(m, f, micro_of) for m, f in zip(micro.outputs, full.outputs, strict=True)
    ):
        raise BatchError(
            "The function returns other values for a part of the batch than for the full batch."
        )
    return ProgramPair(micro, full, tuple(ops))


def pair_bodies(micro: Jaxpr, full: Jaxpr) -> ProgramPair:
    """Pair the bodies of a loop, branch or custom derivative."""
    return pair_programs(flatten(micro, 0), flatten(full, 0))


def _twin(operand: Operand, micro_of: dict[Value, Operand]) -> Operand | None:
    return operand if isinstance(operand, Literal) else micro_of.get(operand)


def _are_same(micro: Op, full: Op, micro_of: dict[Value, Operand]) -> bool:
    same_kind = micro.name == full.name and len(micro.results) == len(full.results)
    return (
        same_kind
        and _ranks(micro) == _ranks(full)
        and len(micro.operands) == len(full.operands)
        and all(
            _is_same_operand(m, f, micro_of)
            for m, f in zip(micro.operands, full.operands, strict=True)
        )
    )


def _ranks(op: Op) -> list[int]:
    return [len(shape) for shape in _shapes(op.eqn.outvars)]


def _shapes(variables: Sequence[Any]) -> list[tuple[int, ...]]:
    return [getattr(var.aval, "shape", ()) for var in variables]


def _is_same_operand(micro: Operand, full: Operand, micro_of: dict[Value, Operand]) -> bool:
    if isinstance(micro, Literal) or isinstance(full, Literal):
        # Literals may differ (1 / batch_size); the interpreter compares their numbers.
        return isinstance(micro, Literal) and isinstance(full, Literal)
    return micro_of.get(full) == micro


def _is_needless(op: Op, micro: Program, micro_of: dict[Value, Operand]) -> bool:
    """True if an operation of the full batch's trace only repeats a value for its examples, of
    which a part has one.
    """
    if (
        op.name != "broadcast_in_dim"
        or len(op.values) != 1
        or not isinstance(micro_of.get(op.values[0]), int)
    ):
        return False
    (before,), (after,) = [_shapes(eqn_vars) for eqn_vars in (op.eqn.invars, op.eqn.outvars)]
    return len(before) == len(after) and micro.avals[micro_of[op.values[0]]].shape == before  # type: ignore[index]


def _difference(full: Op | None, micro: Op | None, before: Sequence[PairedOp]) -> BatchError:
    after = next(filter(None, (source_line(op.full.eqn) for op in reversed(before))), "")
    given = described(full.eqn, after) if full else "nothing more"
    there = described(micro.eqn, after) if micro else "nothing more"
    return BatchError(
        "The function does other operations for a part of the batch than for the full batch: "
        f"first {given}, where a "
        f"part has {there}. Its structure must not depend on the length of the batch; write it for "
        "any length, or use larger parts (JAX writes some operations in another way for one "
        "example)."
    )


# Parameters that are lengths; the shapes of the results are compared instead.
LENGTHS = frozenset(
    (
        "shape new_sizes sizes slice_sizes start_indices limit_indices length sharding out_sharding"
    ).split()
)


# Parameters that follow the length of the batch where examples are side by side; the rules of these
# primitives check them.
SCALING = {
    "tile": {"reps"},
    "conv_general_dilated": {"feature_group_count", "batch_group_count"},
}


def differing_parameter(micro: Any, full: Any) -> str | None:
    """Name and values of the first parameter, lengths and functions left out, that differs between
    the two traces of an equation.
    """
    ignored = LENGTHS | SCALING.get(micro.primitive.name, set())
    for name, value in micro.params.items():
        if name not in ignored and _is_plain(value) and repr(value) != repr(full.params.get(name)):
            return f"{name} = {value} for a part and {full.params.get(name)} for the full batch"
    return None


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(x) for x in value)
    return value is None or isinstance(value, (bool, int, float, str, Enum, np.generic, np.dtype))


def constants_of(pair: ProgramPair) -> Sequence[tuple[Value, Any, Any]]:
    """(value in the full trace, array in the part's, array in the full one) of what the function
    closed over.

    Raises:
      BatchError: one trace has more of them.
    """
    micro, full = list(pair.micro.constants.items()), list(pair.full.constants.items())
    if len(micro) != len(full):
        raise BatchError(
            f"The function closes over {len(micro)} arrays for a part of the batch and "
            f"{len(full)} for the full batch."
        )
    return [(value, part, whole) for (_, part), (value, whole) in zip(micro, full, strict=True)]
