"""Random layered programs: what hypothesis draws, what it stands for, and what runs it.

A program keeps every value that it has made; a layer reads the last one, and some read an earlier
one too. Values are float arrays of shape (examples, TIME, WIDTH), of the dtype of the features or
cast to the next narrower one, and no layer mixes examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

TIME, WIDTH, HIDDEN, VOCABULARY, MAX_STACK = 3, 4, 6, 7, 3
POSITIONS = np.linspace(-1, 1, TIME * WIDTH, dtype=np.float32).reshape(TIME, WIDTH)

Values = list[jax.Array]
WEIGHTS = {
    "dense": {"weight": (WIDTH, WIDTH), "bias": (WIDTH,)},
    "bottleneck": {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)},
    "convolution": {"weight": (3, WIDTH, WIDTH)},
    "norm": {"scale": (WIDTH,)},
    "embedding": {"table": (VOCABULARY, WIDTH)},
    "lookup": {"table": (WIDTH, WIDTH)},
    "positions": {"scale": (TIME, WIDTH)},
    "scan": {"weight": (MAX_STACK, WIDTH, WIDTH), "bias": (MAX_STACK, WIDTH)},
}
UNWEIGHTED = ("skip", "cast", "constant", "integers", "side", "mask", "custom")
REUSING = ("tie", "reuse")
GROUPING = ("checkpoint", "jit")


@dataclass(frozen=True)
class Layer:
    """One layer of a program.

    Attributes:
      kind: what it does; a method of `_Run`.
      weights: the name of its weights, or of those of an earlier layer; empty if it has none.
      choice: which earlier value, dtype or number of rows, modulo what there is.
      inner: the layers of a checkpoint or a jit.
    """

    kind: str
    weights: str = ""
    choice: int = 0
    inner: tuple[Layer, ...] = ()


@dataclass(frozen=True)
class RandomProgram:
    """A function `fn(params, features, side, tokens, mask, scale)` in layers; `outputs` are the
    values it returns.
    """

    layers: tuple[Layer, ...]
    outputs: tuple[int, ...]
    in_axes = (0, 0, 0, 0, None)

    @property
    def has_casts(self) -> bool:
        return any(layer.kind == "cast" for layer in every_layer(self.layers))

    def fn(self, params: Any, *inputs: jax.Array) -> list[jax.Array]:
        values = run_layers(self.layers, params, inputs, [jnp.tanh(inputs[0])])
        return [values[i % len(values)] for i in (*self.outputs, -1)]

    def loss_fn(self, params: Any, *inputs: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """A mean over the examples, and the outputs."""
        outputs = self.fn(params, *inputs)
        return sum(jnp.mean(jnp.square(x.astype(inputs[0].dtype) - 0.5)) for x in outputs), outputs  # type: ignore[return-value]

    def params(self, dtype: Any = np.float32) -> dict[str, dict[str, jax.Array]]:
        random = np.random.default_rng(0)
        own = [layer for layer in every_layer(self.layers) if layer.kind in WEIGHTS]
        return {
            layer.weights: {
                name: jnp.asarray(0.5 * random.standard_normal(shape), dtype)
                for name, shape in WEIGHTS[layer.kind].items()
            }
            for layer in own
        }

    def inputs(self, examples: int, dtype: Any = np.float32) -> tuple[jax.Array, ...]:
        random = np.random.default_rng(1)
        features, side = random.standard_normal((2, examples, TIME, WIDTH)).astype(dtype)
        tokens = random.integers(0, VOCABULARY, (examples, TIME), np.int32)
        return tuple(
            jnp.asarray(x)
            for x in (features, side, tokens, tokens % 2 == 0, np.full(WIDTH, 0.5, dtype))
        )


def every_layer(layers: Sequence[Layer]) -> list[Layer]:
    """The layers, those inside others included."""
    return [inner for layer in layers for inner in (layer, *every_layer(layer.inner))]


def run_layers(
    layers: Sequence[Layer], params: Any, inputs: Sequence[jax.Array], values: Values
) -> Values:
    for layer in layers:
        values = [
            *values,
            getattr(_Run(layer, params.get(layer.weights), inputs, values), layer.kind)(params),
        ]
    return values


@dataclass(frozen=True)
class _Run:
    """One layer at work: its weights, the program's inputs, and the values so far, of which x is
    the last.
    """

    layer: Layer
    weights: Any
    inputs: Sequence[jax.Array]
    values: Values

    @property
    def x(self) -> jax.Array:
        return self.values[-1]

    def weight(self, name: str) -> jax.Array:
        return self.weights[name].astype(self.x.dtype)

    def dense(self, _: Any) -> jax.Array:
        return jnp.tanh(self.x @ self.weight("weight") + self.weight("bias"))

    reuse = dense

    def tie(self, _: Any) -> jax.Array:
        return jnp.sin(self.x @ self.weight("weight").T)

    def bottleneck(self, _: Any) -> jax.Array:
        return self.x + jax.nn.silu(self.x @ self.weight("up")) @ self.weight("down")

    def convolution(self, _: Any) -> jax.Array:
        dimensions = ("NWC", "WIO", "NWC")
        return jnp.tanh(
            jax.lax.conv_general_dilated(
                self.x, self.weight("weight"), (1,), "SAME", dimension_numbers=dimensions
            )
        )

    def norm(self, _: Any) -> jax.Array:
        mean_square = jnp.mean(jnp.square(self.x), axis=-1, keepdims=True)
        return self.x / jnp.sqrt(mean_square + 1) * self.weight("scale")

    def embedding(self, _: Any) -> jax.Array:
        return self.x + self.weight("table")[self.inputs[2]]

    def lookup(self, _: Any) -> jax.Array:
        """A table read at integers that were computed from the data."""
        return 0.5 * self.x + self.weight("table")[jnp.argmax(self.x, axis=-1)]

    def positions(self, _: Any) -> jax.Array:
        return self.x + self.weight("scale") * jnp.arange(TIME, dtype=self.x.dtype)[:, None]

    def skip(self, _: Any) -> jax.Array:
        earlier = self.values[self.layer.choice % len(self.values)]
        return 0.5 * (self.x + earlier.astype(self.x.dtype))

    def cast(self, _: Any) -> jax.Array:
        widest = self.inputs[0].dtype
        narrower = jnp.float32 if widest == jnp.float64 else jnp.bfloat16
        return self.x.astype((narrower, widest)[self.layer.choice % 2])

    def constant(self, _: Any) -> jax.Array:
        return self.x * POSITIONS.astype(self.x.dtype)

    def integers(self, _: Any) -> jax.Array:
        bins = jnp.clip(self.x * 4, -3, 3).astype(jnp.int32) + self.inputs[2][..., None]
        return self.x + (bins % 3 - (bins >> 1)).astype(self.x.dtype)

    def side(self, _: Any) -> jax.Array:
        return self.x + self.inputs[1].astype(self.x.dtype) * self.inputs[4].astype(self.x.dtype)

    def mask(self, _: Any) -> jax.Array:
        return jnp.where(self.inputs[3][..., None], self.x, 0.1)

    def custom(self, _: Any) -> jax.Array:
        return _halve_gradient(jax.nn.relu(self.x))

    def scan(self, _: Any) -> jax.Array:
        rows = 1 + self.layer.choice % MAX_STACK
        stacked = jax.tree.map(lambda w: w[:rows].astype(self.x.dtype), self.weights)
        return jax.lax.scan(
            lambda x, w: (jnp.tanh(x @ w["weight"] + w["bias"]), None), self.x, stacked
        )[0]

    def checkpoint(self, params: Any) -> jax.Array:
        return self._group(jax.checkpoint, params)

    def jit(self, params: Any) -> jax.Array:
        return self._group(jax.jit, params)

    def _group(self, wrap: Callable[[Callable], Callable], params: Any) -> jax.Array:
        def run(params: Any, values: Values) -> jax.Array:
            return run_layers(self.layer.inner, params, self.inputs, values)[-1]

        return wrap(run)(params, self.values)


@jax.custom_vjp
def _halve_gradient(x: jax.Array) -> jax.Array:
    return x * 1


_halve_gradient.defvjp(lambda x: (_halve_gradient(x), None), lambda _, gradient: (gradient / 2,))


@st.composite
def programs(draw: st.DrawFn, *, min_layers: int = 2, max_layers: int = 9) -> RandomProgram:
    """Programs with at least one layer that has weights."""
    kinds = st.sampled_from([*WEIGHTS, *UNWEIGHTED, *REUSING])
    plain = st.builds(Layer, kinds, choice=st.integers(0, 20))
    groups = st.builds(
        Layer, st.sampled_from(GROUPING), inner=st.lists(plain, min_size=1, max_size=3).map(tuple)
    )  # fmt: skip
    first = Layer(draw(st.sampled_from(["dense", "bottleneck", "scan"])))
    rest = draw(
        st.lists(
            st.one_of(plain, plain, plain, groups), min_size=min_layers - 1, max_size=max_layers - 1
        )
    )
    outputs = draw(st.lists(st.integers(0, 20), max_size=2))
    return RandomProgram(tuple(_with_names([first, *rest], [])), tuple(outputs))


def _with_names(layers: Sequence[Layer], dense: list[str], path: str = "") -> list[Layer]:
    """The layers with names for their weights; `tie` and `reuse` take those of a dense layer before
    them, if any.
    """
    named = []
    for i, layer in enumerate(layers):
        kind, name = layer.kind, f"{path}{layer.kind}_{i}"
        if kind in REUSING and dense:
            name = dense[layer.choice % len(dense)]
        elif kind in REUSING:
            kind = "dense"
        if kind == "dense":
            dense.append(name)
        owns = kind in WEIGHTS or kind in REUSING
        inner = tuple(_with_names(layer.inner, dense, f"{name}."))
        named.append(Layer(kind, name if owns else "", layer.choice, inner))
    return named


def random_program(
    rng: np.random.Generator, max_layers: int, without: Sequence[str] = ()
) -> RandomProgram:
    """Program of 2 to `max_layers` layers from a generator of numpy, without some kinds."""
    kinds = [x for x in (*WEIGHTS, *UNWEIGHTED, *REUSING) if x not in without]

    def plain() -> Layer:
        return Layer(str(rng.choice(kinds)), choice=int(rng.integers(21)))

    def any_layer() -> Layer:
        if rng.random() < 0.75:
            return plain()
        inner = tuple(plain() for _ in range(rng.integers(1, 3)))
        return Layer(str(rng.choice(GROUPING)), inner=inner)

    first = Layer(str(rng.choice(["dense", "bottleneck", "scan"])))
    rest = [any_layer() for _ in range(rng.integers(1, max_layers))]
    outputs = tuple(int(x) for x in rng.integers(0, 21, rng.integers(0, 3)))
    return RandomProgram(tuple(_with_names([first, *rest], [])), outputs)
