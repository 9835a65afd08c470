"""Compatibility shim: the only module that uses non-public JAX APIs.

Written for jax 0.11.2 to 0.12.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from jax._src import source_info_util as _source_info
from jax._src.core import NamedAxisEffect as _NamedAxisEffect
from jax._src.core import trace_state_clean as _trace_state_clean
from jax._src.mesh import get_concrete_mesh as _get_concrete_mesh
from jax._src.state.types import AbstractRef
from jax.core import ShapedArray, Tracer
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Primitive, Var
from jax.interpreters import ad, batching, mlir

__all__ = [
    "AbstractRef",
    "Jaxpr",
    "JaxprEqn",
    "Literal",
    "ShapedArray",
    "Tracer",
    "Var",
    "bind",
    "context_mesh",
    "inline_ptx_kernel",
    "is_key",
    "is_tracing",
    "key_implementation",
    "key_paths",
    "linear_primitive",
    "no_context_mesh",
    "scan_parts",
    "source_line",
    "wrap_key",
]


def bind(eqn: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """Apply an equation's primitive to `operands`, in the context that it was traced in.

    The context holds the matmul precision, the PRNG implementation and the name stack.

    Returns:
      The results as a list, also where the primitive has a single one.
    """
    params = eqn.primitive.get_bind_params(eqn.params)
    stack = _source_info.current_name_stack() + eqn.source_info.name_stack
    with _source_info.user_context(eqn.source_info.traceback, name_stack=stack), eqn.ctx.manager:
        out = eqn.primitive.bind(*operands, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def effects_but_axes(eqn: JaxprEqn, axes: Collection[str]) -> set[Any]:
    """Effects of an equation, without those of collectives over these mesh axes."""
    return {e for e in eqn.effects if not (isinstance(e, _NamedAxisEffect) and e.name in axes)}


def avals_of(variables: Sequence[Any]) -> list[Any]:
    """Types of an equation's variables."""
    return [variable.aval for variable in variables]


def inner_jaxpr(eqn: JaxprEqn) -> Jaxpr:
    """Body of a call, remat or scan equation, or the lowered form of a high-level operation."""
    if eqn.primitive.name == "call_hi_primitive":  # JAX 0.12: an operation such as searchsorted
        lowered: Any = eqn.primitive
        return jax.make_jaxpr(lambda *args: lowered.to_lojax(*args, **eqn.params))(
            *avals_of(eqn.invars)
        )
    return eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]


def inner_jaxprs(eqn: JaxprEqn) -> list[Jaxpr]:
    """Jaxprs among an equation's parameters, branches of a cond included."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns"):
                found.append(item)
    return found


def scan_parts(eqn: JaxprEqn, operands: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Split a scan's operands into (constants, initial carry, scanned inputs)."""
    consts, carry, scanned = eqn.params["ft_in"].update(list(operands)).unpack()
    return list(consts), list(carry), list(scanned)


def source_line(eqn: JaxprEqn) -> str:
    """`file:line (function)` of the user's code that made the equation."""
    return _source_info.summarize(eqn.source_info)


def is_key(aval: Any) -> bool:
    """True if a type or array holds PRNG keys, which collectives and arithmetic refuse."""
    return jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key)  # pyright: ignore[reportPrivateImportUsage]


def key_implementation(aval: Any) -> str:
    """Name of the implementation of random keys of this type, such as "threefry2x32"."""
    return aval.dtype._impl.name


def wrap_key(data: Any, aval: Any) -> Any:
    """Random keys of type `aval` from uint32 key data."""
    # `jax.random.key_impl` takes arrays of keys, but not their type.
    return jax.random.wrap_key_data(data, impl=key_implementation(aval))


def key_paths(tree: Any) -> tuple[list[tuple[Any, ...]], list[Any], Any]:
    """Flatten a pytree into (path of every leaf, leaves, structure)."""
    flat, structure = jax.tree_util.tree_flatten_with_path(tree)
    return [path for path, _ in flat], [leaf for _, leaf in flat], structure


def is_partitionable(eqn: JaxprEqn) -> bool:
    """True if an equation was traced with `jax_threefry_partitionable`.

    Its random numbers then do not depend on how arrays are sharded.
    """
    return bool(eqn.ctx.threefry_partitionable)


