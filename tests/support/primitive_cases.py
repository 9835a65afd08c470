"""For every primitive with a batch rule: operations that JAX traces to it, on small operands.

The axis of the examples (`B`) stands at every place where the primitive can have it, also where its
rule must refuse.
"""

from collections.abc import Callable, Iterable
from itertools import permutations
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from tests.support.rule_check import B, Case, Operand, operand

IMPLEMENTATIONS = ("threefry2x32", "rbg", "unsafe_rbg")

Function = Callable[..., Any]


def case(fn: Function, *operands: Operand, tolerance: float = 2e-5) -> Case:
    return Case(fn, operands, tolerance)


def each_axis(fn: Function, *shape: int, **options: Any) -> list[Case]:
    """One operand, the examples along each of its axes in turn."""
    orders = sorted(set(permutations((B, *shape))))
    return [case(fn, operand(*order, **options)) for order in orders]


def unary(fn: Function, **options: Any) -> list[Case]:
    return [*each_axis(fn, 3, **options), case(fn, operand(2, **options))]


def binary(fn: Function, **options: Any) -> list[Case]:
    return [
        case(fn, operand(B, 3, **options), operand(B, 3, **options)),
        case(fn, operand(3, B, **options), operand(3, B, **options)),
        case(fn, operand(2, **options), operand(2, **options)),
    ]


INTEGERS = {"dtype": jnp.int32, "low": 1, "high": 9}
BYTES = {"dtype": jnp.int8, "low": 1, "high": 100}
BOOLS = {"dtype": jnp.bool_}
HALF = {"dtype": jnp.bfloat16}

FLOAT_UNARY = """
abs acos acosh asin asinh atan atanh bessel_i0e bessel_i1e cbrt ceil cos cosh digamma erf erf_inv
erfc exp exp2 expm1 floor is_finite lgamma log log1p log2 logistic neg round rsqrt sign sin sinh
sqrt square tan tanh stop_gradient
""".split()
FLOAT_BINARY = """
add sub mul div max min pow atan2 nextafter rem igamma igammac igamma_grad_a
complex eq ge gt le lt ne
""".split()
INT_BINARY = {
    "shift_left": lax.shift_left,
    "shift_right_arithmetic": lax.shift_right_arithmetic,
    "shift_right_logical": lax.shift_right_logical,
    "mulhi": lambda x, y: lax.mulhi(x, y),
    "xor": lax.bitwise_xor,
}


def add_any(x: jax.Array) -> jax.Array:
    """A value of two uses, whose cotangents add up."""
    return jax.vjp(lambda y: y * jnp.sin(y), x)[1](x)[0]


