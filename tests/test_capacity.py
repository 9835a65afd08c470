"""The default capacity refuses no model; a hard cap's refusal begins with the ways out."""

import jax
import jax.numpy as jnp
import pytest

import layerwise_jax as lw

WIDTH = 8
PARAMS = [jax.random.normal(jax.random.key(i), (WIDTH, WIDTH)) for i in range(4)]
X = jax.random.normal(jax.random.key(9), (8, WIDTH))
WEIGHT_BYTES = WIDTH * WIDTH * 4
# A device whose cache holds one layer's weights, but not its activations.
SMALL = lw.CPU.updated(name="small", l2_bytes=WEIGHT_BYTES + 100, usable_l2_bytes=WEIGHT_BYTES + 10)
TINY = SMALL.updated(name="tiny", usable_l2_bytes=WEIGHT_BYTES - 1)


def fn(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return x


def build(**options):
    return lw.layerwise(fn, PARAMS, X, num_stages=2, **options)


def first_lines(plan):
    return " ".join(" ".join(str(plan).splitlines()[:5]).split())


@pytest.mark.parametrize("device", [SMALL, TINY], ids=lambda device: device.name)
@pytest.mark.parametrize("num_microbatches", ["auto", 2])
def test_a_model_that_is_not_resident_is_balanced_without_a_cap_and_said_so_first(
    device, num_microbatches
):
    pipeline = build(device=device, num_microbatches=num_microbatches)
    plan = pipeline.plan
    assert plan.capacity is None
    assert [stage.layers for stage in plan.stages] == [("0", "1"), ("2", "3")]
    text = first_lines(plan)
    assert text.startswith(
        f"Not resident in cache: 2 of 2 stages exceed the usable L2 of {device.name}"
    )
    # Of 1,024 bytes of weights, 266 and 255 usable a device.
    devices = {"small": 4, "tiny": 5}[device.name]
    assert f"All weights fit the caches of {devices} devices at fp32" in text
    assert "stream from memory every tick" in text
    assert bool("'0' split over 2 tensor ways" in text) == (device is TINY)
    placed = pipeline.place(PARAMS)
    assert jnp.allclose(pipeline(placed, X), fn(PARAMS, X), atol=1e-6)


def test_a_model_that_fits_has_the_usable_cache_as_capacity_and_nothing_to_say():
    plan = build().plan
    assert plan.capacity == lw.CPU.usable_l2_bytes
    assert plan.residency == ""
    assert str(plan).startswith("2 stages, ")


@pytest.mark.parametrize(
    ("capacity", "origin"),
    [
        ("l2", "The capacity of 266 bytes is the usable l2 of small (placeholder"),
        (200, "The capacity of 200 bytes was given."),
    ],
)
def test_a_hard_cap_is_refused_with_the_ways_out_first_and_its_origin(capacity, origin):
    with pytest.raises(lw.CapacityError) as refusal:
        build(device=SMALL, capacity=capacity)
    message = str(refusal.value)
    assert message.startswith("capacity=None or 'auto' balances without a cap. ")
    assert "All weights fit the caches of" in message
    ways, _, rest = message.partition(origin)
    assert rest
    # The layer and its sizes come after the ways out and the origin.
    assert "bytes of weights" not in ways
    assert "bytes of weights" in rest


def test_a_capacity_names_a_level_of_the_device():
    assert build(capacity="memory").plan.capacity == lw.CPU.memory_bytes
    with pytest.raises(ValueError, match="must be one of 'l2', 'memory', got 'shared'"):
        build(capacity="shared")
    for wrong in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match=r"capacity must be 'auto', a memory level .*got"):
            build(capacity=wrong)