def linear_primitive(
    name: str, forward: Callable[..., list[Any]], transposed: Callable[..., list[Any]]
) -> Primitive:
    """A primitive for a linear function whose transpose is given, not derived.

    `jax.custom_derivatives.linear_call` does the same, but has no batching rule.

    Args:
      name: the primitive's name.
      forward: elementwise over leading batch axes: `forward(*arrays, **params)` to as many arrays
        of the same types.
      transposed: the transpose of `forward`, of the same signature.

    Returns:
      A primitive to be bound with `is_transposed` (which of the two runs) and the parameters.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True

    def run(*arrays: Any, is_transposed: bool, **params: Any) -> list[Any]:
        return (transposed if is_transposed else forward)(*arrays, **params)

    def transpose(
        cotangents: Sequence[Any], *arrays: Any, is_transposed: bool, **params: Any
    ) -> list[Any]:
        given = [ad.instantiate_zeros(x) for x in cotangents]
        pulled = primitive.bind(*given, is_transposed=not is_transposed, **params)
        moves = [ad.is_undefined_primal(x) for x in arrays]
        return [x if is_moving else None for x, is_moving in zip(pulled, moves, strict=True)]

    def batch(arrays: Sequence[Any], axes: Sequence[Any], **params: Any) -> tuple[list, list]:
        (size,) = {x.shape[a] for x, a in zip(arrays, axes, strict=True) if a is not None}
        front = [batching.bdim_at_front(x, a, size) for x, a in zip(arrays, axes, strict=True)]
        return primitive.bind(*front, **params), [0] * len(arrays)

    primitive.def_impl(run)
    primitive.def_abstract_eval(lambda *avals, **_: list(avals))
    ad.deflinear2(primitive, transpose)
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=True))
    return primitive


def inline_ptx_kernel(
    ptx: str, outputs: Sequence[jax.ShapeDtypeStruct], *, num_blocks: int, block_threads: int
) -> Callable[..., list[Any]]:
    """A GPU kernel of inline PTX, made by Pallas's Mosaic backend: no build step.

    Args:
      ptx: its text. `$0`, `$1`, ... are pointers to the inputs but the last, to the outputs, and to
        the last input.
      outputs: types of the outputs.
      num_blocks: blocks of the grid, `%ctaid.x`.
      block_threads: threads of a block, `%tid.x`; a multiple of 128, a warpgroup.

    Returns:
      A function of the inputs. Its keyword `unread` takes arrays that the kernel is to run after.
    """
    # Imported here: the backend is experimental, and only rings on GPUs use it.
    from jax.experimental.mosaic.gpu import utils
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def call(*inputs: Any, unread: Sequence[Any] = ()) -> list[Any]:
        def body(*refs: Any) -> None:
            read, written = refs[: len(inputs)], refs[len(inputs) + len(unread) :]
            pointed = (*read[:-1], *written, read[-1])

            @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(pointed))
            def run(_: Any, *memory: Any) -> None:
                pointers = [utils.memref_ptr(each) for each in memory]
                # Threads leave the polls at different times and meet at a barrier: convergent.
                utils.inline_ptx(ptx, *pointers, has_side_effects=True, convergent=True)

            run(*pointed)

        kernel = plgpu.kernel(
            body,
            out_type=tuple(outputs),
            grid=(num_blocks,),
            grid_names=("block",),
            num_threads=block_threads // 128,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(
                lowering_semantics=plgpu.LoweringSemantics.Warpgroup
            ),
        )
        return list(kernel(*inputs, *unread))

    return call


def is_tracing() -> bool:
    """True under a trace (jit, grad, vmap)."""
    return not _trace_state_clean()


def context_mesh() -> Any:
    """The mesh of `jax.set_mesh`, under a trace too; None where none is in force."""
    mesh = _get_concrete_mesh()
    return None if mesh.empty else mesh


@contextmanager
def no_context_mesh() -> Iterator[None]:
    """Leave the caller's mesh context for the body; also a decorator of functions."""
    if context_mesh() is None and jax.sharding.get_abstract_mesh().empty:
        yield
    elif is_tracing():  # where `jax.set_mesh` raises
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            yield
    else:
        with jax.set_mesh(None):
            yield


def names_devices(eqn: JaxprEqn) -> bool:
    """True if a nested jit has shardings for its arguments or results."""
    shardings = (*eqn.params.get("in_shardings", ()), *eqn.params.get("out_shardings", ()))
    return any(isinstance(sharding, jax.sharding.Sharding) for sharding in shardings)
