"""Small functions that split over the batch or do not, one for each thing that the analysis of
batching knows.

Each takes (weight, inputs) with a weight of [WIDTH] and inputs as `draw_inputs` gives them, so that
every function has an operation on weights and data.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

BATCH, TIME, WIDTH = 8, 3, 4
IN_AXES = {"x": 0, "tokens": 0, "keys": 0, "key": None, "step": None}

Inputs = dict[str, jax.Array]
Function = Callable[[jax.Array, Inputs], Any]


def draw_inputs(seed: int = 0) -> Inputs:
    """Features float32[BATCH, TIME, WIDTH], tokens int32[BATCH, TIME] below WIDTH, keys, and what
    is not split.
    """
    random = np.random.default_rng(seed)
    return {
        "x": jnp.asarray(random.standard_normal((BATCH, TIME, WIDTH)), jnp.float32),
        "tokens": jnp.asarray(random.integers(0, WIDTH, (BATCH, TIME)), jnp.int32),
        "keys": jax.random.split(jax.random.key(seed), BATCH),
        "key": jax.random.key(seed + 1),
        "step": jnp.int32(1),
    }


def draw_weight() -> jax.Array:
    return jnp.asarray(np.random.default_rng(3).standard_normal(WIDTH), jnp.float32)


@dataclass(frozen=True)
class Accepted:
    """A function that splits: how each of its outputs combines."""

    fn: Function
    kinds: tuple[str, ...] = ("rows",)
    reduce: Any = "auto"


@dataclass(frozen=True)
class Refused:
    """A function that does not: a pattern of the words."""

    fn: Function
    words: str
    reduce: Any = "auto"


def of_x(fn: Callable[[jax.Array], Any]) -> Function:
    """The function `fn` of the weighted features."""
    return lambda weight, inputs: fn(inputs["x"] * weight)


def rows(fn: Callable[[jax.Array], Any], count: int = 1) -> Accepted:
    return Accepted(of_x(fn), ("rows",) * count)


def mean(fn: Callable[[jax.Array], Any]) -> Accepted:
    return Accepted(of_x(fn), ("reduced",), "mean")


def total(fn: Callable[[jax.Array], Any]) -> Accepted:
    return Accepted(of_x(fn), ("reduced",), "sum")


def refused(fn: Callable[[jax.Array], Any], words: str, reduce: Any = "auto") -> Refused:
    return Refused(of_x(fn), words, reduce)


def examples(x: jax.Array) -> int:
    return x.shape[0]


def window_mean(x: jax.Array, window: tuple[int, ...]) -> jax.Array:
    return lax.reduce_window(x, 0.0, lax.add, window, (1,) * 3, "SAME")


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    spec: tuple[str, str, str] = ("NWC", "WIO", "NWC"),
    groups: int = 1,
) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel, (1,), "SAME", dimension_numbers=spec, feature_group_count=groups
    )


KERNEL = jnp.asarray(np.random.default_rng(5).standard_normal((3, WIDTH, 2)), jnp.float32)


def scan_time(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A recurrence over time, the examples along axis 1 of what is scanned."""
    last, all_states = lax.scan(
        lambda h, row: (jnp.tanh(h + row), h), jnp.zeros_like(x[:, 0]), jnp.swapaxes(x, 0, 1)
    )
    return last, jnp.swapaxes(all_states, 0, 1)


def sum_in_a_scan(x: jax.Array) -> jax.Array:
    return lax.scan(
        lambda so_far, row: (so_far + jnp.sum(row), None), jnp.zeros(()), jnp.swapaxes(x, 0, 1)
    )[0]


def while_count(x: jax.Array) -> jax.Array:
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.sin(c[1])), (0, x))[1]


def own_gradients(weight: jax.Array, inputs: Inputs) -> Any:
    """Gradients by the caller's own hand: sums over the examples, of the shape of the weights."""

    def loss(weight: jax.Array) -> jax.Array:
        convolved = convolve(inputs["x"] * weight, KERNEL * weight[:, None])
        return (
            jnp.mean(jnp.square(convolved))
            + jnp.mean(weight[inputs["tokens"]])
            + 0.1 * jnp.sum(weight**2)
        )

    return jax.value_and_grad(loss)(weight)


