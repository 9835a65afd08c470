"""Roles through loops, branches and calls: their bodies are walked, in both traces in lock-step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from layerwise_jax import _jax
from layerwise_jax.batch.lattice import (
    SIZE,
    NotSeparable,
    NotSeparableError,
    OpContext,
    Parts,
    Replicated,
    Role,
    Split,
    joined,
)
from layerwise_jax.batch.pairs import ProgramPair, pair_bodies
from layerwise_jax.trace.primitives import CALL_LIKE

RunBody = Callable[[ProgramPair, Sequence[Role]], list[Role]]
"""The roles of a body's outputs, given those of its inputs."""

# A carry's role can only go from the same for all, over rows or sums, to mixed; each carry may wait
# for another one.
MOST_ITERATIONS = 100


def _call(run: RunBody, step: OpContext) -> list[Role]:
    return run(pair_bodies(_jax.inner_jaxpr(step.micro), _jax.inner_jaxpr(step.full)), step.roles)


def _cond(run: RunBody, step: OpContext) -> list[Role]:
    index, *operands = step.roles
    branches = zip(step.params["branches"], step.full.params["branches"], strict=True)
    results = [run(pair_bodies(micro, full), operands) for micro, full in branches]
    if not (isinstance(index, Replicated) and index.ratio == 1):
        return _undecided(step, index, "takes a branch that depends on the examples")
    return [_join(roles, step.parts) for roles in zip(*results, strict=True)]


def _while(run: RunBody, step: OpContext) -> list[Role]:
    bodies = {
        name: pair_bodies(step.params[name], step.full.params[name])
        for name in ("cond_jaxpr", "body_jaxpr")
    }
    split = step.params["cond_nconsts"], step.params["cond_nconsts"] + step.params["body_nconsts"]
    cond_consts, body_consts, carry = (
        step.roles[: split[0]],
        step.roles[split[0] : split[1]],
        step.roles[split[1] :],
    )
    carry = _settled(
        step.parts, carry, lambda carry: run(bodies["body_jaxpr"], [*body_consts, *carry])
    )
    (goes_on,) = run(bodies["cond_jaxpr"], [*cond_consts, *carry])
    if not (isinstance(goes_on, Replicated) and goes_on.ratio == 1):
        return _undecided(step, goes_on, "runs until all examples are done")
    return carry


def _scan(run: RunBody, step: OpContext) -> list[Role]:
    consts, carry, scanned = _jax.scan_parts(step.micro, range(len(step.roles)))
    if any(isinstance(role := step.roles[i], Split) and role.axis == 0 for i in scanned):
        if carry:
            raise NotSeparableError("goes through the examples one after the other")
        return _map(run, step, consts, scanned)
    if step.params["length"] != step.full.params["length"]:
        raise NotSeparableError("loops as often as the batch is long", "size")
    rows = [_row(step.roles[i]) for i in scanned]
    body = pair_bodies(_jax.inner_jaxpr(step.micro), _jax.inner_jaxpr(step.full))
    results: list[Role] = []

    def iterate(carry: Sequence[Role]) -> list[Role]:
        results[:] = run(body, [*(step.roles[i] for i in consts), *carry, *rows])
        return results[: len(carry)]

    settled = _settled(step.parts, [step.roles[i] for i in carry], iterate)
    stacked = [
        Split(role.axis + 1, role.ratio) if isinstance(role, Split) else role
        for role in results[len(settled) :]
    ]
    return [*settled, *stacked]


def _map(
    run: RunBody, step: OpContext, consts: Sequence[int], scanned: Sequence[int]
) -> list[Role]:
    """A scan over the examples without a carry, as `jax.lax.map` is: in its body there is one
    example only.
    """
    if any(step.axis(i) != 0 or not isinstance(step.roles[i], Split | Replicated) for i in scanned):
        raise NotSeparableError("goes through the examples and something else together")
    elements = [
        Replicated(role.ratio)
        for role in (step.roles[i] for i in scanned)
        if isinstance(role, Split | Replicated)
    ]
    body = pair_bodies(_jax.inner_jaxpr(step.micro), _jax.inner_jaxpr(step.full))
    results = run(body, [*(step.roles[i] for i in consts), *elements])
    if any(not isinstance(role, Replicated | NotSeparable) for role in results):
        raise NotSeparableError("uses all examples in the computation of each")
    return [Split(0, role.ratio) if isinstance(role, Replicated) else role for role in results]


def _row(role: Role) -> Role:
    return Split(role.axis - 1, role.ratio) if isinstance(role, Split) else role


def _settled(
    parts: Parts, carry: Sequence[Role], iterate: Callable[[Sequence[Role]], list[Role]]
) -> list[Role]:
    """The roles of a loop's carry that one more iteration leaves as they are."""
    roles = list(carry)
    for _ in range(MOST_ITERATIONS):
        after = [joined(a, b, parts) for a, b in zip(roles, iterate(roles), strict=True)]
        if after == roles:
            return roles
        roles = after
    raise NotSeparableError(SIZE, "size")


def _join(roles: Sequence[Role], parts: Parts) -> Role:
    first, *others = roles
    for role in others:
        first = joined(first, role, parts)
    return first


def _undecided(step: OpContext, decision: Role, why: str) -> list[Role]:
    if not isinstance(decision, NotSeparable):
        raise NotSeparableError(why)
    return [decision] * len(step.micro.outvars)


RULES: dict[str, Callable[[RunBody, OpContext], list[Role]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    **dict.fromkeys(CALL_LIKE, _call),
}
