"""Refusals say what was expected, given and what to do; a refused call consumes nothing."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import layerwise_jax as lw

WIDTH, BATCH = 4, 8
X = np.ones((BATCH, WIDTH), np.float32)
PARAMS = [np.full((WIDTH, WIDTH), 0.1 * (i + 1), np.float32) for i in range(4)]
HALF = jnp.bfloat16
Function = Callable[..., Any]


def fn(params: list[jax.Array], x: jax.Array) -> jax.Array:
    for weight in params:
        x = jnp.tanh(x @ weight)
    return x


def loss_fn(params: list[jax.Array], x: jax.Array) -> jax.Array:
    return jnp.mean(fn(params, x))


def stage(
    function: Function = fn, params: Any = PARAMS, *inputs: Any, **options: Any
) -> lw.Pipeline:
    """A pipeline of two stages and two microbatches, unless the options say otherwise."""
    defaults = {"num_stages": 2, "num_microbatches": 2, "capacity": None}
    return lw.layerwise(function, params, *(inputs or (X,)), **defaults | options)


def refuses(call: Callable[[], Any], *words: str, error: type[Exception] = ValueError) -> None:
    """The call raises just that error, and its message has all the words."""
    with pytest.raises(error) as refusal:
        call()
    for word in words:
        assert word in str(refusal.value)


@pytest.fixture(scope="module")
def pipeline() -> lw.Pipeline:
    return stage()


@pytest.mark.parametrize("count", [3, 16, 0, -2, "some", 2.0])
def test_microbatches_that_do_not_divide_the_batch(count: Any) -> None:
    refuses(
        lambda: stage(num_microbatches=count),
        "num_microbatches must be 'auto' or a divisor of the 8 examples",
        f"got {count!r}",
    )


def test_a_batch_that_does_not_divide_over_replicas(stage_mesh: Callable[..., Mesh]) -> None:
    mesh = stage_mesh(2, data=3)
    refuses(
        lambda: stage(num_stages=None, mesh=mesh), "a multiple of the 3 replicas", "'data'", "got 8"
    )


def test_inputs_without_one_batch_size() -> None:
    refuses(
        lambda: stage(lambda params, x, y: fn(params, x + y[0]), PARAMS, X, X[:3]),
        "[3, 8]",
        "in_axes",
    )
    refuses(lambda: stage(in_axes=None), "[]", "one batch size")


def test_more_stages_than_layers() -> None:
    refuses(lambda: stage(num_stages=5), "5", "4 layers", "4 or fewer")


def test_no_stages_and_no_microbatches(stage_mesh: Callable[..., Mesh]) -> None:
    refuses(lambda: stage(num_stages=0), "num_stages must be an int of at least 1, got 0")
    layers = lw.trace_layers(fn, PARAMS, X)
    refuses(
        lambda: lw.build_pipeline(layers, (0, 2, 4), stage_mesh(2), 0),
        "num_microbatches must be an int of at least 1, got 0",
    )


@pytest.mark.parametrize(
    "boundaries", [(0, 2, 2, 4), (0, 1, 3), (1, 4), (0, 5, 4), (0, 1, 2, 3, 4, 4)]
)
def test_boundaries_that_are_none(
    stage_mesh: Callable[..., Mesh], boundaries: tuple[int, ...]
) -> None:
    layers = lw.trace_layers(fn, PARAMS, X)
    mesh = stage_mesh(len(boundaries) - 1)
    refuses(
        lambda: lw.build_pipeline(layers, boundaries, mesh, 1),
        str(boundaries),
        "4 layers",
        "from 0 to 4",
    )


def test_a_mesh_without_stages() -> None:
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    refuses(lambda: stage(mesh=mesh), "('model',)", "'stage'", "jax.make_mesh")


def test_a_mesh_for_other_stages(stage_mesh: Callable[..., Mesh]) -> None:
    refuses(lambda: stage(mesh=stage_mesh(3)), "must have 2 devices", "got 3")
    layers = lw.trace_layers(fn, PARAMS, X)
    refuses(
        lambda: lw.build_pipeline(layers, (0, 2, 4), stage_mesh(4), 2),
        "must have 2 devices",
        "got 4",
    )


def test_fewer_devices_than_stages() -> None:
    count = jax.local_device_count() + 1
    refuses(
        lambda: stage(fn, PARAMS * count, num_stages=count),
        f"at most {count - 1}",
        f"got {count}",
        "fewer stages",
    )
    refuses(lambda: lw.stage_mesh(count), f"got {count}", "emulate_devices")


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (tuple(PARAMS), ["other containers: PyTreeDef((*", "in place of PyTreeDef([*"]),
        (PARAMS[:3], ["must have the traced tree, got another (missing [3])"]),
        ([*PARAMS, *PARAMS], ["(unexpected [4], [5], [6], [7])"]),
        ({"w": PARAMS}, ["missing [0], [1], [2], [3]; unexpected ['w'][0]"]),
        ([*PARAMS[:3], PARAMS[3][:2]], ["[3]", "got float32[2, 4]", "must be float32[4, 4]"]),
        (
            [PARAMS[0].astype(HALF), *PARAMS[1:]],
            ["[0]", "got bfloat16[4, 4]", "must be float32[4, 4]", "Convert it"],
        ),
        ([1.0, *PARAMS[1:]], ["[0]", "float32[]"]),
    ],
    ids=["tree", "shorter", "longer", "renamed", "shape", "dtype", "scalar"],
)
def test_parameters_that_were_not_traced(
    pipeline: lw.Pipeline, params: Any, words: list[str]
) -> None:
    refuses(lambda: pipeline.place(params), *words)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ((X[:6],), ["input 0", "got float32[6, 4]", "float32[8, 4]", "2 microbatches of 4"]),
        ((X.astype(HALF),), ["got bfloat16[8, 4]", "must be float32[8, 4]"]),
        ((X, X), ["got PyTreeDef((*, *))", "traced tree PyTreeDef((*,))"]),
        ((), ["PyTreeDef(())"]),
    ],
    ids=["batch", "dtype", "more", "none"],
)
def test_inputs_that_were_not_traced(pipeline: lw.Pipeline, inputs: Any, words: list[str]) -> None:
    staged = pipeline.place(PARAMS)
    refuses(lambda: pipeline(staged, *inputs), *words)
    refuses(lambda: jax.jit(pipeline)(staged, *inputs), *words)


def test_parameters_that_were_not_placed_here(pipeline: lw.Pipeline) -> None:
    for call in (lambda staged: pipeline(staged, X), pipeline.gather):
        refuses(lambda call=call: call(PARAMS), "got list", "pipeline.place(params)")
        refuses(
            lambda call=call: call(stage(num_stages=1).place(PARAMS)),
            "got ['0', '1', '2', '3']",
            "place(params)",
        )
    staged = pipeline.place(PARAMS)
    name = next(iter(staged))
    refuses(
        lambda: pipeline({**staged, name: staged[name][:1]}, X),
        name,
        "float32[1, 4, 4]",
        "float32[2, 4, 4]",
    )


def test_a_word_that_contradicts_the_function() -> None:
    refuses(
        lambda: stage(loss_fn, reduce="sum"),
        "mean over the examples",
        "reduce says 'sum'",
        "reduce='auto'",
        error=lw.BatchError,
    )


def test_gradients_of_what_is_no_loss(pipeline: lw.Pipeline) -> None:
    staged = pipeline.place(PARAMS)
    refuses(
        lambda: pipeline.value_and_grad(staged, X),
        "scalar (the loss)",
        "float32[4, 4]",
        "Stage a loss function",
    )


def test_operations_that_mix_the_batch() -> None:
    def mixing(params: list[jax.Array], x: jax.Array) -> jax.Array:
        return fn(params, x) - jnp.mean(fn(params, x), axis=0)

    refuses(
        lambda: stage(mixing),
        "test_errors.py",
        "batch_statistics='per_microbatch'",
        error=lw.BatchError,
    )


def test_capacity_below_one_layer() -> None:
    """The layer, its three sizes, the cap, and what would fit."""
    costs = lw.measure_costs(lw.trace_layers(fn, PARAMS, X[:4]))
    largest = max(costs, key=lambda cost: cost.size)
    words = [
        "layer 0 '0'",
        "the capacity of 50 bytes",
        "64 bytes of weights",
        f"{largest.activation_bytes} of activations",
    ]
    fit = [
        "of buffers",
        "Devices needed: 6 at fp32, 3 at fp16, 2 at fp8, 1 at 4 bits",
        "tensor ways: 2 at fp32",
    ]
    refuses(lambda: stage(capacity=50), *words, *fit, error=lw.CapacityError)


def test_capacity_that_only_small_microbatches_fit() -> None:
    words = "layer 0 '0'", "the capacity of 150 bytes", "At one example a microbatch '0' fits"
    refuses(lambda: stage(capacity=150, num_microbatches=1), *words, error=lw.CapacityError)
    assert stage(capacity=250, num_microbatches=8).plan.capacity == 250


def test_capacity_below_the_model() -> None:
    refuses(
        lambda: stage(capacity=200, num_stages=1, num_microbatches=8), "200", error=lw.CapacityError
    )


def test_options_that_do_not_exist() -> None:
    for capacity in ("l3", -1, 0, True, 1.5, b"l2"):
        refuses(lambda value=capacity: stage(capacity=value), "'l2'", f"got {capacity!r}")
    refuses(lambda: stage(method="best"), "'best'", "'dp', 'greedy'")
    refuses(lambda: stage(schedule="3f2b"), "schedule must be '1f1b'", "got '3f2b'")
    four = jax.make_mesh((4,), ("stage",), axis_types=(jax.sharding.AxisType.Auto,))
    refuses(
        lambda: stage(mesh=four, schedule="interleaved_1f1b"),
        "num_stages must be a multiple of the 4 pipeline devices",
        "got 2",
    )
    refuses(lambda: stage(reduce="avg"), "reduce must be 'auto', 'mean', 'sum'", "got 'avg'")
    refuses(
        lambda: stage(batch_statistics="per_batch"),
        "batch_statistics must be 'per_microbatch' or None, got 'per_batch'",
    )
    refuses(lambda: stage(remat="full"), "remat must be 'stage', 'cheap' or None, got 'full'")


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (1, ["in_axes", "got 1", "Transpose"]),
        ((0, 0), ["(0, 0)", "PyTreeDef((*,))"]),
        ({"x": 0}, ["{'x': 0}"]),
    ],
)
def test_axes_that_do_not_fit_the_inputs(axes: Any, words: list[str]) -> None:
    refuses(lambda: stage(in_axes=axes), *words)


EMPTY = {
    "no parameter used": (lambda params, x: x, PARAMS),
    "no parameters": (lambda params, x: x, []),
    "no input used": (lambda params, x: params[0], PARAMS),
    "no output": (lambda params, x: None, PARAMS),
}


@pytest.mark.parametrize(("function", "params"), EMPTY.values(), ids=EMPTY)
def test_an_empty_model(function: Function, params: Any) -> None:
    refuses(
        lambda: stage(function, params), "reads both a parameter and an input", "first argument"
    )


def test_a_function_that_closes_over_a_traced_array() -> None:
    def outer(y: jax.Array) -> Any:
        return lw.trace_layers(lambda params, x: fn(params, x + y), PARAMS, X)

    refuses(
        lambda: jax.jit(outer)(X), "traced array", "float32[8,4]", "as a parameter or as an input"
    )


def with_print(params: list[jax.Array], x: jax.Array) -> jax.Array:
    jax.debug.print("{}", x[0, 0])
    return fn(params, x)


def with_sharding(params: list[jax.Array], x: jax.Array) -> jax.Array:
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    return fn(params, jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec())))


def with_reference(params: list[jax.Array], x: jax.Array) -> jax.Array:
    total = jax.new_ref(jnp.zeros_like(x))
    for weight in params:
        x = jnp.tanh(x @ weight)
        total[...] += x
    return total[...]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (with_print, ["debug_print", "with_print", "has an effect", "Remove it"]),
        (with_sharding, ["sharding_constraint", "with_sharding", "Remove the sharding"]),
        (with_reference, ["mutable reference", "with_reference", "within one layer"]),
    ],
)
def test_what_cannot_be_cut(function: Function, words: list[str]) -> None:
    refuses(lambda: stage(function), "test_errors.py", *words, error=lw.CutError)


def test_a_refused_call_loses_nothing(pipeline: lw.Pipeline) -> None:
    """Not even donated arguments: the refusal comes before they are taken."""
    step = jax.jit(lambda staged, x: (pipeline(staged, x), staged), donate_argnums=0)
    staged = pipeline.place(PARAMS)
    refuses(lambda: step(staged, X[:6]), "input 0")
    refuses(lambda: step(PARAMS, X), "pipeline.place(params)")
    y, staged = step(staged, X)
    np.testing.assert_allclose(y, fn(PARAMS, X), rtol=1e-6)
    for came, wanted in zip(pipeline.gather(staged), PARAMS, strict=True):
        np.testing.assert_array_equal(came, wanted)


def test_a_parameter_that_is_a_python_number_is_placed() -> None:
    def scaled(params: dict[str, Any], x: jax.Array) -> jax.Array:
        return params["scale"] * fn(params["layers"], x)

    params = {"scale": 0.5, "layers": PARAMS}
    pipeline = stage(scaled, params)
    np.testing.assert_allclose(pipeline(pipeline.place(params), X), scaled(params, X), rtol=1e-6)