def masked_loss(x: jax.Array) -> jax.Array:
    """A mean of which the denominator is a count that does not depend on the data."""
    mask = jnp.ones(x.shape[:2])
    return jnp.sum(jnp.sum(x, -1) * mask) / jnp.sum(mask)


def dropout(weight: jax.Array, inputs: Inputs) -> Any:
    mask = jax.random.bernoulli(inputs["key"], 0.5, inputs["x"].shape)
    return mask, jnp.where(mask, inputs["x"] * weight, 0)


def dropout_from_split_keys(weight: jax.Array, inputs: Inputs) -> Any:
    keys = jax.random.split(inputs["key"], examples(inputs["x"]))
    draw = jax.vmap(lambda key, row: jax.random.bernoulli(key, 0.5, row.shape))
    return draw(keys, inputs["x"]), inputs["x"] * weight


def dropout_from_numbered_keys(weight: jax.Array, inputs: Inputs) -> Any:
    fold = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(inputs["key"], i), (WIDTH,)))
    return fold(jnp.arange(examples(inputs["x"]))), inputs["x"] * weight


def dropout_from_given_keys(weight: jax.Array, inputs: Inputs) -> Any:
    draw = jax.vmap(lambda key, row: jax.random.uniform(key, row.shape))
    return draw(inputs["keys"], inputs["x"]) + inputs["x"] * weight


