"""When two runs of operations are the same computation, up to weights and literals.

Equal layers are measured once and, where all stages have them, stand once in the compiled loop. A
wrong "equal" would be a silent difference, so everything that can change a value or a gradient is
part of the comparison: primitives and their parameters, nested jaxprs with their constants, the
derivative rules of `custom_jvp` and `custom_vjp` (compared by what they trace to: two rules may
hide behind one primal), checkpoints, wiring, shapes and dtypes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layerwise_jax import _jax
from layerwise_jax._jax import Jaxpr, JaxprEqn, Literal, is_key
from layerwise_jax.trace.primitives import CUSTOM_RULES
from layerwise_jax.trace.program import Op, Program, Value


@dataclass(frozen=True)
class CanonicalOps:
    """A run of operations in a form that equal runs share.

    Attributes:
      key: equal for runs that compute the same function of weights, reads and literals.
      weights: the weights that the run reads, in order of first use.
      reads: the other values that it reads from outside, constants included, likewise.
      made: the values that it makes, in order.
      literals: the literals among its operands, in order.
    """

    key: Hashable
    weights: tuple[Value, ...]
    reads: tuple[Value, ...]
    made: tuple[Value, ...]
    literals: tuple[Any, ...]


def canonicalize(
    program: Program, ops: Sequence[Op], fingerprints: dict[int, Hashable]
) -> CanonicalOps:
    """The shape of a run of operations.

    Args:
      program: the program that the operations belong to.
      ops: the run.
      fingerprints: a memory of equations' fingerprints, by identity, shared between calls.
    """
    numbers: dict[Value, tuple] = {}
    weights: list[Value] = []
    reads: list[Value] = []
    made: list[Value] = []
    literals: list[Any] = []
    checkpoints: dict[int, int] = {}

    def name(operand: Any) -> Hashable:
        if isinstance(operand, Literal):
            literals.append(operand.val)
            return "literal", str(operand.aval)
        if operand not in numbers:
            kind, seen = ("weight", weights) if operand in program.weights else ("read", reads)
            numbers[operand] = (kind, len(seen), str(program.avals[operand]))
            seen.append(operand)
        return numbers[operand]

    rows: list[Hashable] = []
    for op in ops:
        if id(op.eqn) not in fingerprints:
            fingerprints[id(op.eqn)] = _fingerprint_eqn(op.eqn)
        marks = tuple(
            (checkpoints.setdefault(id(r), len(checkpoints)), _fingerprint(r.policy))
            for r in op.remats
        )
        drawn = op.full_rows and (op.full_rows.axis, str(op.full_rows.eqn.outvars[0].aval))
        rows.append((fingerprints[id(op.eqn)], tuple(name(x) for x in op.operands), marks, drawn))
        for value in op.results:
            numbers[value] = ("made", len(made), str(program.avals[value]))
            made.append(value)
    return CanonicalOps(tuple(rows), tuple(weights), tuple(reads), tuple(made), tuple(literals))


def _fingerprint_eqn(eqn: JaxprEqn) -> Hashable:
    outs = tuple(str(var.aval) for var in eqn.outvars)
    if eqn.primitive.name in CUSTOM_RULES:
        return eqn.primitive.name, outs, _fingerprint_rule(eqn)
    params = tuple((name, _fingerprint(eqn.params[name])) for name in sorted(eqn.params))
    return eqn.primitive.name, outs, params, _jax.is_partitionable(eqn)


def _fingerprint_rule(eqn: JaxprEqn) -> Hashable:
    """What a custom derivative does: its primal, and the trace of its forward and backward pass."""
    avals = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in _jax.avals_of(eqn.invars)]
    inexact = [jnp.issubdtype(aval.dtype, jnp.inexact) for aval in avals]

    def both_ways(*args: Any) -> Any:
        def run(*floats: Any) -> list:
            rest = iter(floats)
            return _jax.bind(
                eqn,
                [next(rest) if moves else arg for moves, arg in zip(inexact, args, strict=True)],
            )

        out, pull_back = jax.vjp(
            run, *(arg for moves, arg in zip(inexact, args, strict=True) if moves)
        )
        return out, pull_back(jax.tree.map(_cotangent, out))

    try:
        traced = jax.make_jaxpr(both_ways)(*avals)
    except Exception:  # a rule that cannot be traced alone is equal to nothing but itself
        return id(eqn)
    return tuple(
        (str(jaxpr), tuple(_fingerprint_array(const) for const in jaxpr.consts))
        for jaxpr in (_jax.inner_jaxpr(eqn), traced)
    )


def _cotangent(x: Any) -> Any:
    return (
        jnp.ones_like(x)
        if jnp.issubdtype(x.dtype, jnp.inexact)
        else np.zeros(x.shape, jax.dtypes.float0)
    )


def _fingerprint(value: Any) -> Hashable:
    """A hashable stand-in for an equation's parameter; objects that cannot be hashed are equal to
    themselves alone.
    """
    if hasattr(value, "eqns"):
        return _fingerprint_jaxpr(value)
    if isinstance(value, (tuple, list)):
        return tuple(_fingerprint(item) for item in value)
    if isinstance(value, dict):
        return tuple((str(key), _fingerprint(value[key])) for key in sorted(value, key=str))
    if isinstance(value, (np.ndarray, jax.Array)):
        return _fingerprint_array(value)
    if value is None or isinstance(value, (str, bytes, int, float, complex, bool, np.dtype, type)):
        return type(value).__name__, value
    try:
        hash(value)
    except TypeError:
        return type(value).__name__, id(value)
    return value


def _fingerprint_jaxpr(jaxpr: Jaxpr) -> Hashable:
    nested = tuple(_fingerprint_rule(eqn) for eqn in _rules_within(jaxpr))
    return str(jaxpr), tuple(_fingerprint_array(const) for const in jaxpr.consts), nested


def _rules_within(jaxpr: Jaxpr) -> list[JaxprEqn]:
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in CUSTOM_RULES:
            found.append(eqn)
        else:
            found.extend(rule for inner in _jax.inner_jaxprs(eqn) for rule in _rules_within(inner))
    return found


def _fingerprint_array(array: Any) -> Hashable:
    if is_key(array):
        array = jax.random.key_data(array)
    data = np.ascontiguousarray(np.asarray(array))
    return data.shape, str(data.dtype), hashlib.sha256(data.tobytes()).hexdigest()
