"""Rules for loops, branches and calls: their bodies are interpreted, both traces in lock-step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from layerwise_jax import _jax
from layerwise_jax.batch.lattice import (
    SIZE,
    NotSeparable,
    NotSeparableError,
    OpContext,
    PartialSum,
    Parts,
    Replicated,
    Role,
    Split,
    same,
)
from layerwise_jax.batch.pairs import ProgramPair, pair_bodies
from layerwise_jax.trace.primitives import CALL_LIKE

RunBody = Callable[[ProgramPair, Sequence[Role]], list[Role]]
"""Roles of a body's outputs, given those of its inputs."""

# A carry's role can only go from the same for all, over rows or sums, to mixed; each carry may wait
# for another one.
MOST_ITERATIONS = 100


def _call(run: RunBody, step: OpContext) -> list[Role]:
    return run(pair_bodies(_jax.inner_jaxpr(step.micro), _jax.inner_jaxpr(step.full)), step.roles)


def _cond(run: RunBody, step: OpContext) -> list[Role]:
    index, *operands = step.roles  # the branch taken, what all branches read
    branches = zip(step.params["branches"], step.full.params["branches"], strict=True)
    results = [run(pair_bodies(micro, full), operands) for micro, full in branches]
    if not (isinstance(index, Replicated) and index.ratio == 1):
        return _undecided(step, index, "takes a branch that depends on the examples")
    # All parts and the full batch take the same branch; its roles are not known, so join them.
    return [_join(roles, step.parts) for roles in zip(*results, strict=True)]


def _while(run: RunBody, step: OpContext) -> list[Role]:
    bodies = {
        name: pair_bodies(step.params[name], step.full.params[name])
        for name in ("cond_jaxpr", "body_jaxpr")
    }
    # Operands: constants of the condition, constants of the body, initial carry.
    first = step.params["cond_nconsts"]
    last = first + step.params["body_nconsts"]
    cond_consts, body_consts = step.roles[:first], step.roles[first:last]
    carry: Sequence[Role] = step.roles[last:]
    carry = _settled(
        step.parts, carry, lambda carry: run(bodies["body_jaxpr"], [*body_consts, *carry])
    )
    (goes_on,) = run(bodies["cond_jaxpr"], [*cond_consts, *carry])
    if isinstance(goes_on, Split):
        # A condition [examples], as under vmap: the loop no longer changes examples that are done.
        return [_stopped(role, goes_on.axis) for role in carry]
    if not (isinstance(goes_on, Replicated) and goes_on.ratio == 1):
        return _undecided(step, goes_on, "runs until all examples are done")
    return list(carry)  # as many iterations in every part


def _stopped(role: Role, axis: int) -> Role:
    """Role of a carry whose examples, along `axis`, run for as many iterations as each needs."""
    if isinstance(role, Replicated):  # counters: examples stop at different counts
        return Split(axis, role.ratio)
    if isinstance(role, NotSeparable) or (isinstance(role, Split) and role.axis == axis):
        return role
    raise NotSeparableError("has the examples of its carry along another axis than its condition")


def _linear_solve(run: RunBody, step: OpContext) -> list[Role]:
    """Role of a `custom_linear_solve`: that of `solve`; the other bodies are its derivatives."""
    lengths = step.params["const_lengths"]
    bodies = {
        name: (micro, getattr(step.full.params["jaxprs"], name))
        for name, micro in step.params["jaxprs"]._asdict().items()
        if micro is not None
    }
    consts: dict[str, tuple[Role, ...]] = {}
    start = 0
    for name, length in lengths._asdict().items():
        consts[name] = step.roles[start : start + length]
        start += length
    right_sides = step.roles[start:]
    solved = run(pair_bodies(*bodies["solve"]), [*consts["solve"], *right_sides])
    # Derivatives multiply by the matrix and solve with its transpose.
    for name in bodies.keys() - {"solve"}:
        results = run(pair_bodies(*bodies[name]), [*consts[name], *solved])
        for role in results:
            if isinstance(role, NotSeparable):
                return [role] * len(solved)
    return solved


def _custom_vmap(run: RunBody, step: OpContext) -> list[Role]:
    """Role of a function with a rule for `vmap` that was not used: that of the function."""
    return run(pair_bodies(step.params["call"], step.full.params["call"]), step.roles)


