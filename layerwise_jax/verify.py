"""`Pipeline.verify`: the pipeline against the unstaged function, on the user's own data.

Values that cross a boundary between stages are read out of a run of the pipeline (probes) and
compared with the function evaluated part by part. The first boundary that differs names the stage
at fault; gradients are traced back from the last stage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from layerwise_jax._jax import AbstractRef, is_key, no_context_mesh
from layerwise_jax.batch.outputs import OutputRole
from layerwise_jax.stage.inputs import check_inputs
from layerwise_jax.stage.wiring import wire
from layerwise_jax.trace.program import BatchSlice, Program, Value, evaluate

Kind = Literal["output", "gradient", "state"]


@dataclass(frozen=True)
class Difference:
    """One leaf of the outputs, gradients or new state, pipeline against function.

    Attributes:
      kind: "output", "gradient" or "state".
      name: the leaf's path.
      largest: the largest absolute difference; NaN if one side has a NaN and the other has not.
      allowed: the difference that rounding explains.
      stage: the first stage at which a difference appears; None where there is none.
    """

    kind: Kind
    name: str
    largest: float
    allowed: float
    stage: int | None = None

    @property
    def is_equal(self) -> bool:
        """True if the difference is at most the allowed rounding."""
        return self.largest <= self.allowed


@dataclass(frozen=True)
class Verification:
    """All leaves of a verified call. `print` shows a table, differences first."""

    differences: tuple[Difference, ...]

    @property
    def is_equal(self) -> bool:
        """True if every difference is at most the allowed rounding."""
        return all(each.is_equal for each in self.differences)

    @property
    def first_stage(self) -> int | None:
        """The stage at which differences begin; None if there are none."""
        return next((x.stage for x in self.differences if not x.is_equal), None)

    def __str__(self) -> str:
        rows = sorted(self.differences, key=lambda each: each.is_equal)
        width = max(len(each.name) for each in rows)
        head = f"{'':8}  {'leaf':{width}}  {'difference':>10}  {'allowed':>10}  first stage"
        lines = [
            f"{each.kind:8}  {each.name:{width}}  {each.largest:10.2e}  {each.allowed:10.2e}  "
            f"{'' if each.is_equal else each.stage}"
            for each in rows
        ]
        wrong = sum(not each.is_equal for each in rows)
        verdict = f"{wrong} of {len(rows)} leaves differ" if wrong else "all leaves are equal"
        return "\n".join([head, *(line.rstrip() for line in lines), f"{verdict} up to rounding"])


@no_context_mesh()
def verify_pipeline(pipeline: Any, params: Any, inputs: tuple[Any, ...]) -> Verification:
    """Run function and pipeline, and compare every output, gradient and state leaf.

    Args:
      pipeline: the pipeline.
      params: parameters in the user's tree.
      inputs: inputs at the full batch.
    """
    signature, loop = pipeline.layers.signature, pipeline.loop
    axes = loop.in_axes[: len(signature.inputs_avals)]
    leaves = check_inputs(inputs, signature, axes, pipeline.parts)
    reference = _Reference(pipeline, params, inputs, pipeline.batching.inputs(leaves))
    outputs, gradients = reference.outputs_and_gradients()
    got = _run(pipeline, params, inputs, with_gradients=bool(gradients))
    faulty = _first_wrong_boundary(pipeline, params, reference)
    scale = reference.scale
    made_on = [output.stage for output in loop.wiring.outputs]
    state = {**{p: w.leaf for p, w in loop.state.items()}, **loop.renewed}
    found = []
    for position, name in enumerate(_output_names(signature)):
        if position not in state:
            own = made_on[position] if faulty is None else faulty
            found.append(_compare("output", name, got.outputs[position], outputs[position], scale))
            found[-1] = replace(found[-1], stage=own)
    for position, leaf in state.items():
        name, own = signature.params_names[leaf], made_on[position] if faulty is None else faulty
        each = _compare("state", name, got.params[leaf], outputs[position], scale)
        found.append(replace(each, stage=own))
    size = max((_magnitude(x) for x in gradients.values()), default=0.0)
    for leaf, want in gradients.items():
        name = signature.params_names[leaf]
        found.append(_compare("gradient", name, got.gradients[leaf], want, scale, size))
    return Verification(_with_stages(found, pipeline, faulty))


@dataclass(frozen=True)
class _Run:
    """Results of a pipeline: leaves of outputs (None for state), parameters and gradients."""

    outputs: Sequence[Any]
    params: Sequence[Any]
    gradients: Sequence[Any]


def _run(pipeline: Any, params: Any, inputs: tuple[Any, ...], *, with_gradients: bool) -> _Run:
    staged = pipeline.place(params)
    gradients: Any = {}
    if with_gradients:
        value, placed = pipeline.value_and_grad(staged, *inputs)
        gradients = jax.tree.leaves(pipeline.gather(placed))
    else:
        value = pipeline(staged, *inputs)
    value, after = value if pipeline.loop.has_state else (value, staged)
    outputs = jax.tree.leaves(value, is_leaf=lambda x: x is None)
    return _Run(outputs, jax.tree.leaves(pipeline.gather(after)), gradients)


class _Reference:
    """The function without stages: at the full batch, and part by part for the boundaries."""

    def __init__(self, pipeline: Any, params: Any, inputs: tuple[Any, ...], leaves: list[Any]):
        self.pipeline, self.inputs, self.leaves = pipeline, inputs, leaves
        self.program: Program = pipeline.layers.program
        self.params = pipeline.loop_executor.placement.check(params)
        self.tree = pipeline.layers.signature.params_tree
        floats = [a.dtype for a in self.program.avals if not isinstance(a, AbstractRef)]
        self.scale = max(
            math.sqrt(float(jnp.finfo(d).eps)) for d in floats if jnp.issubdtype(d, jnp.floating)
        )

    def outputs_and_gradients(self) -> tuple[list[Any], dict[int, Any]]:
        """All outputs, new state among them, and the gradients of trained leaves."""
        trained = [leaf for leaf, moves in enumerate(self.pipeline.trainable) if moves]
        loss = self.pipeline.layers.signature.outputs_avals[0]
        is_loss = not loss.shape and jnp.issubdtype(loss.dtype, jnp.floating)

        def run(moving: list[Any]) -> tuple[Any, list[Any]]:
            leaves = list(self.params)
            for leaf, x in zip(trained, moving, strict=True):
                leaves[leaf] = x
            outputs = self._outputs(leaves)
            return outputs[0], outputs

        moving = [jnp.asarray(self.params[leaf]) for leaf in trained]
        if not is_loss or not trained:
            return jax.jit(run)(moving)[1], {}
        (_, outputs), slopes = jax.jit(jax.value_and_grad(run, has_aux=True))(moving)
        return outputs, dict(zip(trained, slopes, strict=True))

    def _outputs(self, leaves: list[Any]) -> list[Any]:
        if self.pipeline.options.batch_statistics is None and not self.pipeline.loop.state:
            fn = self.pipeline.layers.fn
            return jax.tree.leaves(fn(jax.tree.unflatten(self.tree, leaves), *self.inputs))
        parts = self.parts(leaves, self.program.outputs)
        roles = self.pipeline.batching.outputs
        return [_combined(role, each) for role, each in zip(roles, parts, strict=True)]

    def boundary_values(self, values: Sequence[Value]) -> list[Any]:
        """Values of the program in every part, [parts x rows, ...]."""
        parts = jax.jit(lambda leaves: self.parts(leaves, values))(list(self.params))
        return [jnp.concatenate(each) for each in parts]

    def parts(self, leaves: Sequence[Any], wanted: Sequence[Any]) -> list[list[Any]]:
        """For every wanted value, that of each part in turn; state goes from part to part."""
        program, loop = self.program, self.pipeline.loop
        arrays = {**dict(enumerate(leaves)), **program.captured}
        held = {x: weight.of(arrays[weight.leaf]) for x, weight in program.weights.items()}
        found: list[list[Any]] = [[] for _ in wanted]
        for part in range(self.pipeline.parts):
            rows = zip(loop.program.inputs, self.leaves, loop.in_axes, strict=True)
            inputs = {x: leaf if axis is None else self._rows(leaf, part) for x, leaf, axis in rows}
            env = {**program.constants, **held, **inputs}
            state = [program.outputs[p] for p in loop.state]
            results = evaluate(program.ops, env, [*wanted, *state], BatchSlice(jnp.int32(part)))
            new = dict(zip(loop.state.values(), results[len(wanted) :], strict=True))
            held = {x: new.get(program.weights[x], value) for x, value in held.items()}
            for each, x in zip(found, results, strict=False):
                each.append(jnp.asarray(x))
        return found

    def _rows(self, leaf: Any, part: int) -> Any:
        size = leaf.shape[0] // self.pipeline.parts
        return leaf[part * size : (part + 1) * size]


def _combined(role: OutputRole, parts: Sequence[Any]) -> Any:
    """An output of the batch from those of its parts."""
    if role.kind == "rows":
        return jnp.concatenate(parts)
    if role.kind == "state":
        return parts[-1]
    if role.kind == "reduced":
        return sum(parts[1:], parts[0]) / (len(parts) if role.combine == "mean" else 1)
    if role.kind == "extreme":
        return (jnp.max if role.combine == "max" else jnp.min)(jnp.stack(parts), axis=0)
    return parts[0]


def _first_wrong_boundary(pipeline: Any, params: Any, reference: _Reference) -> int | None:
    """The first stage that sends a wrong value; None if all that cross boundaries are right."""
    program, loop = reference.program, pipeline.loop
    probes = [
        (s, x) for s, stage in enumerate(loop.stages) for x in stage.sends if _is_array(program, x)
    ]
    first: dict[Value, int] = {}
    for s, x in probes:
        first.setdefault(x, s)  # the stage that makes it sends it first
    if not first:
        return None
    got = _probed(pipeline, params, first, reference.leaves)
    for (x, s), value, want in sorted(
        zip(first.items(), got, reference.boundary_values(list(first)), strict=True),
        key=lambda each: each[0][1],
    ):
        del x
        if not _compare("output", "", value, want, reference.scale).is_equal:
            return s
    return None


def _is_array(program: Program, x: Value) -> bool:
    aval = program.avals[x]
    return not isinstance(aval, AbstractRef) and bool(aval.shape) and not is_key(aval)


def _probed(
    pipeline: Any, params: Any, first: Mapping[Value, int], leaves: Sequence[Any]
) -> list[Any]:
    """Values of the pipeline's own run, each an additional output of the stage that makes it."""
    executor, loop = pipeline.loop_executor, pipeline.loop
    count = len(loop.program.outputs)
    program = replace(loop.program, outputs=(*loop.program.outputs, *first))
    positions = {x: count + i for i, x in enumerate(first)}
    stages = tuple(
        replace(
            stage,
            outputs={**stage.outputs, **{positions[x]: x for x, at in first.items() if at == s}},
        )
        for s, stage in enumerate(loop.stages)
    )
    probed = replace(
        loop, program=program, stages=stages, wiring=wire(program, stages, loop.alignment)
    )
    outputs = replace(
        executor.outputs,
        loop=probed,
        combining=(*executor.outputs.combining, *(OutputRole("rows") for _ in first)),
        avals=(*executor.outputs.avals, *(program.avals[x] for x in first)),
    )
    run = replace(executor, loop=probed, outputs=outputs)
    staged = executor.placement.place(params, pipeline.mesh)
    return run.evaluate(staged, leaves)[0][count:]


