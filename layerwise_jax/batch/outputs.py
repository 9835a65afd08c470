"""How the outputs of a function combine over parts of the batch, or the words with which they are
refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp

from layerwise_jax.batch.lattice import (
    NotSeparable,
    PartialSum,
    Replicated,
    Role,
    Split,
    same,
    scaling_axes,
)
from layerwise_jax.batch.pairs import BatchError

Reduce = Literal["mean", "sum"]
Reduction = Literal["rows", "reduced", "whole", "state"]


@dataclass(frozen=True)
class OutputRole:
    """How an output of the full batch follows from those of its parts.

    Attributes:
      kind: "rows", the leading axis is the batch and parts are concatenated; "reduced", parts are
        averaged or summed, as `reduce` says; "whole", every part has the same; "state", new state
        that each part gets from the one before.
    """

    kind: Reduction


@dataclass(frozen=True)
class TracedOutput:
    """An output leaf in both traces.

    Attributes:
      name: how to call it in a message.
      role: what it is to the batch.
      micro, full: its type in a part and in the full batch.
      from_batch: whether it comes from inputs that are split.
    """

    name: str
    role: Role
    micro: Any
    full: Any
    from_batch: bool

    @property
    def scaling_axes(self) -> tuple[int, ...]:
        return scaling_axes(self.micro.shape, self.full.shape)


@dataclass(frozen=True)
class OutputAnalysis:
    """Decides for `parts` parts; `per_microbatch` accepts statistics of a part for those of the
    batch.
    """

    parts: int
    reduce: Reduce | None
    per_microbatch: bool

    def state(self, output: TracedOutput) -> OutputRole:
        """Role of new state: "whole" if no example touches it, "state" if microbatches update it.

        Raises:
          BatchError: it depends on the examples, and `batch_statistics` does not allow that.
        """
        if isinstance(output.role, Replicated) and same(output.role.ratio, 1.0):
            excused = self.per_microbatch and output.from_batch
            return OutputRole("state" if excused else "whole")
        if not self.per_microbatch:
            raise BatchError(
                f"{_capital(output.name)} is new state that depends on the examples: with "
                f"{self.parts} parts of the batch it would be updated from each in turn.",
                "Run one microbatch without replicas, or accept that with "
                "batch_statistics='per_microbatch'.",
            )
        return OutputRole("state")

    def output(self, output: TracedOutput) -> OutputRole:
        """Of any other output.

        Raises:
          BatchError: the parts do not combine to it, or not as `reduce` says.
        """
        role = output.role
        if isinstance(role, NotSeparable):
            return self._mixed(output, role)
        if isinstance(role, Split) or output.scaling_axes:
            assert isinstance(role, Split | Replicated)
            return self._rows(output, role)
        assert isinstance(role, Replicated | PartialSum), role
        if isinstance(role, PartialSum):
            return self._reduced(output.name, role.ratio)
        if (self.per_microbatch and output.from_batch) or not same(role.ratio, 1.0):
            return self._reduced(output.name, role.ratio / self.parts)
        return OutputRole("whole")

    def _mixed(self, output: TracedOutput, role: NotSeparable) -> OutputRole:
        if not self.per_microbatch or not role.is_excusable:
            raise BatchError(
                f"{_capital(output.name)} does not follow from the results for {self.parts} parts "
                f"of the batch: {role}.",
                _advice(role),
            )
        if output.scaling_axes == (0,):
            return OutputRole("rows")
        if output.scaling_axes:
            raise BatchError(_elsewhere(output, output.scaling_axes[0]))
        if self.reduce is None:
            raise BatchError(*_needs_reduce(output.name, "has no batch axis"))
        return OutputRole("reduced")

    def _rows(self, output: TracedOutput, role: Split | Replicated) -> OutputRole:
        axis = role.axis if isinstance(role, Split) else output.scaling_axes[0]
        if axis != 0:
            raise BatchError(_elsewhere(output, axis))
        if not same(role.ratio, 1.0):
            raise BatchError(
                f"{_capital(output.name)} is scaled by the length of the batch: it is "
                f"{role.ratio:.6g} times as large "
                f"for the full batch as for one of its {self.parts} parts. Divide by a number of "
                "your own, or sum up."
            )
        return OutputRole("rows")

    def _reduced(self, name: str, ratio: float) -> OutputRole:
        found = {1.0: "sum", 1.0 / self.parts: "mean"}
        is_a = next((kind for value, kind in found.items() if same(ratio, value)), None)
        if is_a is None:
            raise BatchError(
                f"{_capital(name)} depends on the length of the batch other than as a sum or mean "
                "over the examples: "
                f"for the full batch it is {ratio:.6g} times the sum over its {self.parts} parts, "
                "where 1 would be a "
                f"sum and {1 / self.parts:.6g} a mean. Return a sum or a mean."
            )
        if self.reduce is None:
            raise BatchError(*_needs_reduce(name, f"is a {is_a} over the examples"))
        if self.reduce != is_a:
            raise BatchError(
                f"{_capital(name)} is a {is_a} over the examples, but reduce={self.reduce!r} was "
                "asked for. "
                f"Pass reduce={is_a!r}, or return a {self.reduce}."
            )
        return OutputRole("reduced")


def state_of_one_part(from_batch: bool) -> OutputRole:
    """Role of new state where the batch is not split."""
    return OutputRole("state" if from_batch else "whole")


def role_of_one_part(
    name: str, aval: Any, batch: int | None, from_inputs: bool, reduce: Reduce | None
) -> OutputRole:
    """The role of an output where the batch is not split; nothing can mix then.

    Args:
      name: how to call it in a message.
      aval: its type.
      batch: the length of the batch, None if no input has one.
      from_inputs: whether it comes from inputs.
      reduce: how outputs without a batch axis combine.

    Raises:
      BatchError: a scalar that depends on the inputs, without `reduce`: it would be refused for any
        larger number of parts, and whether a function can be staged must not depend on that.
    """
    if aval.shape and aval.shape[0] == batch:
        return OutputRole("rows")
    if aval.shape or not from_inputs or not jnp.issubdtype(aval.dtype, jnp.inexact):
        return OutputRole("whole")
    if reduce is None:
        raise BatchError(*_needs_reduce(name, "is a scalar"))
    return OutputRole("reduced")


def _needs_reduce(name: str, what: str) -> tuple[str, str]:
    """Finding and advice for an output without a batch axis."""
    advice = (
        "Say how it combines over parts of the batch: reduce='mean' if it is a mean over the "
        "examples, reduce='sum' if it is a sum. (A guess could be silently wrong.)"
    )
    return f"{_capital(name)} {what}.", advice


def _elsewhere(output: TracedOutput, axis: int) -> str:
    return (
        f"{_capital(output.name)} has the examples along axis {axis}, of "
        f"{list(output.full.shape)}; parts of the batch "
        "are put together along axis 0. Transpose it first."
    )


def _advice(role: NotSeparable) -> str:
    advice = (
        "Use one microbatch without replicas, or change the function so that it treats each "
        "example alone."
    )
    if role.cause == "statistics":
        return (
            f"{advice} If each part may be a batch of its own, pass "
            "batch_statistics='per_microbatch'."
        )
    return advice


def _capital(name: str) -> str:
    return name[0].upper() + name[1:]
