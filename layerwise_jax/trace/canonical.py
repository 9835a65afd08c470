"""Canonical form of a run of operations: equal for runs that compute the same function.

Equal layers are compiled and measured once, and stages with equal bodies share one loop body. A
false match would change results silently. The form therefore covers everything that affects a value
or a gradient: primitives, parameters, nested jaxprs and their constants, `jax.checkpoint` marks,
wiring, shapes and dtypes. Derivative rules of `custom_jvp` and `custom_vjp` are compared by the
jaxprs of their forward and backward passes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from layerwise_jax import _jax
from layerwise_jax._jax import Jaxpr, JaxprEqn, Literal, is_key
from layerwise_jax.trace.derivative import is_inexact, ones_cotangent, type_of, vjp_wrt
from layerwise_jax.trace.primitives import CUSTOM_RULES
from layerwise_jax.trace.program import Op, Program, Value


@dataclass(frozen=True)
class CanonicalOps:
    """Canonical form of a run of operations, up to the numbering of its values.

    Attributes:
      key: equal for runs that compute the same function of weights, reads and literals.
      weights: weights that the run reads, in order of first use.
      reads: other values from outside, constants included, in order of first use.
      made: values that the run computes, in order.
      literals: literal operands, in order.
    """

    key: Hashable
    weights: tuple[Value, ...]
    reads: tuple[Value, ...]
    made: tuple[Value, ...]
    literals: tuple[Any, ...]


def canonicalize(
    program: Program,
    ops: Sequence[Op],
    fingerprints: dict[int, Hashable],
    weights: Collection[Value] | None = None,
) -> CanonicalOps:
    """Canonical form of a run of operations.

    Args:
      program: the program that the operations belong to.
      ops: the run.
      fingerprints: cache of equations' fingerprints by `id`, shared between calls.
      weights: values to number as weights; None for the program's weights.
    """
    is_weight = program.weights if weights is None else weights
    numbers: dict[Value, tuple] = {}  # (kind, ordinal of its kind, type)
    used: list[Value] = []
    reads: list[Value] = []
    made: list[Value] = []
    literals: list[Any] = []
    checkpoints: dict[int, int] = {}

    def name(operand: Any) -> Hashable:
        if isinstance(operand, Literal):
            literals.append(operand.val)
            return "literal", str(operand.aval)
        if operand not in numbers:
            kind, seen = ("weight", used) if operand in is_weight else ("read", reads)
            captured = operand in program.weights and program.weights[operand].is_captured
            numbers[operand] = (kind, captured, len(seen), str(program.avals[operand]))
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
    return CanonicalOps(tuple(rows), tuple(used), tuple(reads), tuple(made), tuple(literals))


def _fingerprint_eqn(eqn: JaxprEqn) -> Hashable:
    outs = tuple(str(var.aval) for var in eqn.outvars)
    if eqn.primitive.name in CUSTOM_RULES:
        return eqn.primitive.name, outs, _fingerprint_rule(eqn)
    params = tuple((name, _fingerprint(eqn.params[name])) for name in sorted(eqn.params))
    return eqn.primitive.name, outs, params, _jax.is_partitionable(eqn)


def _fingerprint_rule(eqn: JaxprEqn) -> Hashable:
    """Jaxprs of the primal and of the forward and backward pass of a custom derivative rule."""
    avals = [type_of(aval) for aval in _jax.avals_of(eqn.invars)]
    moving = [i for i, aval in enumerate(avals) if is_inexact(aval)]

    def forward_and_backward(*args: Any) -> Any:
        def run(values: dict[int, Any]) -> list[Any]:
            return _jax.bind(eqn, [values[i] for i in range(len(args))])

        results, vjp_fn = vjp_wrt(run, dict(enumerate(args)), moving)
        return results, vjp_fn(jax.tree.map(ones_cotangent, results))

    try:
        traced = jax.make_jaxpr(forward_and_backward)(*avals)
    except Exception:  # a rule that cannot be traced by itself equals only itself
        return id(eqn)
    return tuple(
        (str(jaxpr), tuple(_fingerprint_array(const) for const in jaxpr.consts))
        for jaxpr in (_jax.inner_jaxpr(eqn), traced)
    )


def _fingerprint(value: Any) -> Hashable:
    """Hashable stand-in for an equation's parameter.

    Unhashable objects are equal only to themselves.
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
