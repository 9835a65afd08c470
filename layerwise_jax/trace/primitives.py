"""Table of JAX primitives: one class per primitive, and the sets that analyses make of classes.

A primitive added to JAX is added here, once. Analyses ask for classes (`names_of`), so that FLOPs,
layer search, batch rules and optimizer cuts agree on it. `tests/trace/test_primitives.py` holds the
table against the primitives of the oldest and the newest supported JAX.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class PrimitiveClass(StrEnum):
    """Class of a primitive. Every primitive has exactly one."""

    LINEAR = "entry by entry, linear in all array operands together"
    PRODUCT = "entry by entry, linear in each operand (mul) or in the first (div)"
    NONLINEAR = "entry by entry, any other function"
    IDENTITY = "the operand's own values, perhaps rounded"
    CONVERT = "the operand in another dtype"
    BITCAST = "the operand's bits as another dtype"
    SELECT = "entry by entry, one of several operands"
    PLACEMENT = "the operand's own values on other devices or in another layout"
    BARRIER = "operands tied together, values unchanged"
    SHAPE = "the operand's entries in another shape or order"
    CREATION = "an array made from its shape only"
    REDUCTION = "some axes reduced to one entry each"
    WINDOW = "windows reduced to one entry each"
    CUMULATIVE = "running reduction along one axis"
    SORT = "entries ordered along one axis"
    CONTRACTION = "sums of products over a shared axis"
    ATTENTION = "attention by a library, (examples, length, heads, width)"
    GATHER = "slices read at positions given by an operand"
    SCATTER = "slices written at positions given by an operand"
    MATRIX = "linear algebra over the last two axes, by a library"
    FFT = "Fourier transform over the last axes"
    KEY_CAST = "random keys as their data, or back"
    KEY_MAP = "random keys or samples made key by key or entry by entry"
    DRAW = "random numbers whose values depend on the shape drawn"
    CALL = "one jaxpr run on the operands"
    REMAT = "one jaxpr under jax.checkpoint"
    CUSTOM_RULE = "one jaxpr with its own derivative or batching rule"
    HIGH_LEVEL = "one operation that JAX 0.12 lowers to a jaxpr on demand"
    LOOP = "a jaxpr run many times"
    BRANCH = "one of several jaxprs"
    SHARD = "one jaxpr run on each device's shard"
    KERNEL = "code that is no jaxpr"
    CALLBACK = "Python code on the host"
    MOVING_COLLECTIVE = "values moved between devices"
    REDUCING_COLLECTIVE = "values reduced over devices"
    REFERENCE = "mutable arrays: made, read, written, freed"
    UNKNOWN = "nothing is assumed"


_C = PrimitiveClass
_NAMES: dict[PrimitiveClass, str] = {
    _C.LINEAR: "add add_any imag neg real sub zeros_like",
    _C.PRODUCT: "div mul",
    _C.NONLINEAR: """
        abs acos acosh and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz
        complex conj cos cosh digamma eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma
        igamma_grad_a igammac integer_pow is_finite le le_to lgamma log log1p log2 logistic lt lt_to
        max min mulhi ne nextafter not one_minus_square or polygamma polynomial population_count
        pow regularized_incomplete_beta rem round rsqrt shift_left shift_right_arithmetic
        shift_right_logical sign sin sinh sqrt square tan tanh xor zeta
    """,
    _C.IDENTITY: "copy copy_p name pvary reduce_precision stop_gradient",
    _C.CONVERT: "convert_element_type",
    _C.BITCAST: "bitcast_convert_type",
    _C.SELECT: "select_n",
    _C.PLACEMENT: """
        device_put layout_constraint relayout reshard sharding_constraint
        with_memory_space_constraint
    """,
    _C.BARRIER: "optimization_barrier",
    _C.SHAPE: """
        broadcast_in_dim broadcast_to concatenate expand_dims pad reshape rev slice split squeeze
        stack tile transpose unstack
    """,
    _C.CREATION: "empty empty2 iota iota_2x32_shape",
    _C.REDUCTION: """
        argmax argmin reduce reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum
        reduce_xor
    """,
    _C.WINDOW: """
        reduce_window reduce_window_max reduce_window_min reduce_window_sum select_and_gather_add
        select_and_scatter select_and_scatter_add
    """,
    _C.CUMULATIVE: "cumlogsumexp cummax cummin cumprod cumsum",
    _C.SORT: "approx_top_k sort top_k",
    _C.CONTRACTION: """
        conv_general_dilated dot_general ragged_dot_general scaled_dot scaled_matmul
        scaled_matmul_wrapper
    """,
    _C.ATTENTION: """
        dot_product_attention_bwd dot_product_attention_bwd_wrapper dot_product_attention_fp8_bwd
        dot_product_attention_fp8_bwd_wrapper dot_product_attention_fp8_fwd
        dot_product_attention_fp8_fwd_wrapper dot_product_attention_fwd
        dot_product_attention_fwd_wrapper
    """,
    _C.GATHER: "dynamic_slice gather",
    _C.SCATTER: """
        dynamic_update_slice scatter scatter-add scatter-max scatter-min scatter-mul scatter-sub
    """,
    _C.MATRIX: """
        cholesky cholesky_update eig eigh geqp3 geqrf hessenberg householder_product lu
        lu_pivots_to_permutation ormqr qr schur svd symmetric_product triangular_solve tridiagonal
        tridiagonal_solve
    """,
    _C.FFT: "fft",
    _C.KEY_CAST: "from_edtype random_unwrap random_wrap to_edtype",
    _C.KEY_MAP: """
        philox2x32 philox4x32 random_clone random_fold_in random_gamma random_gamma_grad random_seed
        threefry2x32 threefry4x32
    """,
    _C.DRAW: "random_bits random_split rng_bit_generator rng_uniform",
    _C.CALL: "closed_call core_call jit pjit",
    _C.REMAT: "checkpoint remat remat2",
    _C.CUSTOM_RULE: "custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr",
    _C.HIGH_LEVEL: "call_hi_primitive",
    _C.LOOP: "scan while",
    _C.BRANCH: "cond",
    _C.SHARD: "shard_map",
    _C.KERNEL: "cudnn_fusion custom_call ffi_call mpmd_map pallas_call",
    _C.CALLBACK: "buffer_callback debug_callback debug_print io_callback pure_callback",
    _C.MOVING_COLLECTIVE: """
        all_gather all_gather_done all_gather_invariant all_gather_reduced all_gather_reduced_start
        all_gather_start all_to_all all_to_all_done all_to_all_start axis_index pbroadcast
        pbroadcast_dynamic ppermute ppermute_done ppermute_start precv psend ragged_all_to_all
    """,
    _C.REDUCING_COLLECTIVE: """
        pmax pmin psum psum_done psum_invariant psum_invariant_start reduce_scatter
        reduce_scatter_done reduce_scatter_start unreduced_pmax unreduced_pmin unreduced_psum
        unreduced_reduce_scatter
    """,
    _C.REFERENCE: """
        accum_grad_in_ref addupdate empty_ref free_ref freeze get new_ref pin run_state swap unpin
    """,
    _C.UNKNOWN: """
        after_all call_exported call_hi_primitive_linearized check composite compute_on
        create_linear create_token custom_jvp_call_jaxpr custom_lin custom_linear_solve
        custom_partitioning custom_vmap_call dce_sink dim_as_value dimension_size eval_jaxpr
        inspect_sharding linear_call platform_index preduced program_order reduced_vary_cast
        reduced_vary_cast_p remat_opt shape_assertion stage tie unreachable vary_unreduced_cast
        vary_unreduced_cast_p xla_metadata_call xla_metadata_value
    """,
}

CLASS_OF: Mapping[str, PrimitiveClass] = {
    name: each for each, names in _NAMES.items() for name in names.split()
}
"""Class of every primitive of the table, by the primitive's name."""