def elementwise() -> dict[str, list[Case]]:
    found: dict[str, list[Case]] = {n: unary(getattr(lax, n)) for n in FLOAT_UNARY}
    found |= {n: binary(getattr(lax, n)) for n in FLOAT_BINARY}
    found |= {n: binary(fn, **INTEGERS) for n, fn in INT_BINARY.items()}
    for name in ("add", "sub", "mul", "max", "eq", "lt"):
        found[name] += binary(getattr(lax, name), **INTEGERS)
    for name in ("add", "mul", "div"):
        found[name] += binary_with(getattr(lax, name), 0.05, **HALF)
    found["div"] += binary(lax.div, **INTEGERS)
    both_logical = {"and": lax.bitwise_and, "or": lax.bitwise_or}
    found |= {n: binary(fn, **BOOLS) + binary(fn, **INTEGERS) for n, fn in both_logical.items()}
    found |= {
        "not": unary(lax.bitwise_not, **BOOLS) + unary(lax.bitwise_not, **INTEGERS),
        "clz": unary(lax.clz, **INTEGERS),
        "population_count": unary(lax.population_count, **INTEGERS),
        "integer_pow": unary(lambda x: x**3),
        "one_minus_square": unary(lambda x: getattr(lax, "one_minus_square", lax.square)(x)),
        "polygamma": binary(lax.polygamma, low=1, high=3),
        "zeta": binary(lax.zeta, low=1.5, high=3),
        "regularized_incomplete_beta": [
            case(lax.betainc, *(operand(B, 3) for _ in range(3))),
            case(lax.betainc, *(operand(3, B) for _ in range(3))),
        ],
        "clamp": [
            case(lambda x: lax.clamp(0.3, x, 0.6), operand(B, 3)),
            case(lax.clamp, *(operand(3, B) for _ in range(3))),
        ],
        "conj": unary(lambda x: jnp.abs(lax.conj(lax.complex(x, x)))),
        "real": unary(lambda x: lax.real(lax.complex(x, x))),
        "imag": unary(lambda x: lax.imag(lax.complex(x, x))),
        "bitcast_convert_type": [
            *unary(lambda x: lax.bitcast_convert_type(x, jnp.int32)),
            *each_axis(
                lambda x: lax.bitcast_convert_type(x, jnp.uint8), 2, dtype=jnp.int32, high=99
            ),
            case(lambda x: lax.bitcast_convert_type(x, jnp.int32), operand(B, 4, **BYTES)),
        ],
        "convert_element_type": [
            *unary(lambda x: x.astype(jnp.bfloat16)),
            *unary(lambda x: (x * 9).astype(jnp.int32)),
            *unary(lambda x: x.astype(jnp.float32), **INTEGERS),
            *unary(lambda x: x.astype(jnp.int8), **INTEGERS),
            *unary(lambda x: x.astype(jnp.float32), **BOOLS),
            *unary(lambda x: x.astype(jnp.float8_e4m3fn).astype(jnp.float32)),
        ],
        "reduce_precision": unary(lambda x: lax.reduce_precision(x, 8, 10)),
        "select_n": [
            case(lax.select, operand(B, 3, **BOOLS), operand(B, 3), operand(B, 3)),
            case(lax.select, operand(3, B, **BOOLS), operand(3, B), operand(3, B)),
            case(lax.select, operand(**BOOLS), operand(3, B), operand(3, B)),
            case(lax.select, operand(2, **BOOLS), operand(2), operand(2)),
        ],
        "add_any": unary(add_any),
        "copy": unary(jnp.copy),
        "name": unary(lambda x: checkpoint_name(x, "kept")),
        "optimization_barrier": [
            case(lambda x, y: lax.optimization_barrier((x, y)), operand(B, 3), operand(2)),
        ],
        "device_put": unary(jax.device_put),
    }
    found["reduce_precision"] = [Case(c.fn, c.operands, 0.01) for c in found["reduce_precision"]]
    found["convert_element_type"] = [
        Case(c.fn, c.operands, 0.01) for c in found["convert_element_type"]
    ]
    return found


def binary_with(fn: Function, tolerance: float, **options: Any) -> list[Case]:
    return [Case(c.fn, c.operands, tolerance) for c in binary(fn, **options)]


