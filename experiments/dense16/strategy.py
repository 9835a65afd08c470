"""Interface of all strategies, used by one harness."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from jax.sharding import AxisType, Mesh

from experiments.dense16.model import Dense

AXES = ("data", "stage", "tensor")


class Strategy(ABC):
    """Decoding strategy: one jitted program generates many tokens for every sequence of the batch.

    Each token is fed back as the next input; the cache is donated and updated in place.

    Attributes:
      name: what results call it.
      model: the model, its batch and context included.
      shape: devices on each of the axes `data`, `stage` and `tensor`.
      mesh: their mesh.
    """

    def __init__(
        self,
        name: str,
        model: Dense,
        devices: Sequence[Any],
        shape: dict[str, int],
        axes: Sequence[str],
    ):
        self.name, self.model = name, model
        self.shape = {axis: shape.get(axis, 1) for axis in AXES}
        ways = [self.shape[axis] for axis in axes]
        used = np.array(devices[: math.prod(ways)]).reshape(ways)
        self.mesh = Mesh(used, tuple(axes), axis_types=(AxisType.Auto,) * len(ways))
        self.compile = cache(self._compile)

    @property
    def num_devices(self) -> int:
        return self.mesh.size

    @abstractmethod
    def _compile(self, steps: int) -> Any:
        """Program of `steps` steps as `jax.stages.Compiled`, from types; devices may be absent."""

    @abstractmethod
    def place(self, params: Any) -> Any:
        """The weights on their devices."""

    @abstractmethod
    def start(self, cache: Any, tokens: np.ndarray, positions: np.ndarray) -> Any:
        """State before the first step: cache of the batch, first inputs int32[batch], their
        positions.
        """

    @abstractmethod
    def rewind(self, state: Any, tokens: np.ndarray, positions: np.ndarray) -> Any:
        """The state with these next inputs; later cache positions are overwritten before they are
        read.
        """

    @abstractmethod
    def run(self, weights: Any, state: Any, steps: int) -> tuple[Any, np.ndarray]:
        """Runs `steps` steps: state, and tokens int32[steps, batch]. The given state is donated."""
