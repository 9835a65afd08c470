"""The ways to spread a step over devices: replicas, tensor ways, stages, and their products."""

from __future__ import annotations

from dataclasses import dataclass, fields

from layerwise_jax.simulate.work import StepWork


@dataclass(frozen=True)
class Strategy:
    """A mesh of data x stage x tensor devices, and what goes through it at a time.

    Attributes:
      name: what it is called: "one device", "replicas", "tensor", "tensor x pipeline",
        "layer-wise", "layer-wise + tensor", or one of these behind "replicas x ".
      data: replicas, between which the batch is split.
      stage: stages of a replica, between which its layers are split.
      tensor: ways that each layer is split.
      groups: groups of examples (microbatches) of a replica that go through the stages one behind
        the other; None for as many as there are stages.
    """

    name: str
    data: int = 1
    stage: int = 1
    tensor: int = 1
    groups: int | None = None

    def __post_init__(self) -> None:
        for each in fields(self)[1:]:
            value = getattr(self, each.name)
            if value is not None and value < 1:
                raise ValueError(f"{each.name} of '{self.name}' is {value}; at least 1 is wanted.")

    @property
    def num_devices(self) -> int:
        return self.data * self.stage * self.tensor

    @property
    def mesh(self) -> dict[str, int]:
        """Axes and sizes."""
        return {"data": self.data, "stage": self.stage, "tensor": self.tensor}

    def replica_batch(self, batch: int) -> int:
        """Examples of the replica that has the most."""
        return -(-batch // self.data)

    def num_groups(self, batch: int) -> int:
        """Groups of a replica: no more than it has examples."""
        return min(self.groups or self.stage, self.replica_batch(batch))

    def group_size(self, batch: int) -> int:
        """Examples of the largest group."""
        return -(-self.replica_batch(batch) // self.num_groups(batch))


def strategy_of(data: int, stage: int, tensor: int, groups: int | None = None) -> Strategy:
    """A strategy by its shape, named.

    Stages that are split further have two names: with more stages than tensor ways they are
    layer-wise, else a pipeline of tensor-parallel groups.
    """
    inner = {
        (False, False): "one device",
        (False, True): "tensor",
        (True, False): "layer-wise",
        (True, True): "layer-wise + tensor" if stage > tensor else "tensor x pipeline",
    }[stage > 1, tensor > 1]
    name = inner if data == 1 else "replicas" if inner == "one device" else f"replicas x {inner}"
    return Strategy(name, data, stage, tensor, groups)


def shapes(work: StepWork, num_devices: int) -> list[tuple[int, int, int]]:
    """Every (data, stage, tensor) of `num_devices` that the work allows, and one device alone.

    No stage is without a layer, tensor ways divide what a layer can be split into, no replica is
    without an example.
    """
    found = [(1, 1, 1)]
    for stage in _divisors(num_devices):
        for tensor in _divisors(num_devices // stage):
            data = num_devices // stage // tensor
            splits = work.tensor_ways is None or work.tensor_ways % tensor == 0
            if stage <= len(work.layers) and splits and data <= work.batch:
                found.append((data, stage, tensor))
    return list(dict.fromkeys(found))


def group_counts(work: StepWork, data: int, stage: int) -> list[int]:
    """Numbers of groups worth trying.

    In decoding, fewer groups than stages leave a stage idle, and more read all weights again.
    Elsewhere more groups shrink the bubble; beyond eight for each stage that gains a few percent.
    """
    share = -(-work.batch // data)
    if work.kind == "decode" or stage == 1:
        return [min(stage, share)]
    return [m for m in _divisors(share) if m <= 8 * stage]


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