def _with_stages(
    found: Sequence[Difference], pipeline: Any, faulty: int | None
) -> tuple[Difference, ...]:
    """Gradients with the stage at which they begin to be wrong; backward starts at the last one."""
    names = pipeline.layers.signature.params_names
    stages: dict[str, int] = {}
    for s, stage in enumerate(pipeline.loop.stages):
        for weight in stage.weights.values():
            if not weight.is_captured:
                stages[names[weight.leaf]] = s
    wrong = [x for x in found if not x.is_equal]
    forward = [x.stage for x in wrong if x.kind == "output" and x.stage is not None]
    backward = [stages[x.name] for x in wrong if x.kind == "gradient" and x.name in stages]
    first = faulty if faulty is not None else min(forward, default=max(backward, default=0))
    placed = [replace(x, stage=first) if x.kind == "gradient" else x for x in found]
    return tuple(x if not x.is_equal else replace(x, stage=None) for x in placed)


def _compare(
    kind: Kind, name: str, got: Any, want: Any, scale: float, size: float | None = None
) -> Difference:
    """The difference of a leaf; `size` is the largest entry of the tree, for gradients."""
    got, want = (np.asarray(jax.random.key_data(x) if is_key(x) else x) for x in (got, want))
    if not jnp.issubdtype(want.dtype, jnp.inexact):
        return Difference(kind, name, 0.0 if np.array_equal(got, want) else math.inf, 0.0)
    wide = np.result_type(np.float64, want.dtype if want.dtype.kind == "c" else np.float64)
    a, b = got.astype(wide), want.astype(wide)
    is_same = (a == b) | (np.isnan(a) & np.isnan(b))
    difference = np.where(is_same, 0, np.abs(a - b))
    largest = float(np.max(difference)) if difference.size else 0.0
    return Difference(kind, name, largest, scale * max(_magnitude(want), (size or 0.0) * scale))


def _magnitude(x: Any) -> float:
    """The largest finite absolute entry."""
    x = np.abs(np.asarray(x, np.complex128 if np.asarray(x).dtype.kind == "c" else np.float64))
    return float(np.max(np.where(np.isfinite(x), x, 0))) if x.size else 0.0


def _output_names(signature: Any) -> list[str]:
    tree = jax.tree.unflatten(
        signature.outputs_tree, list(range(signature.outputs_tree.num_leaves))
    )
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [jax.tree_util.keystr(path) or "value" for path, _ in paths]
