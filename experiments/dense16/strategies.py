"""Strategies by name, and those that fit a number of devices."""

from collections.abc import Sequence
from typing import Any

from experiments.dense16.model import Dense
from experiments.dense16.ring import Ring
from experiments.dense16.strategy import Strategy
from experiments.dense16.unstaged import Unstaged

MAKERS: dict[str, type[Ring] | type[Unstaged]] = {
    "one device": Unstaged,
    "replicas": Unstaged,
    "tensor": Unstaged,
    "tensor x pipeline": Ring,
    "layer-wise": Ring,
    "layer-wise + tensor": Ring,
}


def make_strategy(
    name: str,
    model: Dense,
    devices: Sequence[Any],
    *,
    data: int = 1,
    stage: int = 1,
    tensor: int = 1,
) -> Strategy:
    """A strategy on the first of the devices, which may be absent.

    Raises:
      ValueError: no strategy of this name, or the model does not split so.
    """
    if name not in MAKERS:
        raise ValueError(f"name must be one of {', '.join(MAKERS)}, got {name!r}.")
    if model.batch % data or model.heads % tensor or model.mlp % tensor:
        raise ValueError(f"{model} does not split into {data} replicas of {tensor} tensor ways.")
    if data * stage * tensor > len(devices):
        raise ValueError(
            f"{name} needs data * stage * tensor = {data * stage * tensor} devices, got "
            f"{len(devices)}."
        )
    return MAKERS[name](name, model, devices, {"data": data, "stage": stage, "tensor": tensor})


def fitting(model: Dense, num_devices: int) -> list[tuple[str, dict[str, int]]]:
    """(name, axes) of every strategy that uses all devices and splits the model; one device first.

    Tensor x pipeline has two stages; layer-wise + tensor has as many stages as leave two ways of
    tensor parallelism or more, at one layer a stage.
    """
    n = num_devices
    found = [("one device", {})]
    if n > 1 and model.batch % n == 0:
        found.append(("replicas", {"data": n}))
    if n > 1 and _splits(model, 1, n):
        found.append(("tensor", {"tensor": n}))
    if n >= 4 and _splits(model, 2, n // 2):
        found.append(("tensor x pipeline", {"stage": 2, "tensor": n // 2}))
    if n > 1 and _splits(model, n, 1):
        found.append(("layer-wise", {"stage": n}))
    deepest = max(
        (k for k in range(3, n // 2 + 1) if n % k == 0 and _splits(model, k, n // k)), default=None
    )
    if deepest:
        found.append(("layer-wise + tensor", {"stage": deepest, "tensor": n // deepest}))
    return found


def _splits(model: Dense, stage: int, tensor: int) -> bool:
    return not (
        model.layers % stage or model.batch % stage or model.heads % tensor or model.mlp % tensor
    )