def draw_in_a_loop(weight: jax.Array, inputs: Inputs) -> Any:
    def add_noise(x: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        return x + jax.random.normal(key, x.shape), None

    return lax.scan(add_noise, inputs["x"] * weight, jax.random.split(inputs["key"], 2))[0]


def take_labels(weight: jax.Array, inputs: Inputs) -> Any:
    x, labels = inputs["x"][:, 0] * weight, inputs["tokens"][:, 0]
    return x[jnp.arange(examples(x)), labels]


def set_labels(weight: jax.Array, inputs: Inputs) -> Any:
    x, labels = inputs["x"][:, 0] * weight, inputs["tokens"][:, 0]
    return x.at[jnp.arange(examples(x)), labels].set(0.0), x.at[
        jnp.arange(examples(x)), labels
    ].add(1.0)


def take_by_grid(weight: jax.Array, inputs: Inputs) -> Any:
    x = inputs["x"] * weight
    return x[jnp.arange(examples(x))[:, None], 0, inputs["tokens"]]


def take_along(weight: jax.Array, inputs: Inputs) -> Any:
    return jnp.take_along_axis(inputs["x"] * weight, inputs["tokens"][..., None], axis=-1)


def set_along(weight: jax.Array, inputs: Inputs) -> Any:
    return jax.vmap(lambda row, label: row.at[label].set(0.0))(
        inputs["x"][:, 0] * weight, inputs["tokens"][:, 0]
    )


def count_tokens(weight: jax.Array, inputs: Inputs) -> Any:
    return jnp.zeros(WIDTH).at[inputs["tokens"]].add(1.0), jnp.sum(inputs["x"] * weight)


def sum_by_token(weight: jax.Array, inputs: Inputs) -> Any:
    summed = jax.ops.segment_sum(
        (inputs["x"] * weight).reshape(-1, WIDTH), inputs["tokens"].reshape(-1), WIDTH
    )
    return summed


def both_uses_of_numbers(weight: jax.Array, inputs: Inputs) -> Any:
    numbers = jnp.arange(examples(inputs["x"]))
    return (inputs["x"] * weight)[numbers, 0] + numbers[:, None]


def mixup(weight: jax.Array, inputs: Inputs) -> Any:
    """Each example mixed with one of a random order, by a share drawn for the batch."""
    order_key, share_key = jax.random.split(inputs["key"])
    x = inputs["x"]
    other = x[jax.random.permutation(order_key, examples(x))]
    share = jax.random.beta(share_key, 0.4, 0.4, (examples(x), 1, 1))
    return (share * x + (1 - share) * other) * weight


def masked_mean(weight: jax.Array, inputs: Inputs) -> Any:
    """A mean over the tokens that count, beside their count."""
    mask = (inputs["tokens"] > 1).astype(jnp.float32)
    losses = jnp.mean((inputs["x"] * weight) ** 2, -1)  # [examples, time]
    return jnp.sum(losses * mask) / jnp.maximum(jnp.sum(mask), 1), jnp.sum(mask).astype(jnp.int32)


def gram(x: jax.Array) -> jax.Array:
    return jnp.einsum("btd,bsd->bts", x, x) + 5 * jnp.eye(TIME)


@jax.custom_batching.custom_vmap
def halve(x: jax.Array) -> jax.Array:
    return x / 2


@halve.def_vmap
def _(size: int, is_batched: Any, x: jax.Array) -> Any:
    del size
    return halve(x), is_batched[0]


def kernel_of(x: jax.Array) -> jax.Array:
    """A kernel [TIME, WIDTH, WIDTH] made of an example [TIME, WIDTH]."""
    return x[:, :, None] * x[:, None]


def random_poisson(key: jax.Array) -> jax.Array:
    return jax.random.poisson(key, 3.0, (TIME, WIDTH)).astype(jnp.float32)


def by_sorting(x: jax.Array, work: Callable[[jax.Array], jax.Array]) -> jax.Array:
    order = jnp.argsort(x[:, 0, 0])
    return work(x[order])[jnp.argsort(order)]


def by_scatter(x: jax.Array) -> jax.Array:
    order = jnp.argsort(-x[:, 0, 0])
    return jnp.zeros_like(x).at[order].set(jax.nn.silu(x[order]))


def by_payload(x: jax.Array) -> jax.Array:
    """Vectors sorted together with their numbers, and back by a sort of these."""
    _, values, order = lax.sort((x[:, 0, 0], x[:, 1, 1], jnp.arange(examples(x))), num_keys=1)
    return lax.sort((order, values * 2), num_keys=1)[1]


def scale_kernel(x: Any, weight: Any, out: Any) -> None:
    out[...] = x[...] * jnp.sum(weight[...])


def kernel_call(
    x: jax.Array, weight: jax.Array, block: int, scale: Callable[[], Any] = lambda: 1
) -> jax.Array:
    """A Pallas kernel over blocks of so many examples, with one array for all of them."""

    def kernel(x: Any, weight: Any, out: Any) -> None:
        out[...] = jnp.tanh(x[...]) * jnp.sum(weight[...]) * scale()

    rows = pl.BlockSpec((block, TIME, WIDTH), lambda i: (i, 0, 0))
    whole = pl.BlockSpec(weight.shape, lambda i: (0, 0))
    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(examples(x) // block,),
        in_specs=[rows, whole],
        out_specs=rows,
        interpret=True,
    )
    return call(x, weight)


@jax.custom_vjp
def centre_gradient(x: jax.Array) -> jax.Array:
    """The identity, which takes from each example's gradient the mean of all."""
    return x * 1.0


centre_gradient.defvjp(lambda x: (centre_gradient(x), None), lambda _, g: (g - jnp.mean(g, 0),))


@jax.custom_vjp
def clip_gradient(weight: jax.Array, x: jax.Array) -> jax.Array:
    """A product whose gradient is halved and clipped, as quantisers do."""
    return weight * x


clip_gradient.defvjp(
    lambda weight, x: (weight * x, (weight, x)),
    lambda kept, g: (
        jnp.sum(jnp.clip(g, -1, 1) * kept[1] / 2, (0, 1)),
        jnp.clip(g, -1, 1) * kept[0] / 2,
    ),
)


@jax.custom_vjp
def average_weight_gradient(weight: jax.Array, x: jax.Array) -> jax.Array:
    """A product whose gradient for the weight is a mean where it should be a sum."""
    return weight * x


average_weight_gradient.defvjp(
    lambda weight, x: (weight * x, (weight, x)),
    lambda kept, g: (jnp.mean(g * kept[1], (0, 1)), g * kept[0]),
)


def closed_over_keys(count: int) -> jax.Array:
    """A number for each example, from keys that are drawn as the function is traced."""
    with jax.ensure_compile_time_eval():
        keys = jax.random.split(jax.random.key(0), count)
    return jax.vmap(lambda key: jax.random.normal(key, (TIME, WIDTH)))(keys)


def cond_by_step(weight: jax.Array, inputs: Inputs) -> Any:
    return lax.cond(inputs["step"] > 0, jnp.sin, lambda x: 0 * x, inputs["x"] * weight)


def unmixing_reference(weight: jax.Array, inputs: Inputs) -> Any:
    reference = jax.new_ref(jnp.zeros(WIDTH))
    reference[...] = weight
    return inputs["x"] * reference[...]


def mixing_reference(weight: jax.Array, inputs: Inputs) -> Any:
    reference = jax.new_ref(jnp.zeros(WIDTH))
    reference[...] = jnp.max(inputs["x"], axis=(0, 1))
    return inputs["x"] * weight * reference[...]


ACCEPTED: dict[str, Accepted] = {
    "entry by entry": rows(lambda x: jnp.tanh(x) * 2 + jnp.where(x > 0, x, -1.0) ** 2),
    "softmax over features": rows(lambda x: jax.nn.softmax(x)),
    "layer norm": rows(
        lambda x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-3)
    ),
    "fold time into batch and back": rows(
        lambda x: (x.reshape(-1, WIDTH) @ jnp.eye(WIDTH)).reshape(x.shape)
    ),
    "split features": rows(lambda x: x.reshape(*x.shape[:2], 2, 2).sum(-1)),
    "transpose and back": rows(lambda x: jnp.swapaxes(jnp.swapaxes(x, 0, 2) + 1, 0, 2)),
    "new axes": rows(lambda x: jnp.squeeze(x[:, None, :, :, None] * 2, (1, 4))),
    "attention": rows(lambda x: jax.nn.softmax(jnp.einsum("btd,bsd->bts", x, x)) @ x),
    "outer product": rows(lambda x: jnp.einsum("btd,bte->bde", x, x)),
    "weights on the left": rows(lambda x: jnp.einsum("de,bte->btd", jnp.eye(WIDTH), x)),
    "convolution": rows(lambda x: convolve(x, KERNEL)),
    "convolution, batch last": rows(
        lambda x: jnp.moveaxis(convolve(jnp.moveaxis(x, 0, 2), KERNEL, ("WCN", "WIO", "WCN")), 2, 0)
    ),
    "pooling": rows(lambda x: window_mean(x, (1, 2, 1))),
    "cumulative sum over time": rows(lambda x: jnp.cumsum(x, axis=1)),
    "sort and top k": rows(lambda x: (jnp.sort(x, axis=1), jax.lax.top_k(x, 2)[1]), 2),
    "argmax": rows(lambda x: (jnp.argmax(x, -1), x.max(1)), 2),
    "reverse time": rows(lambda x: x[:, ::-1]),
    "slice, pad and join time": rows(
        lambda x: jnp.concatenate([jnp.pad(x[:, 1:], ((0, 0), (1, 1), (0, 0))), x], 1)
    ),
    "stack, unstack and tile": rows(
        lambda x: jnp.tile(jnp.stack(jnp.unstack(x, axis=1), axis=-1), (1, 2, 1))
    ),
    "dynamic slice of time": Accepted(
        lambda w, i: lax.dynamic_slice_in_dim(i["x"] * w, i["step"], 2, 1)
    ),
    "dynamic update of time": Accepted(
        lambda w, i: lax.dynamic_update_slice_in_dim(
            jnp.zeros_like(i["x"]), (i["x"] * w)[:, :1], i["step"], 1
        )
    ),
    "embedding": Accepted(lambda w, i: w[i["tokens"]]),
    "take by row number": Accepted(take_labels),
    "set by row number": Accepted(set_labels, ("rows", "rows")),
    "take by grid": Accepted(take_by_grid),
    "take along axis": Accepted(take_along),
    "set under vmap": Accepted(set_along),
    "take the same place of each": rows(lambda x: x[:, jnp.array([2, 0])]),
    "recurrence": rows(scan_time, 2),
    "while loop": rows(while_count),
    "loop over examples": rows(lambda x: lax.map(lambda row: jnp.tanh(row) @ row.T, x)),
    "loop over examples, each with a loop": rows(
        lambda x: lax.map(
            lambda row: lax.while_loop(lambda y: jnp.max(jnp.abs(y)) > 0.1, lambda y: y / 2, row), x
        )
    ),
    "reorder along axis": rows(
        lambda x: jnp.take_along_axis(x, jnp.argsort(x[..., 0], 1)[..., None], 1)
    ),
    "cond": Accepted(cond_by_step),
    "custom derivative": rows(lambda x: jax.nn.relu(x) + jax.nn.silu(x)),
    "custom derivative with weights": Accepted(lambda w, i: clip_gradient(w, i["x"])),
    "checkpoint and jit": rows(jax.checkpoint(jax.jit(jnp.sin))),
    "a name for a checkpoint's policy": rows(lambda x: checkpoint_name(jnp.sin(x), "sine")),
    "a search in a table": rows(lambda x: jnp.searchsorted(jnp.arange(3.0), x)),
    "interpolation": rows(lambda x: jnp.interp(x, jnp.arange(3.0), jnp.arange(3.0) ** 2)),
    "linear algebra": rows(
        lambda x: jnp.linalg.cholesky(jnp.einsum("btd,bsd->bts", x, x) + 5 * jnp.eye(TIME))
    ),
    "fast Fourier transform": rows(lambda x: jnp.abs(jnp.fft.fft(x))),
    "row numbers as data": rows(lambda x: x + jnp.arange(examples(x))[:, None, None]),
    "constant rows": rows(lambda x: (x, jnp.full((examples(x), 2), 0.5)), 2),
    "causal mask": rows(lambda x: x * jnp.tril(jnp.ones((examples(x), TIME, WIDTH)))),
    "what no example enters": Accepted(lambda w, i: (i["x"] * w, w * 2), ("rows", "whole")),
    "dropout, one key": Accepted(dropout, ("rows", "rows")),
    "dropout, keys split by the batch": Accepted(dropout_from_split_keys, ("rows", "rows")),
    "noise, keys numbered": Accepted(dropout_from_numbered_keys, ("rows", "rows")),
    "noise, keys given": Accepted(dropout_from_given_keys),
    "reference to weights": Accepted(unmixing_reference),
    "mean": mean(lambda x: jnp.mean(x**2)),
    "mean of sums": mean(lambda x: jnp.mean(jnp.sum(x, (1, 2)))),
    "mean by hand": mean(lambda x: jnp.sum(x) / examples(x)),
    "mean by a cast length": mean(
        lambda x: jnp.sum(x) * (1 / jnp.asarray(examples(x), jnp.float32))
    ),
    "mean of vectors": mean(lambda x: jnp.mean(x, 0)),
    "mean with weight decay": Accepted(
        lambda w, i: jnp.mean(i["x"] * w) + jnp.sum(w**2), ("reduced",), "mean"
    ),
    "mean over all ones": mean(masked_loss),
    "mean of a scaled dot": mean(lambda x: jnp.vdot(x, x) / x.size),
    "sum": total(lambda x: jnp.sum(jnp.sin(x))),
    "sum in a scan": total(sum_in_a_scan),
    "numerator and denominator": Accepted(
        lambda w, i: (jnp.sum(i["x"] * w), jnp.sum(i["tokens"] > 1)), ("reduced", "reduced"), "sum"
    ),
    "number of examples": Accepted(
        lambda w, i: (jnp.sum(i["x"] * w), jnp.float32(examples(i["x"]))),
        ("reduced", "reduced"),
        "sum",
    ),
    "counts by token": Accepted(count_tokens, ("reduced", "reduced"), "sum"),
    "sums by token": Accepted(sum_by_token, ("reduced",), "sum"),
    "largest and smallest": Accepted(
        lambda w, i: (jnp.max(i["x"] * w), -jnp.max(i["x"] * w, (0, 1)), jnp.any(i["x"] * w > 2)),
        ("extreme",) * 3,
    ),
    "class token": rows(
        lambda x: jnp.concatenate([jnp.tile(KERNEL[:1, :, 0], (examples(x), 1))[:, None], x], 1)
    ),
    "several rows for each example": rows(
        lambda x: jnp.tile(KERNEL[..., 0], (examples(x), 1)).reshape(x.shape) * x
    ),
    "reshape that transposes": rows(
        lambda x: jnp.moveaxis(
            lax.reshape(x, (TIME, examples(x) * WIDTH), (1, 0, 2)).reshape(TIME, -1, WIDTH), 1, 0
        )
    ),
    "a matrix for each example": rows(lambda x: jnp.linalg.solve(gram(x), x)),
    "a function with a rule for vmap": rows(lambda x: halve(x)),
    "a function with a rule for vmap, mapped": rows(lambda x: jax.vmap(halve)(x)),
    "a convolution kernel for each example": rows(
        jax.vmap(lambda x: convolve(x[None], kernel_of(x))[0])
    ),
    "a depthwise kernel for each example": rows(
        jax.vmap(lambda x: convolve(x[None], kernel_of(x)[:, :1], groups=WIDTH)[0])
    ),
    "gradients of a kernel for each example": rows(
        jax.vmap(lambda x: jax.grad(lambda k: jnp.sum(convolve(x[None], k) ** 2))(kernel_of(x)))
    ),
    "loops until each example is done": rows(
        jax.vmap(
            lambda row: lax.while_loop(
                lambda c: jnp.max(jnp.abs(c[0])) > 0.1, lambda c: (c[0] / 2, c[1] + 1), (row, 0)
            )
        ),
        2,
    ),
    "rejection with a key for each example": Accepted(
        lambda w, i: i["x"] * w + jax.vmap(lambda k: random_poisson(k))(i["keys"])
    ),
    "sorted and put back": rows(lambda x: by_sorting(x, lambda y: jnp.tanh(y @ KERNEL[0]))),
    "sorted and put back by a scatter": rows(by_scatter),
    "sorted downwards with a payload": rows(by_payload),
    "kernel over examples": rows(lambda x: kernel_call(x, KERNEL[0], 1)),
    "kernel under vmap": rows(
        lambda x: jax.vmap(lambda y: kernel_call(y[None], KERNEL[0], 1)[0])(x)
    ),
    "row numbers in bytes": rows(
        lambda x: x + jnp.arange(examples(x)).astype(jnp.int8)[::-1, None, None]
    ),
    "row numbers used twice": Accepted(both_uses_of_numbers),
    "row numbers from the end": rows(lambda x: x * jnp.arange(examples(x), 0, -1)[:, None, None]),
    "array as long as the batch": rows(
        lambda x: x * np.arange(examples(x), dtype=np.float32)[:, None, None]
    ),
    "keys as many as the batch": Accepted(
        lambda w, i: (
            i["x"] * w
            + jax.random.normal(jax.random.key(7), ())
            + closed_over_keys(examples(i["x"]))
        )
    ),
    "examples in an order of the inputs": Accepted(
        lambda w, i: i["x"][jnp.argsort(i["tokens"][:, 0])] * w
    ),
    "mixup": Accepted(mixup),
    "scaled by the inputs' largest": Accepted(lambda w, i: i["x"] * w / jnp.max(i["x"])),
    "masked mean": Accepted(masked_mean, ("reduced", "whole"), ("mean", "count")),
    "masked mean, where=": Accepted(
        lambda w, i: jnp.mean(i["x"] * w, where=i["tokens"][..., None] > 1), ("reduced",)
    ),
    "draws hidden in a loop, of one key": Accepted(
        lambda w, i: i["x"] * w + jax.random.poisson(i["key"], 3.0, i["x"].shape)
    ),
    "linear in a sum": total(
        lambda x: jnp.concatenate([-2 * jnp.sum(x, 0), jnp.zeros((1, WIDTH))]).T[None]
    ),
    "gradients": Accepted(own_gradients, ("reduced", "reduced"), "mean"),
}

