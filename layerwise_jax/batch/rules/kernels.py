"""Rule of Pallas calls: a kernel treats examples one by one if one axis of its grid counts them.

`vmap` puts such an axis in front of the grid; a kernel written for a batch has one already. Along
it every instance of the kernel reads and writes the blocks of its example: in each array that has
the examples, blocks are one long on that axis and the grid index is the block index; no other
block index, and nothing in the kernel, depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layerwise_jax import _jax
from layerwise_jax._jax import Jaxpr
from layerwise_jax.batch.lattice import NotSeparableError, OpContext, Role, build, one_scaling_axis
from layerwise_jax.batch.linearity import nonlinear
from layerwise_jax.batch.rules.elementwise import Rule

NOT_ALONE = (
    "runs a kernel of which no axis of the grid counts the examples, in blocks of one and for "
    "itself; give its grid such an axis (jax.vmap of the call does)"
)


def _pallas_call(step: OpContext) -> list[Role]:
    nonlinear(step)
    micro, full = step.params["grid_mapping"], step.full.params["grid_mapping"]
    num_results = len(step.micro.outvars)
    axes = [step.axis(i) for i in range(len(step.roles))]
    # axes: one entry for each operand, then one for each result.
    axes += [one_scaling_axis(*step.result_shapes(i)) for i in range(num_results)]
    # No array follows the batch: exact if the kernel itself is the same text.
    if all(axis is None for axis in axes):  # no examples: one kernel for all
        if str(step.params["jaxpr"]) != str(step.full.params["jaxpr"]):
            raise NotSeparableError(NOT_ALONE, "unknown")
        return [build(None, 1, False)] * num_results
    grid_axis = _axis_of_examples(step, micro.grid, full.grid)
    kernels = str(step.params["jaxpr"]), str(step.full.params["jaxpr"])
    if grid_axis is None or kernels[0] != kernels[1] or _reads_index(step, grid_axis):
        raise NotSeparableError(NOT_ALONE, "unknown")
    # Operands are the scalars that index maps read, then the inputs; blocks are those of the inputs
    # and results.
    num_scalars = micro.num_index_operands
    if any(axis is not None for axis in axes[:num_scalars]):
        raise NotSeparableError(NOT_ALONE, "unknown")
    blocks = zip(axes[num_scalars:], micro.block_mappings, full.block_mappings, strict=True)
    for axis, block, full_block in blocks:
        if not _is_of_example(block, axis, grid_axis) or not _is_same_map(block, full_block):
            raise NotSeparableError(NOT_ALONE, "unknown")
    has_examples = _has_examples(step)
    return [build(axis if has_examples else None, 1, False) for axis in axes[len(step.roles) :]]


def _has_examples(step: OpContext) -> bool:
    """True if any operand is split over the examples, whatever its axis."""
    return any(step.has_rows(i) for i in range(len(step.roles)))


def _axis_of_examples(step: OpContext, micro: Sequence[Any], full: Sequence[Any]) -> int | None:
    """The axis of the grid that is as long as the batch, if it is the only one that differs."""
    if len(micro) != len(full) or not all(isinstance(n, int) for n in (*micro, *full)):
        return None
    differing = [i for i, (m, f) in enumerate(zip(micro, full, strict=True)) if m != f]
    if len(differing) != 1 or full[differing[0]] != step.parts * micro[differing[0]]:
        return None
    return differing[0]


def _reads_index(step: OpContext, grid_axis: int) -> bool:
    """True if the kernel reads its index along an axis of the grid, or the length of that axis."""
    vmapped = step.params["grid_mapping"].vmapped_dims
    if grid_axis in vmapped:
        return False  # the kernel does not see it
    # `program_id` counts the axes of the grid that vmap did not add.
    own = grid_axis - sum(axis < grid_axis for axis in vmapped)
    return own in set(_indices_read(step.params["jaxpr"]))


def _indices_read(kernel: Jaxpr) -> list[int]:
    found = []
    for eqn in kernel.eqns:
        if eqn.primitive.name in ("program_id", "num_programs"):
            found.append(eqn.params["axis"])
        for inner in _jax.inner_jaxprs(eqn):
            found.extend(_indices_read(inner))
    return found


def _is_of_example(block: Any, axis: int | None, grid_axis: int) -> bool:
    """True if a block is that of the example which the grid index counts, along `axis`."""
    index_map = block.index_map_jaxpr
    # Block indices that follow from the grid index of the examples.
    depends = {index_map.invars[grid_axis]}
    for eqn in index_map.eqns:
        if any(not isinstance(x, _jax.Literal) and x in depends for x in eqn.invars):
            depends.update(eqn.outvars)
    for i, index in enumerate(index_map.outvars):
        follows = not isinstance(index, _jax.Literal) and index in depends
        if i == axis:
            is_index = index is index_map.invars[grid_axis]
            if not is_index or _length(block.block_shape[i]) != 1:
                return False
        elif follows:
            return False
    return True


def _length(size: Any) -> int | None:
    """Length of a block along an axis; a squeezed axis is one long."""
    if size is None or type(size).__name__ in ("Squeezed", "Mapped"):
        return 1
    return size if isinstance(size, int) else getattr(size, "block_size", None)


def _is_same_map(micro: Any, full: Any) -> bool:
    return str(micro.index_map_jaxpr) == str(full.index_map_jaxpr) and (
        micro.block_shape == full.block_shape
    )


RULES: dict[str, Rule] = {"pallas_call": _pallas_call}
