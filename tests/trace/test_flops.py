"""Work is counted by hand-countable formulas, loops as often as they turn, and what is not counted
is named.
"""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from layerwise_jax.trace.flops import Work, count_work


def work(fn, *shapes, dtype=jnp.float32) -> Work:
    return count_work(
        jax.jit(fn).trace(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)).jaxpr
    )


def test_a_product():
    assert work(jnp.matmul, (8, 64), (64, 32)) == Work(
        2 * 8 * 64 * 32, 4 * (8 * 64 + 64 * 32 + 8 * 32)
    )


def test_a_batched_product():
    assert work(jnp.matmul, (5, 8, 64), (5, 64, 32)).flops == 5 * 2 * 8 * 64 * 32


@pytest.mark.parametrize("groups", [1, 4])
def test_a_convolution(groups):
    def convolve(kernel, x):
        return lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    kernel = (3, 3, 16 // groups, 32)
    assert work(convolve, kernel, (2, 10, 10, 16)).flops == 2 * (2 * 10 * 10 * 32) * (
        3 * 3 * 16 // groups
    )


def test_a_transposed_convolution_is_not_charged_for_its_zeros():
    def upsample(kernel, x):
        return lax.conv_transpose(x, kernel, (2, 2), "SAME")

    assert (
        work(upsample, (2, 2, 16, 8), (1, 10, 10, 16)).flops == 2 * (20 * 20 * 8) * (2 * 2 * 16) / 4
    )


def test_rows_in_groups_meet_one_matrix_each():
    def experts(x, weights):
        return lax.ragged_dot(x, weights, jnp.array([10, 20, 30, 4], jnp.int32))

    assert work(experts, (64, 32), (4, 32, 16)).flops == 2 * 64 * 32 * 16


@pytest.mark.parametrize("order", [jnp.sort, lambda x: lax.top_k(x, 2)[0]])
def test_ordering_compares_as_often_as_a_sort(order):
    ordered = work(order, (3, 16))
    assert ordered.flops == 3 * 16 * 4
    assert ordered.bytes_accessed >= 3 * 16 * 4


def test_a_scan_counts_every_turn():
    def layers(weights, x):
        return lax.scan(lambda h, w: (h @ w, None), x, weights)[0]

    assert work(layers, (7, 64, 64), (8, 64)).flops == 7 * 2 * 8 * 64 * 64


def test_a_static_loop_counts_every_turn():
    assert (
        work(lambda x: lax.fori_loop(0, 5, lambda _, y: y @ y, x), (16, 16)).flops >= 5 * 2 * 16**3
    )


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    found = work(lambda x: lax.while_loop(lambda y: y.sum() < 1, lambda y: y @ y, x), (16, 16))
    assert 2 * 16**3 <= found.flops < 2 * 2 * 16**3
    assert found.uncounted == ("while",)


def test_a_cond_counts_its_larger_branch():
    found = work(lambda x: lax.cond(x[0, 0] > 0, lambda y: y @ y, lambda y: y + 1, x), (16, 16))
    assert 2 * 16**3 <= found.flops < 2 * 16**3 + 16**2


def test_calls_of_every_kind_are_entered():
    @jax.custom_vjp
    def square(x):
        return x @ x

    square.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x,))
    for wrapped in (jax.jit(square), jax.checkpoint(square), square):
        assert work(wrapped, (16, 16)).flops == 2 * 16**3


def test_a_backward_pass_is_three_products_and_what_is_dead_is_not_counted():
    def loss(weights, x):
        return ((x @ weights) ** 2).sum()

    products = work(jax.grad(loss, argnums=(0, 1)), (64, 32), (8, 64)).flops // (2 * 8 * 64 * 32)
    assert products == 3
    assert (
        work(jax.grad(lambda w, x: (x @ w).sum()), (64, 32), (8, 64)).flops // (2 * 8 * 64 * 32)
        == 1
    )


def test_a_lookup_reads_rows_not_the_table():
    found = count_work(
        jax.jit(lambda table, rows: table[rows])
        .trace(
            jax.ShapeDtypeStruct((50_000, 64), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.int32)
        )
        .jaxpr
    )
    assert found.bytes_accessed < 100 * 64 * 4


def test_a_table_that_is_also_multiplied_by_is_read_whole():
    found = work(lambda table: table[:8] @ table.T, (50_000, 64))
    assert found.bytes_accessed >= 50_000 * 64 * 4


def test_library_calls_are_named():
    assert "cholesky" in work(jnp.linalg.cholesky, (8, 8)).uncounted


def test_work_adds_repeats_and_takes_the_larger():
    a, b = Work(1, 20, ("fft",)), Work(3, 4, ("fft", "lu"))
    assert a + b == Work(4, 24, ("fft", "lu"))
    assert a * 3 == Work(3, 60, ("fft",))
    assert a | b == Work(3, 20, ("fft", "lu"))