REFUSED: dict[str, Refused] = {
    "sorted and left so": refused(lambda x: x[jnp.argsort(x[:, 0, 0])], "in an order that depends"),
    "sorted and put back wrongly": refused(
        lambda x: x[jnp.argsort(x[:, 0, 0])][jnp.argsort(x[:, 0, 1])], "in an order that depends"
    ),
    "sorted, beside the unsorted": refused(
        lambda x: by_sorting(x, lambda y: y + x), "in an order that depends"
    ),
    "sorted, neighbours mixed": refused(
        lambda x: by_sorting(x, lambda y: y.reshape(-1, 2, TIME, WIDTH)[:, ::-1].reshape(x.shape)),
        "in an order that depends|order along",
    ),
    "sorted, cumulated": refused(
        lambda x: by_sorting(x, lambda y: jnp.cumsum(y, 0)), "sums up along the axis"
    ),
    "reshape that transposes, joined": refused(
        lambda x: lax.reshape(x, (TIME * examples(x), WIDTH), (1, 0, 2)), "no longer together"
    ),
    "kernel over blocks of examples": refused(
        lambda x: kernel_call(x, KERNEL[0], 2),
        "kernel of which no axis of the grid.*per_microbatch",
    ),
    "kernel that reads its place": refused(
        lambda x: kernel_call(x, KERNEL[0], 1, lambda: pl.program_id(0)), "kernel of which no axis"
    ),
    "kernel over all examples at once": refused(
        lambda x: pl.pallas_call(scale_kernel, jax.typeof(x), interpret=True)(x, KERNEL[0]),
        "kernel of which no axis",
    ),
    "repeated examples": refused(lambda x: jnp.tile(x, (2, 1, 1)), "repeats the examples"),
    "largest over the batch": refused(
        lambda x: x - jnp.max(x, 0), r"reduce_max at .*test|cases.*over all examples"
    ),
    "batch norm": refused(
        lambda x: x - jnp.mean(x, 0), r"sub at .*cases.*batch normalisation.*per_microbatch"
    ),
    "softmax over the batch": refused(lambda x: jax.nn.softmax(x, 0), "over all examples"),
    "sum over the batch, then rows": refused(
        lambda x: x / jnp.sum(x), "uses a sum or mean over the examples in"
    ),
    "sort": refused(lambda x: jnp.sort(x, 0), "sort.* sorts along the axis of the examples"),
    "cumulative sum": refused(lambda x: jnp.cumsum(x, 0), "sums up along the axis of the examples"),
    "cumulative product": refused(
        lambda x: jnp.cumprod(x, 0), "accumulates along the axis of the examples"
    ),
    "reverse": refused(lambda x: x[::-1], "reverses the order along the axis of the examples"),
    "roll": refused(lambda x: jnp.roll(x, 1, 0), "takes some of the examples by their place"),
    "first examples": refused(lambda x: x - x[:1], "takes some of the examples by their place"),
    "concatenate": refused(
        lambda x: jnp.concatenate([x, x]), "concatenates along the axis of the examples"
    ),
    "pad": refused(
        lambda x: jnp.pad(x, ((1, 1), (0, 0), (0, 0))), "pads along the axis of the examples"
    ),
    "window over the batch": refused(
        lambda x: window_mean(x, (2, 1, 1)), "window along the axis of the examples"
    ),
    "convolution over the batch": refused(
        lambda x: convolve(x, jnp.ones((3, TIME, 2)), ("WCN", "WIO", "WCN")),
        "window over the examples",
    ),
    "every pair": refused(
        lambda x: jnp.einsum("btd,ctd->bc", x, x), "every example with every other"
    ),
    "own transpose": refused(lambda x: x[:, 0, 0] + x[:, 0, 0][:, None], "every|pairs"),
    "flattened wrongly": refused(
        lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, WIDTH), "no longer together"
    ),
    "scan over the batch": refused(
        lambda x: lax.scan(lambda h, row: (h + row, h), x[0] * 0, x)[1], "one after"
    ),
    "loop over examples with all": refused(
        lambda x: lax.map(lambda row: row + jnp.sum(x), x), "all examples|adds"
    ),
    "inside of JAX": refused(
        lambda x: x / jnp.std(x, 0), r"sub \(inside of JAX, after .*batching_cases"
    ),
    "loop until all are done": refused(
        lambda x: lax.while_loop(lambda x: jnp.any(x > 0.1), lambda x: x / 2, x),
        "reduce_or|runs until",
    ),
    "branch on an example": refused(
        lambda x: lax.cond(x[0, 0, 0] > 0, jnp.sin, jnp.cos, x), "takes some of the"
    ),
    "branch on a mean": refused(
        lambda x: lax.cond(jnp.mean(x) > 0, jnp.sin, jnp.cos, x), "not linear in a sum"
    ),
    "gather from others": Refused(
        lambda w, i: (i["x"] * w)[i["tokens"][:, 0]], "computed places of the batch"
    ),
    "gather by shared place": Refused(
        lambda w, i: (i["x"] * w)[i["step"]], "by their place in the batch"
    ),
    "gather by too few numbers": refused(
        lambda x: x.reshape(-1, WIDTH)[jnp.arange(examples(x))], "computed places of the batch"
    ),
    "derivative that mixes": refused(
        centre_gradient, "has a derivative rule in which .* mean over the examples"
    ),
    "overwrite one array": Refused(
        lambda w, i: (w.at[i["tokens"][:, 0]].set(i["x"][:, 0, 0]), i["x"] * w),
        "overwrite one another",
    ),
    "draws hidden in a loop": Refused(
        draw_in_a_loop, "draws by the shape of the batch in the body of a loop"
    ),
    "length of the batch as a number": refused(lambda x: x + examples(x), "length of the batch"),
    "scaled by the length of the batch": refused(
        lambda x: x / examples(x), "scaled by the length of the batch"
    ),
    "batch along another axis": refused(lambda x: jnp.swapaxes(x, 0, 1), "axis 1, of .*Transpose"),
    "structure by length": refused(
        lambda x: jnp.sin(x) if examples(x) < BATCH else x, "does other operations"
    ),
    "reference to the examples": Refused(mixing_reference, "mutable array"),
    "mean for a sum": refused(
        lambda x: jnp.sum(x), "is a sum over the examples, but reduce says 'mean'", "mean"
    ),
    "sum for a mean": refused(
        lambda x: jnp.mean(x), "is a mean over the examples, but reduce says 'sum'", "sum"
    ),
    "weight decay on a sum": Refused(
        lambda w, i: jnp.sum(i["x"] * w) + jnp.sum(w**2), "weight decay", "sum"
    ),
    "mean plus sum": refused(lambda x: jnp.mean(x) + jnp.sum(x), "adds a mean .* to a sum", "mean"),
    "one less than a mean": refused(
        lambda x: jnp.sum(x) / (examples(x) - 1), "other than as a sum or mean", "mean"
    ),
    "root of a mean": refused(
        lambda x: jnp.sqrt(jnp.mean(x**2)), "not linear in a sum or mean", "mean"
    ),
    "weighted mean": refused(
        lambda x: jnp.sum(x * (x > 0)) / jnp.sum(x > 0), "two outputs", "mean"
    ),
    "load balancing": refused(
        lambda x: jnp.sum(jnp.mean(x, (0, 1)) * jnp.mean(x > 0, (0, 1))),
        "load-balancing loss",
        "mean",
    ),
}
