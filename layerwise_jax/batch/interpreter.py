"""Abstract interpreter over a pair of programs: gives every value its role for the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from layerwise_jax._jax import (
    AbstractRef,
    JaxprEqn,
    Literal,
    is_key,
    source_line,
)
from layerwise_jax.batch.derivatives import NOT_ALONE, check_derivative
from layerwise_jax.batch.lattice import (
    UNUSED,
    BatchIota,
    IndexColumns,
    NotSeparable,
    NotSeparableError,
    OpContext,
    PartialExtreme,
    PartialSum,
    Parts,
    Permutation,
    Permuted,
    Replicated,
    Role,
    Split,
    checked,
    known,
    same,
    scaling_axes,
)
from layerwise_jax.batch.linearity import ORDERED, STATISTICS, nonlinear
from layerwise_jax.batch.pairs import PairedOp, ProgramPair, constants_of, differing_parameter
from layerwise_jax.batch.precompute import Candidates
from layerwise_jax.batch.rules import (
    attention,
    bodies,
    contractions,
    elementwise,
    extremes,
    indexing,
    kernels,
    permutations,
    shapes,
)
from layerwise_jax.batch.rules import draws as drawing
from layerwise_jax.batch.rules.draws import Draws, numbers_through
from layerwise_jax.trace.primitives import CALL_LIKE, CUSTOM_RULES
from layerwise_jax.trace.program import Op, Operand, Value

RULES = {
    **elementwise.RULES,
    **shapes.RULES,
    **contractions.RULES,
    **attention.RULES,
    **indexing.RULES,
    **kernels.RULES,
}


@dataclass
class BatchInterpreter:
    """Interprets a pair of programs, or of bodies of a loop, branch or call.

    Attributes:
      parts: full batch over one part.
      per_microbatch: whether a sum or mean over examples, used further, is accepted as a statistic
        of the part.
      draws: drawing operations that were found.
      corrected: by position in the program, custom derivative calls to run in place of the traced.
      roles: of every value of the full program, once it was run.
      statistics: positions of operations that took a sum over a part's examples for a statistic.
      candidates: values that may be computed beforehand; None in the body of a loop or branch.
      checks_derivatives: whether derivative rules are checked; not inside of derivative rules,
        which may call their own function.
    """

    parts: Parts
    per_microbatch: bool = False
    draws: Draws = field(default_factory=Draws)
    corrected: dict[int, JaxprEqn] = field(default_factory=dict)
    roles: dict[Value, Role] = field(default_factory=dict)
    statistics: set[int] = field(default_factory=set)
    candidates: Candidates | None = None
    checks_derivatives: bool = True

    def run(self, pair: ProgramPair, given: dict[Value, Role]) -> list[Role]:
        """Roles of the outputs.

        Args:
          pair: the two programs.
          given: roles of the full program's weights and inputs.
        """
        env = dict(given)
        for value, micro, full in constants_of(pair):
            env[value] = self._constant(value, constant_role(micro, full))
        for i, op in enumerate(pair.ops):
            if self.candidates is None or self.candidates.is_live(op):
                roles = [_located(role, pair, i) for role in self._roles_of_results(op, env)]
            else:
                roles = [UNUSED] * len(op.full.results)
            env.update(zip(op.full.results, roles, strict=True))
            # A precomputed value is an input of the part: that role replaces its operation's.
            env.update({x: self.precomputed[x] for x in op.full.results if x in self.precomputed})
        if self.candidates is not None:
            self.roles.update(env)
        return [
            _read(m, f, env) for m, f in zip(pair.micro.outputs, pair.full.outputs, strict=True)
        ]

    @property
    def precomputed(self) -> Mapping[Value, Role]:
        """Roles of the values that are computed for the full batch beforehand."""
        return {} if self.candidates is None else self.candidates.roles

    def _constant(self, value: Value, role: Role) -> Role:
        if self.candidates is None:
            return role
        self.candidates.note_constant(value, role)
        return self.precomputed.get(value, role)

    def outputs(self, pair: ProgramPair, given: dict[Value, Role]) -> list[Role]:
        """Roles of the outputs, numberings of the examples made those of the full batch."""
        return [self._as_rows(role) for role in self.run(pair, given)]

    def _as_rows(self, role: Role) -> Role:
        if isinstance(role, Permutation | Permuted):
            return NotSeparable("statistics", f"{ORDERED}, and returns them so")
        try:
            return self.draws.as_rows(role)
        except NotSeparableError as mixes:
            return NotSeparable(mixes.cause, str(mixes))

    def _roles_of_results(self, op: PairedOp, env: dict[Value, Role]) -> Sequence[Role]:
        if op.micro is None:
            # The full trace broadcasts [1, ...] to [batch, ...] where the part has one example.
            return [self._repeated(env[op.full.values[0]], op)]
        roles = tuple(
            _read(m, f, env) for m, f in zip(op.micro.operands, op.full.operands, strict=True)
        )
        step = OpContext(op.micro.eqn, op.full.eqn, roles, self.parts)
        if _references(op.full):
            return self._use_of_reference(step, op, env)
        if self.candidates is None:
            return self.results(step, None)
        results = self.results(step, op.position)
        self.candidates.note(op, roles, results)
        return results

    def _repeated(self, role: Role, op: PairedOp) -> Role:
        """Role of a value that the full batch's trace repeats for its examples."""
        if isinstance(role, Replicated | NotSeparable):
            return role
        return NotSeparable("statistics", STATISTICS, op.full.eqn)

    def results(self, step: OpContext, position: int | None) -> Sequence[Role]:
        """Roles of an operation's results."""
        try:
            return self._checked(step, self._apply(step, position))
        except NotSeparableError as mixes:
            # Batch statistics: retry with the part's sum taken for the full batch's.
            reads_totals = any(isinstance(x, PartialSum | PartialExtreme) for x in step.roles)
            if self.per_microbatch and reads_totals:
                self.statistics |= set() if position is None else {position}
                roles = [self._as_statistic(role) for role in step.roles]
                return self.results(step.with_roles(roles), position)
            # Refusal is a role, not an error: it counts only if an output depends on it.
            return [NotSeparable(mixes.cause, str(mixes), step.micro)] * len(step.micro.outvars)

    def _as_statistic(self, role: Role) -> Role:
        """Role of a sum or mean over the examples of a part, taken for that of the full batch."""
        if isinstance(role, PartialSum):
            return Replicated(role.ratio * self.parts)  # a mean has ratio 1 / parts
        return Replicated() if isinstance(role, PartialExtreme) else role

    def _checked(self, step: OpContext, roles: Sequence[Role]) -> list[Role]:
        shapes = [step.result_shapes(i) for i in range(len(roles))]
        return [
            checked(role, *shape, self.parts) for role, shape in zip(roles, shapes, strict=True)
        ]

    def _apply(self, step: OpContext, position: int | None) -> Sequence[Role]:
        # 1. Calls, loops and branches: their bodies are interpreted.
        if step.name in bodies.RULES:
            self._check_order(step)
            step = step.with_roles([self.draws.as_rows(role) for role in step.roles])
            results = bodies.RULES[step.name](self._run_body, step)
            if step.name in CUSTOM_RULES and self.checks_derivatives:
                self._check_derivative(step, results, position)
            return results
        # 2. A choice that is known reads one operand only, whatever the others are.
        if step.name == "select_n" and (chosen := elementwise.chosen_case(step)):
            return [chosen]
        if indexing.is_by_length(step):
            raise NotSeparableError(indexing.BY_INDEX)
        if mixed := [role for role in step.roles if isinstance(role, NotSeparable)]:
            # 3. A cause that statistics excuse must not hide one that they do not.
            return [min(mixed, key=lambda role: role.is_excusable)] * len(step.micro.outvars)
        # 4. Everything else: draws by shape, then the rule of the primitive.
        if (parameter := differing_parameter(step.micro, step.full)) is not None:
            raise NotSeparableError(f"has {parameter}", "size")
        if step.name in drawing.PRIMITIVES:
            return [self.draws.draw(self._settle_numbers(step), position)]
        return self._by_rule(step)

    def _check_order(self, step: OpContext) -> None:
        """Refuse loops and branches over rows in an order of the examples; calls are followed."""
        if step.name not in CALL_LIKE and permutations.concerns(step):
            raise NotSeparableError(ORDERED)

    def _check_derivative(
        self, step: OpContext, results: Sequence[Role], position: int | None
    ) -> None:
        run = replace(self, checks_derivatives=False)._run_body
        corrected = check_derivative(run, step, results, self.per_microbatch)
        if corrected is None:
            return
        if position is None:  # the body of a loop or branch is not rewritten
            raise NotSeparableError(NOT_ALONE)
        self.corrected[position] = corrected

    def _by_rule(self, step: OpContext) -> Sequence[Role]:
        if permutations.concerns(step):
            results = permutations.permuted_results(step, self._by_rule)
            assert results is not None  # calls have rules of bodies
            return results
        if any(isinstance(role, BatchIota | IndexColumns) for role in step.roles):
            if (counted := numbers_through(step)) is not None:
                return [counted]
            step = self._settle_numbers(step)
        if (number := elementwise.folded(step)) is not None:
            return [number]
        if any(isinstance(role, PartialExtreme) for role in step.roles):
            return [extremes.extreme_through(step)]
        if step.name not in RULES:
            return _unknown(step)
        result = RULES[step.name](step)
        return result if isinstance(result, list) else [result]

    def _settle_numbers(self, step: OpContext) -> OpContext:
        """The operation with numberings as data, but for its index, which they are to index."""
        index = indexing.INDEX_OPERAND.get(step.name)
        if index is not None:
            self.draws.index_by(step.roles[index])
        return step.with_roles(
            [role if i == index else self.draws.as_rows(role) for i, role in enumerate(step.roles)]
        )

    def _run_body(self, pair: ProgramPair, roles: Sequence[Role]) -> list[Role]:
        # No candidates in a body: a value inside of a loop cannot be computed before the loop.
        inner = replace(self, candidates=None)
        given = dict(zip(pair.full.inputs, roles, strict=True))
        return [self.draws.as_rows(role) for role in inner.run(pair, given)]

    def _use_of_reference(
        self, step: OpContext, op: PairedOp, env: dict[Value, Role]
    ) -> Sequence[Role]:
        """Roles of a use of a mutable array, followed only where all parts use it alike."""
        shapes = [(step.shape(i), step.full_shape(i)) for i in range(len(step.roles))]
        alike = all(isinstance(role, Replicated) and same(role.ratio, 1.0) for role in step.roles)
        is_plain = step.name not in bodies.RULES  # what a body does to it is not followed
        if alike and is_plain and all(micro == full for micro, full in shapes):
            return [Replicated()] * len(step.micro.outvars)
        mixed = NotSeparable(
            "size",
            "changes a mutable array by what depends on the batch, which is not followed",
            step.micro,
        )
        env.update(dict.fromkeys(_references(op.full), mixed))
        return [mixed] * len(step.micro.outvars)


