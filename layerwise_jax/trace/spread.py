"""Spread values: arrays whose entries along the first axis are all equal, followed through a jaxpr.

A jaxpr is run with such arrays replaced by one entry. Entrywise operations work on entries, taking
one of the equal entries gives the entry itself, and whatever else needs the array gets it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layerwise_jax._jax import Jaxpr, JaxprEqn, Literal, avals_of, bind, inner_jaxpr
from layerwise_jax.trace.primitives import CALLS, CUSTOM_RULES, ENTRYWISE


@dataclass(frozen=True)
class Spread:
    """An array [size, ...] of equal entries.

    Attributes:
      entry: one of them, [...].
      size: length of the first axis.
    """

    entry: Any
    size: int


def whole(x: Any) -> Any:
    """The array [size, ...] of a `Spread`; other values as they are."""
    if not isinstance(x, Spread):
        return x
    return jnp.broadcast_to(x.entry, (x.size, *jnp.shape(x.entry)))


def run_spread(fn: Callable[..., Any], *args: Any) -> Any:
    """`fn(*args)`, where leaves of the arguments and of the result may be `Spread`.

    The function is traced on whole arrays; what it computes does not change.
    """
    leaves, tree = jax.tree.flatten(args)
    traced = jax.make_jaxpr(fn, return_shape=True)
    jaxpr, outputs = traced(*tree.unflatten([_type(x) for x in leaves]))
    return jax.tree.unflatten(jax.tree.structure(outputs), _run(jaxpr, leaves))


def _type(x: Any) -> jax.ShapeDtypeStruct:
    """The type of a value; of the whole array for a `Spread`."""
    aval = jax.typeof(x.entry if isinstance(x, Spread) else x)
    first = (x.size,) if isinstance(x, Spread) else ()
    shape = (*first, *aval.shape)
    return jax.ShapeDtypeStruct(shape, aval.dtype, weak_type=aval.weak_type)


def _run(jaxpr: Jaxpr, inputs: Sequence[Any]) -> list[Any]:
    env = dict(zip(jaxpr.constvars, jaxpr.consts, strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))

    def read(x: Any) -> Any:
        return x.val if isinstance(x, Literal) else env[x]

    for eqn in jaxpr.eqns:
        results = _apply(eqn, [read(x) for x in eqn.invars])
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _apply(eqn: JaxprEqn, values: list[Any]) -> list[Any]:
    """The results of an operation, `Spread` where one entry of the operands determines them."""
    name = eqn.primitive.name
    if not any(isinstance(x, Spread) for x in values):
        if (
            name == "broadcast_in_dim"
            and jnp.ndim(values[0]) == 0
            and len(eqn.params["shape"]) == 1
        ):
            return [Spread(values[0], eqn.params["shape"][0])]  # as in where(index > 2, index, 0)
        return bind(eqn, values)
    if name in CALLS | CUSTOM_RULES:
        return _run(inner_jaxpr(eqn), values)
    rule = _entrywise if name in ENTRYWISE else _RULES.get(name)
    # Rules with one operand take it spread; only entrywise ones mix spread operands with others.
    applies = rule is not None and (name in ENTRYWISE or isinstance(values[0], Spread))
    result = rule(eqn, *values) if rule is not None and applies else None
    return bind(eqn, [whole(x) for x in values]) if result is None else [result]


def _entrywise(eqn: JaxprEqn, *values: Any) -> Any:
    """The operation on entries, if every operand is spread or a scalar."""
    (shape,) = (aval.shape for aval in avals_of(eqn.outvars))
    entries = [x.entry if isinstance(x, Spread) else x for x in values]
    is_fit = all(
        jnp.shape(entry) == shape[1:] if isinstance(x, Spread) else jnp.ndim(x) == 0
        for x, entry in zip(values, entries, strict=True)
    )
    return Spread(bind(eqn, entries)[0], shape[0]) if is_fit else None


def _slice(eqn: JaxprEqn, x: Spread) -> Any:
    starts, stops = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    (aval,) = avals_of(eqn.outvars)
    entry = lax.slice(x.entry, starts[1:], stops[1:], strides[1:]) if starts[1:] else x.entry
    return Spread(entry, aval.shape[0])


def _dynamic_slice(eqn: JaxprEqn, x: Spread, *starts: Any) -> Any:
    sizes = eqn.params["slice_sizes"]
    starts = tuple(whole(start) for start in starts[1:])
    return Spread(lax.dynamic_slice(x.entry, starts, sizes[1:]) if starts else x.entry, sizes[0])


def _squeeze(eqn: JaxprEqn, x: Spread) -> Any:
    dimensions = eqn.params["dimensions"]
    rest = [d - 1 for d in dimensions if d]
    entry = lax.squeeze(x.entry, rest) if rest else x.entry
    return entry if 0 in dimensions else Spread(entry, x.size)


def _reshape(eqn: JaxprEqn, x: Spread) -> Any:
    (aval,) = avals_of(eqn.outvars)
    if aval.shape == jnp.shape(x.entry) and x.size == 1:
        return x.entry
    return Spread(x.entry.reshape(aval.shape[1:]), x.size) if aval.shape[:1] == (x.size,) else None


def _broadcast_in_dim(eqn: JaxprEqn, x: Spread, *_: Any) -> Any:
    shape, dimensions = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    if dimensions[0] == 0:  # the first axis stays the first
        rest = [d - 1 for d in dimensions[1:]]
        return Spread(lax.broadcast_in_dim(x.entry, shape[1:], rest), shape[0])
    return lax.broadcast_in_dim(x.entry, shape, dimensions[1:])


def _extremum(eqn: JaxprEqn, x: Spread) -> Any:
    """The largest or least of equal entries is any of them."""
    axes = eqn.params["axes"]
    rest = tuple(a - 1 for a in axes if a)
    reduce = jnp.max if eqn.primitive.name == "reduce_max" else jnp.min
    entry = reduce(x.entry, rest) if rest else x.entry
    return entry if 0 in axes else Spread(entry, x.size)


_RULES: dict[str, Callable[..., Any]] = {
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "squeeze": _squeeze,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast_in_dim,
    "reduce_max": _extremum,
    "reduce_min": _extremum,
}
