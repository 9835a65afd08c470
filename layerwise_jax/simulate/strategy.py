"""Strategies: meshes of replicas, stages and tensor ways over which a step is spread."""

from __future__ import annotations

from dataclasses import dataclass, fields

from layerwise_jax.simulate.work import StepWork


@dataclass(frozen=True)
class Strategy:
    """A mesh of data x stage x tensor devices, and the groups in flight.

    Attributes:
      name: "one device", "replicas", "tensor", "tensor x pipeline", "layer-wise",
        "layer-wise + tensor", or one of these after "replicas x ".
      data: replicas, which split the batch.
      stage: stages of a replica, which split the layers.
      tensor: tensor ways, which split each layer.
      groups: groups of examples (microbatches) of a replica that pass the stages one after another;
        None for the number of stages.
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
                raise ValueError(f"{each.name} of '{self.name}' must be at least 1, got {value}.")

    @property
    def num_devices(self) -> int:
        return self.data * self.stage * self.tensor

    @property
    def mesh(self) -> dict[str, int]:
        """Axis -> size."""
        return {"data": self.data, "stage": self.stage, "tensor": self.tensor}

    def replica_batch(self, batch: int) -> int:
        """Examples of the largest replica."""
        return -(-batch // self.data)

    def num_groups(self, batch: int) -> int:
        """Groups of a replica, at most its number of examples."""
        return min(self.groups or self.stage, self.replica_batch(batch))

    def group_size(self, batch: int) -> int:
        """Examples of the largest group."""
        return -(-self.replica_batch(batch) // self.num_groups(batch))


def strategy_of(data: int, stage: int, tensor: int, groups: int | None = None) -> Strategy:
    """The named strategy of a mesh.

    Stages of several tensor ways are "layer-wise + tensor" if there are more stages than tensor
    ways, else "tensor x pipeline".
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
    """All (data, stage, tensor) of `num_devices` that the work allows, and (1, 1, 1).

    Every stage has a layer, tensor ways divide the work's `tensor_ways`, every replica has an
    example.
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
    """Candidate numbers of groups.

    In decoding, fewer groups than stages leave a stage idle, and more read all weights again. For
    other work, more groups shrink the bubble; more than eight a stage gain a few percent.
    """
    share = -(-work.batch // data)
    if work.kind == "decode" or stage == 1:
        return [min(stage, share)]
    return [m for m in _divisors(share) if m <= 8 * stage]


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