def reductions() -> dict[str, list[Case]]:
    of_axis: dict[str, tuple[Function, dict[str, Any]]] = {
        "reduce_sum": (jnp.sum, {}),
        "reduce_max": (jnp.max, {}),
        "reduce_min": (jnp.min, {}),
        "reduce_prod": (jnp.prod, {}),
        "reduce_and": (jnp.all, BOOLS),
        "reduce_or": (jnp.any, BOOLS),
        "argmax": (jnp.argmax, {}),
        "argmin": (jnp.argmin, {}),
        "cumsum": (lambda x, axis: lax.cumsum(x, axis), {}),
        "cummax": (lambda x, axis: lax.cummax(x, axis), {}),
        "cummin": (lambda x, axis: lax.cummin(x, axis), {}),
        "cumprod": (lambda x, axis: lax.cumprod(x, axis), {}),
        "cumlogsumexp": (lambda x, axis: lax.cumlogsumexp(x, axis), {}),
        "rev": (lambda x, axis: lax.rev(x, (axis,)), {}),
        "sort": (lambda x, axis: lax.sort(x, axis), {}),
        "unstack": (lambda x, axis: jnp.unstack(x, axis=axis), {}),
    }
    found = {
        name: [
            c
            for axis in (0, 1, 2)
            for c in each_axis(lambda x, fn=fn, axis=axis: fn(x, axis=axis), 2, 3, **options)
        ]
        for name, (fn, options) in of_axis.items()
    }
    xor = lambda x, axes: lax.reduce(x, 0, lax.bitwise_xor, axes)  # noqa: E731
    found["reduce_xor"] = [
        c for axis in (0, 1) for c in each_axis(lambda x, axis=axis: xor(x, (axis,)), 3, **INTEGERS)
    ]
    found["reduce_sum"] += each_axis(jnp.sum, 2, 0) + each_axis(jnp.sum, 3, **INTEGERS)
    found["reduce_max"] += each_axis(jnp.max, 3, **INTEGERS)
    return found