def _located(role: Role, pair: ProgramPair, position: int) -> Role:
    """The role; a refusal that began at this operation gets the user's nearest source line."""
    op = pair.ops[position].micro
    if (
        not isinstance(role, NotSeparable)
        or op is None
        or role.eqn is not op.eqn
        or source_line(op.eqn)
    ):
        return role
    lines = (source_line(op.full.eqn) for op in pair.ops[position::-1])
    return replace(role, after=next(filter(None, lines), ""))


def _references(op: Op) -> list[Value]:
    pairs = zip(op.operands, op.eqn.invars, strict=True)
    return [
        x for x, var in pairs if not isinstance(x, Literal) and isinstance(var.aval, AbstractRef)
    ]


def _unknown(step: OpContext) -> list[Role]:
    """Roles of an operation without a rule, which may read and make replicated values only."""
    results = len(step.micro.outvars)
    shapes = [step.result_shapes(i) for i in range(results)]
    shapes += [(step.shape(i), step.full_shape(i)) for i in range(len(step.roles))]
    nonlinear(step)
    # Without a rule only a value with no examples and no batch-long axis is certain.
    if any(isinstance(role, Split) for role in step.roles) or any(
        micro != full for micro, full in shapes
    ):
        raise NotSeparableError(
            "has no batch rule: it is not known whether it treats each example by itself",
            "unknown",
        )
    return [Replicated()] * results


def _read(micro: Operand, full: Operand, env: dict[Value, Role]) -> Role:
    if isinstance(full, Literal):
        assert isinstance(micro, Literal)
        return constant_role(micro.val, full.val)
    return env[full]


def constant_role(micro: Any, full: Any) -> Role:
    """Role of a number or array that is part of the function."""
    if micro is full:  # one array for both traces
        return Replicated()
    micro, full = (
        np.asarray(jax.random.key_data(x) if is_key(jax.typeof(x)) else x) for x in (micro, full)
    )
    if micro.shape == full.shape == ():
        return known(micro[()], full[()])
    # Arrays that are built for the length of the batch are replicated if constant along it.
    axes = scaling_axes(micro.shape, full.shape) if micro.ndim == full.ndim else ()
    # [1, ...] along the batch axis: one row, to be compared with all rows of both arrays.
    rows = full[tuple(slice(1) if i in axes else slice(None) for i in range(full.ndim))]
    if all(_same_bits(np.broadcast_to(rows, x.shape), x) for x in (micro, full)):
        return Replicated()
    return NotSeparable(
        "size",
        "has an array in it that follows the length of the batch; pass that array as an input",
    )


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()
