"""Weight gradients of a backward pass that are products: made in float32, and made later.

A weight's gradient mostly ends in one matrix product of an activation and a cotangent. Such a
product can add up in float32, where an accumulator does, instead of being rounded to bfloat16
first; and it can wait: backward returns its two operands, and another program multiplies them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp

from layerwise_jax import _jax
from layerwise_jax._jax import Literal
from layerwise_jax.trace.flatten import flatten
from layerwise_jax.trace.flatten_policy import BACKWARD
from layerwise_jax.trace.program import Op, Program, Value, evaluate

# What may come between a product and the gradient: the same entries in another shape or dtype.
RESHAPING = frozenset({"transpose", "reshape", "squeeze", "convert_element_type", "copy"})


@dataclass(frozen=True, eq=False)
class Product:
    """Weight gradient that is one `dot_general`, then reshapes, transposes and casts.

    Attributes:
      op: the `dot_general`.
      chain: operations between the product and the gradient, in order.
    """

    op: Op
    chain: tuple[Op, ...]

    def make(self, left: Any, right: Any, *, widens: bool) -> Any:
        """The gradient; with `widens`, narrow operands multiply into float32, casts dropped."""
        narrow = jnp.issubdtype(left.dtype, jnp.floating) and left.dtype.itemsize < 4
        wide = widens and narrow and left.dtype == right.dtype
        params = dict(self.op.eqn.params)
        if wide:
            params["preferred_element_type"] = jnp.dtype(jnp.float32)
        result = self.op.eqn.primitive.bind(left, right, **params)
        for op in self.chain:
            if not (wide and op.name == "convert_element_type"):
                (result,) = _jax.bind(op.eqn, [result])
        return result


@dataclass(frozen=True, eq=False)
class FlatBackward:
    """A backward pass as a flat program, whose outputs are gradients and then other values.

    Attributes:
      program: the operations; its inputs are the arguments, flat.
      products: the gradients that are products, by position.
      kept: the inputs that stay alive until the products are made, so that no copy is returned.
    """

    program: Program
    products: Mapping[int, Product]
    kept: frozenset[Value]

    @cached_property
    def operands(self) -> tuple[Value, ...]:
        """The operands of all products, each once."""
        return tuple(dict.fromkeys(x for p in self.products.values() for x in p.op.values))

    @cached_property
    def computed(self) -> tuple[Value, ...]:
        """Operands that are not kept inputs: the backward without products returns them."""
        return tuple(x for x in self.operands if x not in self.kept)

    def run(self, arguments: Sequence[Any], *, widens: bool) -> list[Any]:
        """All outputs in order: gradients, then other values. Products are made last."""
        rest, operands = self.without_products(arguments)
        made = iter(rest)
        products = self.make(operands, widens=widens)
        count = len(self.program.outputs)
        return [products[j] if j in products else next(made) for j in range(count)]

    def without_products(self, arguments: Sequence[Any]) -> tuple[list[Any], dict[Value, Any]]:
        """The outputs that are no products, in order, and the products' operands."""
        program = self.program
        outputs = [x for j, x in enumerate(program.outputs) if j not in self.products]
        known = dict(zip(program.inputs, arguments, strict=True))
        made = evaluate(program.ops, {**program.constants, **known}, [*outputs, *self.computed])
        computed = dict(zip(self.computed, made[len(outputs) :], strict=True))
        operands = {x: computed[x] if x in computed else known[x] for x in self.operands}
        return made[: len(outputs)], operands

    def make(self, operands: Mapping[Value, Any], *, widens: bool) -> dict[int, Any]:
        """The products, by position."""
        return {
            j: product.make(*(operands[x] for x in product.op.values), widens=widens)
            for j, product in self.products.items()
        }


def flatten_backward(
    closed: Any, num_gradients: int, num_fixed: int, kept: Sequence[int] = ()
) -> FlatBackward:
    """Flatten a backward pass and find the gradients that are products.

    Args:
      closed: its jaxpr; the first results are gradients.
      num_gradients: how many.
      num_fixed: the first arguments, which are the same for every microbatch: prepared values.
      kept: the positions of the arguments that stay alive until the products are made.
    """
    program = flatten(closed, 0, BACKWARD)
    moving = _values_from(program, program.inputs[num_fixed:])
    fixed = _values_from(program, program.inputs[:num_fixed]) - moving
    uses: dict[Value, int] = {}
    for x in (*(x for op in program.ops for x in op.values), *program.outputs):
        if not isinstance(x, Literal):
            uses[x] = uses.get(x, 0) + 1
    made_by = {x: op for op in program.ops for x in op.results}
    products = {}
    for position, x in enumerate(program.outputs[:num_gradients]):
        product = None if isinstance(x, Literal) else _product(x, made_by, uses)
        # Of the microbatch: an activation, and a cotangent (a seed where the loss is made here).
        is_split = product is not None and fixed.isdisjoint(product.op.values)
        if product is not None and is_split and not moving.isdisjoint(product.op.values):
            products[position] = product
    return FlatBackward(program, products, frozenset(program.inputs[j] for j in kept))


def _values_from(program: Program, sources: Sequence[Value]) -> set[Value]:
    """The values that depend on one of `sources`, and these."""
    found = set(sources)
    for op in program.ops:
        if not found.isdisjoint(op.values):
            found.update(op.results)
    return found


def _product(
    value: Value, made_by: Mapping[Value, Op], uses: Mapping[Value, int]
) -> Product | None:
    """Product that makes a gradient, if nothing else reads it or the chain up to the gradient."""
    chain: list[Op] = []
    while uses[value] == 1 and value in made_by:
        op = made_by[value]
        if op.name == "dot_general":
            (contracting, _), _ = op.eqn.params["dimension_numbers"]
            is_plain = len(op.values) == 2 and bool(contracting)
            return Product(op, tuple(reversed(chain))) if is_plain else None
        if op.name not in RESHAPING or len(op.operands) != 1 or not op.values:
            return None
        chain.append(op)
        (value,) = op.values
    return None