def names_of(*classes: PrimitiveClass) -> frozenset[str]:
    """Names of the primitives of any of these classes."""
    return frozenset(name for name, each in CLASS_OF.items() if each in classes)


CALLS = names_of(_C.CALL)
REMATS = names_of(_C.REMAT)
CUSTOM_RULES = names_of(_C.CUSTOM_RULE)
CALL_LIKE = names_of(_C.CALL, _C.REMAT, _C.CUSTOM_RULE, _C.HIGH_LEVEL)
"""Primitives whose values are those of one inner jaxpr applied to the operands."""

ENTRYWISE = names_of(
    _C.LINEAR, _C.PRODUCT, _C.NONLINEAR, _C.IDENTITY, _C.CONVERT, _C.SELECT, _C.BITCAST
)
"""Primitives whose result at an entry depends only on that entry of the operands."""

MATRIX_PRODUCTS = names_of(_C.CONTRACTION, _C.ATTENTION)

REDUCTIONS = names_of(_C.REDUCTION, _C.WINDOW, _C.CUMULATIVE)
"""Primitives that read whole arrays and do one operation an entry."""

EXPENSIVE = MATRIX_PRODUCTS | names_of(
    _C.SORT, _C.MATRIX, _C.FFT, _C.LOOP, _C.BRANCH, _C.CUSTOM_RULE, _C.KERNEL, _C.CALLBACK
)
"""Primitives too costly to be recomputed in every stage that needs their result."""

LAYER_STARTS = (
    MATRIX_PRODUCTS
    | names_of(_C.KERNEL)
    | {"gather", "scan", "custom_vjp_call"}  # embeddings, stacked layers, kernels with a rule
)
"""Primitives with which a module begins anew when it is used a second time."""

XLA_KERNELS = LAYER_STARTS | REDUCTIONS | names_of(_C.GATHER, _C.SCATTER)
"""Primitives that XLA makes kernels of; the others are fused into them."""

MOVES = names_of(
    _C.IDENTITY,
    _C.CONVERT,
    _C.BITCAST,
    _C.SELECT,
    _C.PLACEMENT,
    _C.BARRIER,
    _C.SHAPE,
    _C.CREATION,
    _C.KEY_CAST,
    _C.MOVING_COLLECTIVE,
)
"""Primitives that compute nothing and that XLA fuses into whatever reads them."""

LIBRARY_CALLS = names_of(_C.KERNEL, _C.CALLBACK, _C.MATRIX, _C.FFT, _C.ATTENTION) | {
    "custom_linear_solve"
}
"""Primitives whose work is decided by a library, or by code that is no jaxpr."""