def moves() -> dict[str, list[Case]]:
    return {
        "broadcast_in_dim": [
            *each_axis(lambda x: lax.broadcast_in_dim(x, (2, *x.shape), (1, 2)), 3),
            *each_axis(lambda x: lax.broadcast_in_dim(x, (*x.shape, 2), (0, 1)), 3, **BOOLS),
        ],
        "transpose": [
            c
            for order in permutations(range(3))
            for c in each_axis(lambda x, order=order: lax.transpose(x, order), 2, 3)
        ],
        "squeeze": [
            *each_axis(lambda x: jnp.squeeze(x[..., None], -1), 3),
            *each_axis(lambda x: lax.squeeze(x, [x.shape.index(1)]), 1, 3),
        ],
        "reshape": [
            *each_axis(lambda x: x.reshape(-1), 2, 3),
            *each_axis(lambda x: x.reshape(x.shape[0], -1), 2, 3),
            *each_axis(lambda x: x.reshape(-1, x.shape[-1]), 2, 3),
            *each_axis(lambda x: x.reshape(-1, 2), 2, 3),
            *each_axis(lambda x: lax.reshape(x, (x.size,), (2, 1, 0)), 2, 3),
            *each_axis(
                lambda x: lax.reshape(x, (x.shape[1], x.size // x.shape[1]), (1, 0, 2)), 2, 3
            ),
            *each_axis(lambda x: x.reshape(-1), 2, 0),
        ],
        "slice": [
            *each_axis(lambda x: x[:, 1:], 3),
            *each_axis(lambda x: x[1:], 3),
            *each_axis(lambda x: x[:, ::2], 3),
        ],
        "split": each_axis(lambda x: lax.split(x, (1, 2), 1) if x.shape[1] == 3 else [x], 3),
        "concatenate": [
            case(lambda x, y: jnp.concatenate([x, y], 1), operand(B, 3), operand(B, 2)),
            case(lambda x, y: jnp.concatenate([x, y], 0), operand(B, 3), operand(B, 3)),
            case(lambda x, y: jnp.concatenate([x, y], 0), operand(2), operand(3)),
        ],
        "stack": [
            case(lambda x, y, a=a: jnp.stack([x, y], a), operand(*s), operand(*s))
            for a in (0, 1, 2)
            for s in ((B, 3), (3, B))
        ],
        "tile": [
            *each_axis(lambda x: jnp.tile(x, (1, 2)), 3),
            *each_axis(lambda x: jnp.tile(x, (2, 1)), 3),
            case(lambda x, y: jnp.tile(x, (len(y), 1)), operand(1, 3), operand(B)),
            case(lambda x, y: jnp.tile(x, (len(y), 1)), operand(2, 3), operand(B)),
            case(lambda x, y: jnp.tile(x, (1, len(y))), operand(2, 3), operand(B)),
        ],
        "pad": [
            *each_axis(lambda x: jnp.pad(x, ((0, 0), (1, 2))), 3),
            *each_axis(lambda x: lax.pad(x, 0.5, ((0, 0, 0), (1, 0, 1))), 3),
        ],
        "top_k": each_axis(lambda x: lax.top_k(x, min(2, x.shape[-1])), 3),
        "approx_top_k": each_axis(lambda x: lax.approx_max_k(x, min(2, x.shape[-1])), 3),
    }


def windows() -> dict[str, list[Case]]:
    def window(fn: Function, start: Any, sizes: tuple[int, ...], **options: Any) -> list[Case]:
        def run(x: jax.Array) -> jax.Array:
            return lax.reduce_window(x, start, fn, sizes, (1,) * 2, "SAME")

        return each_axis(run, 3, **options)

    both = [(1, 2), (2, 1)]

    def pooled(x: jax.Array) -> jax.Array:
        """The gradient of max pooling."""
        pool = lambda y: lax.reduce_window(y, -jnp.inf, lax.max, (1, 2), (1, 1), "SAME")  # noqa: E731
        return jax.grad(lambda y: jnp.sum(pool(y) ** 2))(x)

    def tangent(x: jax.Array) -> jax.Array:
        pool = lambda y: lax.reduce_window(y, -jnp.inf, lax.max, (1, 2), (1, 1), "SAME")  # noqa: E731
        return jax.jvp(pool, (x,), (x,))[1]

    return {
        "reduce_window_sum": [c for s in both for c in window(lax.add, 0.0, s)],
        "reduce_window_max": [c for s in both for c in window(lax.max, -jnp.inf, s)],
        "reduce_window_min": [c for s in both for c in window(lax.min, jnp.inf, s)],
        "reduce_window": [c for s in both for c in window(lambda a, b: a * b, 1.0, s)],
        "select_and_scatter_add": each_axis(pooled, 3),
        "select_and_gather_add": each_axis(tangent, 3),
    }


def linear_algebra() -> dict[str, list[Case]]:
    def square(fn: Function, **options: Any) -> list[Case]:
        def run(x: jax.Array) -> Any:
            return fn(jnp.einsum("bij,bkj->bik", x, x) + jnp.eye(3))

        return [case(run, operand(B, 3, 3), **options)]

    linalg = jnp.linalg
    return {
        "cholesky": square(linalg.cholesky),
        "eigh": square(lambda x: linalg.eigh(x)[0]),
        "eig": square(lambda x: jnp.sort(jnp.real(linalg.eigvals(x)), -1), tolerance=1e-3),
        "lu": square(lambda x: jax.lax.linalg.lu(x)[0]),
        "qr": square(lambda x: linalg.qr(x)[1], tolerance=1e-4),
        "schur": square(lambda x: jnp.abs(jax.lax.linalg.schur(x)[0]), tolerance=1e-3),
        "svd": square(lambda x: linalg.svd(x, compute_uv=False), tolerance=1e-4),
        "triangular_solve": [
            case(
                lambda a, b: lax.linalg.triangular_solve(
                    jnp.tril(a) + jnp.eye(3), b, left_side=True
                ),
                operand(B, 3, 3),
                operand(B, 3, 2),
            )
        ],
        "tridiagonal_solve": [
            case(
                lambda a, b: lax.linalg.tridiagonal_solve(a, a + 2, a, b),
                operand(B, 3),
                operand(B, 3, 2),
            )
        ],
        "householder_product": [
            case(lax.linalg.householder_product, operand(B, 3, 3), operand(B, 3))
        ],
        "fft": [
            *each_axis(lambda x: jnp.abs(jnp.fft.fft(x)), 4),
            *each_axis(lambda x: jnp.fft.irfft2(jnp.fft.rfft2(x)), 2, 4),
        ],
    }


def contractions() -> dict[str, list[Case]]:
    pairs = ["bi,ij->bj", "ib,ij->bj", "bi,bj->bij", "bi,bi->b", "bi,bj->ij", "bi,ci->bc"]
    shapes = {"b": B, "i": 2, "j": 3, "c": B}

    def dot(spec: str) -> Case:
        left, right = spec.split("->")[0].split(",")
        return case(
            lambda x, y: jnp.einsum(spec, x, y),
            operand(*(shapes[n] for n in left)),
            operand(*(shapes[n] for n in right)),
        )

    def convolve(groups: int = 1, spec: Any = ("NWC", "WIO", "NWC")) -> Function:
        return lambda x, k: lax.conv_general_dilated(
            x, k, (1,), "SAME", dimension_numbers=spec, feature_group_count=groups
        )

    each = jax.vmap(lambda x, k: convolve()(x[None], k)[0])
    grouped = jax.vmap(lambda x, k: convolve(2)(x[None], k)[0])
    gradient = jax.vmap(jax.grad(lambda k, x: jnp.sum(convolve()(x[None], k) ** 2)))
    return {
        "dot_general": [dot(spec) for spec in pairs]
        + [case(lambda x, y: x @ y, operand(2, 3), operand(3, 2))],
        "conv_general_dilated": [
            case(convolve(), operand(B, 4, 2), operand(3, 2, 5)),
            case(convolve(2), operand(B, 4, 2), operand(3, 1, 4)),
            case(convolve(), operand(2, 4, 3), operand(3, 3, B)),
            case(convolve(), operand(2, B, 3), operand(3, 3, 2)),
            case(convolve(), operand(2, 4, B), operand(3, B, 2)),
            case(convolve(spec=("WCN", "WIO", "WCN")), operand(4, 2, B), operand(3, 2, 5)),
            case(each, operand(B, 4, 2), operand(B, 3, 2, 5)),
            case(grouped, operand(B, 4, 2), operand(B, 3, 1, 4)),
            case(gradient, operand(B, 3, 2, 5), operand(B, 4, 2), tolerance=1e-4),
        ],
    }


def sorted_back(x: jax.Array, key: jax.Array) -> jax.Array:
    order = jnp.argsort(key)
    return jnp.tanh(x[order])[jnp.argsort(order)]


def indexing() -> dict[str, list[Case]]:
    labels = operand(B, dtype=jnp.int32, low=0, high=2)
    places = operand(dtype=jnp.int32, low=0, high=1)
    found = {
        "gather": [
            case(lambda x, i: x[jnp.arange(len(x)), i], operand(B, 3), labels),
            case(jax.vmap(lambda x, i: x[i]), operand(B, 3), labels),
            case(lambda x, i: x[i], operand(3, 2), labels),
            case(lambda x, i: x[i], operand(B, 2), labels),
            case(
                lambda x, i: jnp.take_along_axis(x, i, 1),
                operand(B, 3),
                operand(B, 2, dtype=jnp.int32, low=0, high=2),
            ),
            case(lambda x: x[:, jnp.array([2, 0])], operand(B, 3)),
            case(lambda x: x[jnp.array([1, 0])], operand(2, B)),
            case(
                lambda x, i: x[jnp.argsort(i)][jnp.argsort(jnp.argsort(i))],
                operand(B, 3),
                operand(B),
            ),
        ],
        "dynamic_slice": [
            *[case(lambda x, i: lax.dynamic_slice_in_dim(x, i, 2, 1), operand(B, 3), places)],
            case(lambda x, i: lax.dynamic_slice_in_dim(x, i, 1, 0), operand(B, 3), places),
            case(lambda x, i: lax.dynamic_slice_in_dim(x, i, 2, 0), operand(3, B), places),
        ],
        "dynamic_update_slice": [
            case(
                lambda x, y, i: lax.dynamic_update_slice_in_dim(x, y, i, 1),
                operand(B, 3),
                operand(B, 2),
                places,
            ),
            case(
                lambda x, y, i: lax.dynamic_update_slice_in_dim(x, y, i, 0),
                operand(B, 3),
                operand(1, 3),
                places,
            ),
        ],
    }
    two_labels = operand(2, dtype=jnp.int32, low=0, high=2)
    methods = ["set", "add", "mul", "min", "max", "subtract"]
    names = ["scatter", "scatter-add", "scatter-mul", "scatter-min", "scatter-max", "scatter-sub"]
    for name, method in zip(names, methods, strict=True):

        def write(x: Any, i: Any, y: Any, method: str = method) -> Any:
            return getattr(x.at[jnp.arange(len(x)), i], method)(y)

        def write_mapped(x: Any, i: Any, y: Any, method: str = method) -> Any:
            return jax.vmap(lambda x, i, y: getattr(x.at[i], method)(y))(x, i, y)

        def into_one(x: Any, i: Any, y: Any, method: str = method) -> Any:
            return getattr(x.at[i], method)(y)

        found[name] = [
            case(write, operand(B, 3), labels, operand(B)),
            case(write_mapped, operand(B, 3), labels, operand(B)),
            case(into_one, operand(3), labels, operand(B)),
            case(into_one, operand(3, B), two_labels, operand(2, B)),
            case(into_one, operand(B), labels, operand(B)),
        ]
    return found


def draws() -> dict[str, list[Case]]:
    def keyed(fn: Function, *shape: int) -> list[Case]:
        return [case(fn, operand(*shape, dtype=name)) for name in IMPLEMENTATIONS]

    def shaped(fn: Function) -> list[Case]:
        return [
            case(lambda key, x: fn(key, x), operand(dtype=name), operand(*shape))
            for name in IMPLEMENTATIONS
            for shape in ((B, 3), (3, B))
        ]

    data = operand(B, dtype=jnp.int32, low=0, high=99)
    normal = jax.vmap(lambda key: jax.random.normal(key, (3,)))
    return {
        "iota": [
            case(lambda x: x + lax.broadcasted_iota(jnp.float32, x.shape, 0), operand(B, 3)),
            case(lambda x: x + lax.broadcasted_iota(jnp.float32, x.shape, 1), operand(B, 3)),
            case(lambda x: x + lax.broadcasted_iota(jnp.float32, x.shape, 1), operand(3, B)),
        ],
        "random_bits": keyed(normal, B)
        + shaped(lambda key, x: x + jax.random.normal(key, x.shape)),
        "random_split": keyed(jax.vmap(jax.random.split), B)
        + shaped(lambda key, x: jax.random.split(key, len(x))),
        "random_fold_in": [
            case(jax.vmap(jax.random.fold_in), operand(B, dtype=name), data)
            for name in IMPLEMENTATIONS
        ]
        + [
            case(jax.vmap(jax.random.fold_in, (None, 0)), operand(dtype=name), data)
            for name in IMPLEMENTATIONS
        ],
        "random_gamma": keyed(jax.vmap(lambda key: jax.random.gamma(key, 2.0, (3,))), B)
        + shaped(lambda key, x: jax.random.gamma(key, x + 1)),
        "random_seed": [case(jax.vmap(lambda i: jax.random.key(i)), data)],
        "random_wrap": [
            case(lambda x: jax.random.wrap_key_data(x), operand(B, 2, dtype=jnp.uint32, high=99))
        ],
        "random_unwrap": keyed(jax.random.key_data, B, 2) + keyed(jax.random.key_data, 2, B),
        "random_clone": keyed(jax.random.clone, B, 2),
    }


@jax.custom_vjp
def halve_backward(x: jax.Array, weight: jax.Array) -> jax.Array:
    """A product whose gradients are halved."""
    return x * weight


halve_backward.defvjp(
    lambda x, weight: (x * weight, (x, weight)),
    lambda kept, g: (g * kept[1] / 2, jnp.sum(g * kept[0], 0) / 2),
)


@jax.custom_batching.custom_vmap
def doubled(x: jax.Array) -> jax.Array:
    return x * 2


@doubled.def_vmap
def _(size: int, is_batched: Any, x: jax.Array) -> Any:
    del size
    return doubled(x), is_batched[0]


def bodies() -> dict[str, list[Case]]:
    def recur(x: jax.Array) -> Any:
        start = jnp.zeros_like(x[:, 0])
        return lax.scan(lambda h, y: (jnp.tanh(h + y), h), start, jnp.swapaxes(x, 0, 1))

    def until_small(x: jax.Array) -> jax.Array:
        return lax.while_loop(lambda y: jnp.max(y) > 0.2, lambda y: y / 2, x)

    def branch(x: jax.Array, flag: jax.Array) -> jax.Array:
        return lax.cond(flag, jnp.sin, lambda y: y * 0, x)

    def matrices(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.linalg.solve(jnp.einsum("bij,bkj->bik", x, x) + jnp.eye(3), y)

    def kernel(x: jax.Array) -> jax.Array:
        def run(a: Any, out: Any) -> None:
            out[...] = jnp.tanh(a[...])

        row = pl.BlockSpec((1, 3), lambda i: (i, 0))
        return pl.pallas_call(
            run, jax.typeof(x), grid=(len(x),), in_specs=[row], out_specs=row, interpret=True
        )(x)

    def whole_kernel(x: jax.Array) -> jax.Array:
        def run(a: Any, out: Any) -> None:
            out[...] = a[...] - jnp.sum(a[...], 0)

        return pl.pallas_call(run, jax.typeof(x), interpret=True)(x)

    flag = operand(**BOOLS)
    return {
        "scan": [
            case(recur, operand(B, 2, 3)),
            case(lambda x: lax.map(jnp.sum, x), operand(B, 3)),
            case(lambda x: lax.scan(lambda h, y: (h + y, h), jnp.zeros(3), x), operand(B, 3)),
            case(lambda x: lax.scan(lambda h, y: (h + jnp.sum(y), None), 0.0, x), operand(3, B)),
        ],
        "while": [
            case(jax.vmap(until_small), operand(B, 3)),
            case(until_small, operand(B, 3)),
            case(lambda x: lax.fori_loop(0, 3, lambda i, y: jnp.sin(y) + i, x), operand(B, 3)),
        ],
        "cond": [case(branch, operand(B, 3), flag)],
        "custom_linear_solve": [case(matrices, operand(B, 3, 3), operand(B, 3, 2), tolerance=1e-4)],
        "custom_vmap_call": [case(doubled, operand(B, 3))],
        "custom_jvp_call": unary(jax.nn.relu),
        "custom_vjp_call": [case(halve_backward, operand(B, 3), operand(3))],
        "call_hi_primitive": [case(lambda x: jnp.searchsorted(jnp.arange(3.0), x), operand(B, 3))],
        "pallas_call": [case(kernel, operand(B, 3)), case(whole_kernel, operand(B, 3))],
    }


def all_cases() -> dict[str, list[Case]]:
    tables: Iterable[dict[str, list[Case]]] = (
        elementwise(),
        reductions(),
        moves(),
        windows(),
        linear_algebra(),
        contractions(),
        indexing(),
        draws(),
        bodies(),
    )
    found: dict[str, list[Case]] = {}
    for table in tables:
        found.update(table)
    return found


NOT_RUN = {
    "attention of cuDNN needs a GPU; see test_attention": (
        "dot_product_attention_fwd_wrapper dot_product_attention_bwd_wrapper"
    ),
    "no public function of JAX makes these": (
        "eq_to le_to lt_to threefry2x32 pvary polynomial random_gamma_grad expand_dims"
    ),
    "refused before the analysis": "sharding_constraint",
    "opened before the analysis": "jit pjit closed_call core_call remat remat2 checkpoint",
    "names in other versions": "custom_vjp_call_jaxpr copy_p",
}
"""Primitives that the property test does not run, by reason."""
