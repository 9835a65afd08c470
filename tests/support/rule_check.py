"""Checks a batch rule numerically: an operation on parts of the batch against the full batch.

The roles that the interpreter gives to the results say how the results of the parts make up those
of the full batch. Here both are computed, on random operands, and held against each other; so are
the cotangents, where the operation is differentiable.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from layerwise_jax.batch.interpreter import BatchInterpreter
from layerwise_jax.batch.lattice import (
    NotSeparable,
    PartialExtreme,
    PartialSum,
    Replicated,
    Role,
    Split,
    one_scaling_axis,
)
from layerwise_jax.batch.pairs import BatchError, pair_programs
from layerwise_jax.batch.precompute import Candidates
from layerwise_jax.trace.flatten import flatten
from layerwise_jax.trace.program import BatchSlice, Program, evaluate

B = -1
"""In a shape: the axis of the examples."""

Kind = Literal["split", "constant", "whole", "sum"]


@dataclass(frozen=True)
class Operand:
    """Operand of an operation.

    Attributes:
      shape: its shape, with `B` for the axis of the examples if it has one.
      dtype: a dtype, or the name of a key implementation.
      low, high: bounds of its entries.
      kind: "split", each example has its own; "constant", the same for every example; "whole",
        without examples; "sum", every part has a summand.
    """

    shape: tuple[int, ...]
    dtype: Any = jnp.float32
    low: float = 0.1
    high: float = 0.9
    kind: Kind = "whole"

    @property
    def axis(self) -> int | None:
        return self.shape.index(B) if B in self.shape else None

    @property
    def role(self) -> Role:
        if self.kind == "split":
            assert self.axis is not None
            return Split(self.axis)
        return PartialSum(1) if self.kind == "sum" else Replicated()

    def draw(self, random: np.random.Generator, size: int) -> Any:
        """Random entries, with `size` examples."""
        shape = tuple(size if n == B else n for n in self.shape)
        if isinstance(self.dtype, str):
            seeds = random.integers(0, 2**31, shape, dtype=np.uint32)
            keys = [jax.random.key(seed, impl=self.dtype) for seed in seeds.ravel()]
            return jnp.stack(keys).reshape(shape)
        if self.dtype == jnp.bool_:
            return jnp.asarray(random.random(shape) < 0.5)
        if jnp.issubdtype(self.dtype, jnp.integer):
            return jnp.asarray(
                random.integers(int(self.low), int(self.high) + 1, shape), self.dtype
            )
        return jnp.asarray(random.uniform(self.low, self.high, shape), self.dtype)


@dataclass(frozen=True)
class Case:
    """An operation: a function of arrays that JAX traces to the primitive."""

    fn: Callable[..., Any]
    operands: tuple[Operand, ...]
    tolerance: float = 2e-5


@dataclass(frozen=True)
class Outcome:
    """Primitives that a check ran, and whether any result was accepted."""

    primitives: frozenset[str]
    accepted: bool


def operand(*shape: int, dtype: Any = jnp.float32, low: float = 0.1, high: float = 0.9) -> Operand:
    return Operand(shape, dtype, low, high, "split" if B in shape else "whole")


def variants(case: Case) -> list[Case]:
    """The case, and each of its operands once as a constant or as a sum instead."""
    sums = tuple(replace(x, kind="sum") if _may_be_sum(x) else x for x in case.operands)
    found = [case, replace(case, operands=sums)]
    for i, x in enumerate(case.operands):
        if x.kind == "whole" and not _may_be_sum(x):
            continue
        other: Kind = "constant" if x.kind == "split" else "sum"
        changed = (*case.operands[:i], replace(x, kind=other), *case.operands[i + 1 :])
        found.append(replace(case, operands=changed))
    return found


def _may_be_sum(x: Operand) -> bool:
    return x.kind == "whole" and not isinstance(x.dtype, str) and x.dtype != jnp.bool_


def check_case(case: Case, size: int = 2, parts: int = 2, seed: int = 0) -> Outcome:
    """Run the case on `parts` parts of `size` examples, and on all of them.

    Raises:
      AssertionError: the roles of the results promise what is not so.
    """
    random = np.random.default_rng(seed)
    given = [_draw_parts(x, random, size, parts) for x in case.operands]
    micro = flatten(jax.make_jaxpr(case.fn)(*(g[0][0] for g in given)), 0)
    full = flatten(jax.make_jaxpr(case.fn)(*(g[1] for g in given)), 0)
    primitives = frozenset(_primitives(full))
    try:
        pair = pair_programs(micro, full)
    except BatchError:
        return Outcome(primitives, False)
    walk = BatchInterpreter(parts, candidates=Candidates(pair, parts, {}))
    roles = walk.outputs(pair, dict(zip(full.inputs, (x.role for x in case.operands), strict=True)))
    ops = [
        replace(op, eqn=walk.corrected.get(i, op.eqn), full_rows=walk.draws.full_rows.get(i))
        for i, op in enumerate(micro.ops)
    ]
    run = Run(case, replace(micro, ops=tuple(ops)), full, tuple(roles), parts)
    part_operands = [[g[0][k] for g in given] for k in range(parts)]
    run.check(part_operands, [g[1] for g in given], random)
    return Outcome(primitives, any(not isinstance(role, NotSeparable) for role in roles))


def _primitives(program: Program) -> list[str]:
    return [op.name for op in program.ops]


def _draw_parts(
    x: Operand, random: np.random.Generator, size: int, parts: int
) -> tuple[list[Any], Any]:
    """The operand of every part, and that of the full batch."""
    if x.kind == "split":
        rows = [x.draw(random, size) for _ in range(parts)]
        return rows, jnp.concatenate(rows, x.axis)
    if x.kind == "constant":
        assert x.axis is not None
        one = x.draw(random, 1)
        whole = jnp.concatenate([one] * (size * parts), x.axis)
        return [jnp.concatenate([one] * size, x.axis)] * parts, whole
    if x.kind == "sum":
        summands = [x.draw(random, size) for _ in range(parts)]
        return summands, sum(summands[1:], summands[0])
    shared = x.draw(random, size)
    return [shared] * parts, shared


@dataclass(frozen=True)
class Run:
    """The part's and the full program, with the roles of the results."""

    case: Case
    micro: Program
    full: Program
    roles: tuple[Role, ...]
    parts: int

    def check(self, part_operands: list[list[Any]], operands: list[Any], random: Any) -> None:
        results = [self.run_part(index, given) for index, given in enumerate(part_operands)]
        whole = self.run_full(operands)
        for position, role in enumerate(self.roles):
            made = [result[position] for result in results]
            if not isinstance(role, NotSeparable):
                self.check_value(role, [_numbers(x) for x in made], _numbers(whole[position]))
        self.check_cotangents(part_operands, operands, whole, random)

    def run_part(self, index: int, given: Sequence[Any]) -> list[Any]:
        env = {**self.micro.constants, **dict(zip(self.micro.inputs, given, strict=True))}
        return evaluate(self.micro.ops, env, self.micro.outputs, BatchSlice(index))

    def run_full(self, given: Sequence[Any]) -> list[Any]:
        env = {**self.full.constants, **dict(zip(self.full.inputs, given, strict=True))}
        return evaluate(self.full.ops, env, self.full.outputs)

    def check_value(self, role: Role, made: list[np.ndarray], whole: np.ndarray) -> None:
        match role:
            case Split(axis, ratio):
                expected = _scaled(np.concatenate(made, axis), ratio)
            case PartialSum(ratio):
                expected = _scaled(np.sum(made, 0), ratio)
            case PartialExtreme(which):
                expected = getattr(np, which)(made, 0)
            case Replicated(ratio):
                self.check_replicated(made, whole, ratio)
                return
            case _:
                raise AssertionError(role)
        self.assert_close(expected, whole)

    def check_replicated(self, made: list[np.ndarray], whole: np.ndarray, ratio: Any) -> None:
        axis = one_scaling_axis(made[0].shape, whole.shape)
        for part in made:
            expected = part
            if axis is not None:  # constant along the axis: any entry of it stands for all
                first = np.take(part, [0], axis)
                self.assert_close(np.broadcast_to(first, part.shape), part)
                expected = np.broadcast_to(first, whole.shape)
            self.assert_close(_scaled(expected, ratio), whole)

    def check_cotangents(
        self, part_operands: list[list[Any]], operands: list[Any], whole: list[Any], random: Any
    ) -> None:
        """Cotangents of the operands, where results that are separable have derivatives."""
        moving = [i for i, x in enumerate(operands) if _is_float(x)]
        made = [
            p
            for p, (x, role) in enumerate(zip(whole, self.roles, strict=True))
            if _is_float(x) and isinstance(role, Split | PartialSum | Replicated)
        ]
        seeds = {p: random.uniform(-1, 1, np.shape(whole[p])) for p in made}
        if not moving or not made:
            return
        try:
            expected = _pull(self.run_full, operands, moving, seeds, whole)
        except (TypeError, NotImplementedError, ValueError):  # no derivative
            return
        shares = []
        for index, given in enumerate(part_operands):
            results = self.run_part(index, given)
            own = {p: self.share(p, index, seeds[p], np.shape(results[p])) for p in made}

            def run(x: Sequence[Any], index: int = index) -> list[Any]:
                return self.run_part(index, x)

            shares.append(_pull(run, given, moving, own, results))
        for j, i in enumerate(moving):
            self.check_gradient(self.case.operands[i], [s[j] for s in shares], expected[j])

    def share(self, position: int, index: int, seed: np.ndarray, shape: tuple[int, ...]) -> Any:
        """A part's share of the cotangent of a result."""
        role = self.roles[position]
        assert isinstance(role, Split | PartialSum | Replicated)
        axis = role.axis if isinstance(role, Split) else one_scaling_axis(shape, seed.shape)
        scaled = seed * float(role.ratio)
        if axis is not None:
            size = shape[axis]
            return np.take(scaled, range(index * size, (index + 1) * size), axis)
        return scaled if isinstance(role, PartialSum) else scaled / self.parts

    def check_gradient(self, x: Operand, shares: list[np.ndarray], expected: np.ndarray) -> None:
        if x.axis is not None:
            self.assert_close(np.concatenate(shares, x.axis), expected)
        elif x.kind == "sum":
            for share in shares:
                self.assert_close(share, expected)
        else:
            self.assert_close(np.sum(shares, 0), expected)

    def assert_close(self, made: np.ndarray, expected: np.ndarray) -> None:
        assert made.shape == expected.shape
        if not np.issubdtype(expected.dtype, np.inexact):
            np.testing.assert_array_equal(made, expected)
            return
        finite = np.abs(expected[np.isfinite(expected)])
        scale = max(1.0, float(np.max(finite, initial=0)))
        tolerance = self.case.tolerance * scale
        np.testing.assert_allclose(made, expected, rtol=0, atol=tolerance, equal_nan=True)


def _pull(
    run: Callable[[Sequence[Any]], list[Any]],
    operands: Sequence[Any],
    moving: Sequence[int],
    seeds: dict[int, np.ndarray],
    results: Sequence[Any],
) -> list[np.ndarray]:
    """Cotangents of the operands at `moving`, from those of some results."""

    def moved(*values: Any) -> list[Any]:
        merged = list(operands)
        for i, x in zip(moving, values, strict=True):
            merged[i] = x
        made = run(merged)
        return [made[p] for p in seeds]

    _, pull = jax.vjp(moved, *(operands[i] for i in moving))
    cotangents = [jnp.asarray(seed, results[p].dtype) for p, seed in seeds.items()]
    return [_numbers(x) for x in pull(cotangents)]


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _numbers(x: Any) -> np.ndarray:
    """An array as NumPy holds it: keys as their data, bfloat16 as float32."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(x))
    return np.asarray(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x)


def _scaled(x: np.ndarray, ratio: Any) -> np.ndarray:
    return x if ratio == 1 else x * float(ratio)