def _scan(run: RunBody, step: OpContext) -> list[Role]:
    # Positions of the operands.
    consts, carry, scanned = _jax.scan_parts(step.micro, range(len(step.roles)))
    if any(isinstance(role := step.roles[i], Split) and role.axis == 0 for i in scanned):
        if carry:
            raise NotSeparableError("goes through the examples one after the other")
        # [examples, ...] scanned along axis 0 without a carry: `lax.map` over the examples.
        return _map(run, step, consts, scanned)
    if step.params["length"] != step.full.params["length"]:
        raise NotSeparableError("loops as often as the batch is long", "size")
    # The body sees one step of what is scanned: the leading axis is gone.
    rows = [_row(step.roles[i]) for i in scanned]
    body = pair_bodies(_jax.inner_jaxpr(step.micro), _jax.inner_jaxpr(step.full))
    results: list[Role] = []

    def iterate(carry: Sequence[Role]) -> list[Role]:
        # Keep the last iteration's results: at the fixed point they hold for the stacked outputs.
        results[:] = run(body, [*(step.roles[i] for i in consts), *carry, *rows])
        return results[: len(carry)]

    settled = _settled(step.parts, [step.roles[i] for i in carry], iterate)
    stacked = [
        # Stacking puts the scan's axis in front: [length, ..., examples, ...].
        Split(role.axis + 1, role.ratio) if isinstance(role, Split) else role
        for role in results[len(settled) :]
    ]
    return [*settled, *stacked]


def _map(
    run: RunBody, step: OpContext, consts: Sequence[int], scanned: Sequence[int]
) -> list[Role]:
    """Roles of a scan over the examples without a carry (`jax.lax.map`): one example a step."""
    if any(step.axis(i) != 0 or not isinstance(step.roles[i], Split | Replicated) for i in scanned):
        raise NotSeparableError("goes through the examples and something else together")
    # In the body there is one example: its values are the same for the part and the batch.
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
    # Axis 0 is scanned away; a split axis 0 was handled before.
    return Split(role.axis - 1, role.ratio) if isinstance(role, Split) else role


def _settled(
    parts: Parts, carry: Sequence[Role], iterate: Callable[[Sequence[Role]], list[Role]]
) -> list[Role]:
    """Roles of a loop's carry at their fixed point: one more iteration leaves them as they are."""
    roles = list(carry)
    for _ in range(MOST_ITERATIONS):
        after = [joined(a, b, parts) for a, b in zip(roles, iterate(roles), strict=True)]
        if after == roles:
            return roles
        roles = after
    raise NotSeparableError(SIZE, "size")


def joined(a: Role, b: Role, parts: Parts) -> Role:
    """Role of a value that is one or the other, by a branch or from one iteration to the next."""
    if a == b or isinstance(a, NotSeparable):
        return a
    if isinstance(b, NotSeparable):
        return b
    if isinstance(a, Replicated) and isinstance(b, Replicated):
        return Replicated(a.ratio) if same(a.ratio, b.ratio) else NotSeparable("size", SIZE)
    if isinstance(b, Replicated):
        a, b = b, a
    if isinstance(a, Replicated) and isinstance(b, PartialSum):
        # A value that every part has in full counts `parts` times in the sum of the parts.
        if a.is_zero or same(a.ratio / parts, b.ratio):
            return b
        why = "may be a sum over examples or not, as a branch or loop goes"
        return NotSeparable("statistics", why)
    if isinstance(a, Replicated) and isinstance(b, Split) and (a.is_zero or same(a.ratio, b.ratio)):
        return b
    if isinstance(a, PartialSum) and isinstance(b, PartialSum) and same(a.ratio, b.ratio):
        return a
    if isinstance(a, Split) and isinstance(b, Split) and _are_alike(a, b):
        return a
    why = "has the examples along one axis or another, or a sum of them, as a branch or loop goes"
    return NotSeparable("statistics", why)


def _are_alike(a: Split, b: Split) -> bool:
    return a.axis == b.axis and same(a.ratio, b.ratio)


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
    "custom_linear_solve": _linear_solve,
    "custom_vmap_call": _custom_vmap,
    **dict.fromkeys(CALL_LIKE, _call),
}
