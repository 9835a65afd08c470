"""Outputs of a function over parts of the batch: how each combines, or why it is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from layerwise_jax.batch.lattice import (
    NotSeparable,
    PartialExtreme,
    PartialSum,
    Parts,
    Ratio,
    Replicated,
    Role,
    Split,
    same,
    scaling_axes,
)
from layerwise_jax.batch.pairs import BatchError

Reduce = Literal["auto", "mean", "sum", "count", "max", "min", "rows"]
"""Words for `reduce`: "auto" infers, any other asserts how outputs combine over microbatches."""

Combine = Literal["mean", "sum", "max", "min"]
Reduction = Literal["rows", "reduced", "extreme", "whole", "state"]

COMBINE: dict[str, Combine] = {
    "mean": "mean",
    "sum": "sum",
    "count": "sum",
    "max": "max",
    "min": "min",
}
"""Words that say how outputs without a batch axis combine."""


@dataclass(frozen=True)
class OutputRole:
    """Combination of the outputs of parts into an output of the full batch.

    Attributes:
      kind: "rows", the leading axis is the batch and parts are concatenated; "reduced", parts are
        averaged or summed; "extreme", the largest or smallest of the parts; "whole", every part has
        the same; "state", new state that each part gets from the one before.
      combine: for "reduced" and "extreme", the operation over the parts.
    """

    kind: Reduction
    combine: Combine | None = None


@dataclass(frozen=True)
class TracedOutput:
    """An output leaf in both traces.

    Attributes:
      name: its name in a message.
      role: its role for the batch.
      micro, full: its type in a part and in the full batch.
      from_batch: whether it depends on inputs that are split.
      from_inputs: whether it depends on any input.
      from_totals: whether it depends on values that are computed for the full batch beforehand.
      word: the user's word for it, one of `Reduce`.
      is_own_word: whether the word is for this output, not one for all.
    """

    name: str
    role: Role
    micro: Any
    full: Any
    from_batch: bool = False
    from_inputs: bool = False
    from_totals: bool = False
    word: str = "auto"
    is_own_word: bool = False

    @property
    def scaling_axes(self) -> tuple[int, ...]:
        return scaling_axes(self.micro.shape, self.full.shape)


def output_words(reduce: Any, outputs: Any) -> tuple[list[str], bool]:
    """Word of every output leaf, and True if the user gave a tree of words, not one for all.

    Args:
      reduce: a word, None for "auto", or a tree of them that is a prefix of the outputs' tree.
      outputs: a tree with the outputs' structure.

    Raises:
      ValueError: `reduce` is another tree, or has a leaf that is no word.
    """
    check_words(reduce)
    if reduce is None or isinstance(reduce, str):
        # One word for all is a default; it contradicts no output that needs another one.
        return [reduce or "auto"] * len(jax.tree.leaves(outputs)), False
    words: list[str] = []  # of every output leaf, the tree of words being a prefix
    try:
        jax.tree.map(
            # `part` is the subtree of outputs below this word.
            lambda word, part: words.extend([word or "auto"] * len(jax.tree.leaves(part))),
            reduce,
            outputs,
            is_leaf=_is_word,
        )
    except ValueError as error:
        raise ValueError(
            f"reduce must be a word or a tree of words that is a prefix of the outputs' tree "
            f"{jax.tree.structure(outputs)}, got {reduce!r}. Give a word for each output, or "
            "'auto'."
        ) from error
    return words, True


def check_words(reduce: Any) -> None:
    """Refuse a `reduce` with a leaf that is no word.

    Raises:
      ValueError: naming the leaf.
    """
    for word in jax.tree.leaves(reduce, is_leaf=_is_word):
        if word is not None and word not in get_args(Reduce):
            listed = ", ".join(map(repr, get_args(Reduce)))
            raise ValueError(f"reduce must be {listed}, or a tree of these, got {word!r}.")


def _is_word(x: Any) -> bool:
    return x is None or isinstance(x, str)


@dataclass(frozen=True)
class OutputAnalysis:
    """Decides how outputs combine over `parts` parts.

    Attributes:
      per_microbatch: whether statistics of a part are accepted for those of the batch.
    """

    parts: Parts
    per_microbatch: bool

    def state(self, output: TracedOutput) -> OutputRole:
        """Role of new state: "whole" if no example touches it, "state" if microbatches update it.

        Raises:
          BatchError: it depends on the examples, and `batch_statistics` does not allow that.
        """
        role = output.role
        if isinstance(role, Replicated) and same(role.ratio, 1):
            # Running statistics of a part look replicated once its mean is accepted as the batch's.
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
        """Role of any other output.

        Raises:
          BatchError: the parts do not combine to it, or not as its word says.
        """
        role = output.role
        if isinstance(role, NotSeparable):
            return self._not_separable(output, role)
        # [batch, ...]: rows of each example, or a constant for each.
        if isinstance(role, Split) or output.scaling_axes:
            assert isinstance(role, Split | Replicated)
            return self._rows(output, role)
        if isinstance(role, PartialExtreme):
            return self._extreme(output, role)
        assert isinstance(role, Replicated | PartialSum), role
        if isinstance(role, PartialSum):
            return self._reduced(output, role.ratio)
        # In every part the same, a statistic of the part, or a factor such as its length.
        if (self.per_microbatch and output.from_batch) or not same(role.ratio, 1):
            # full = ratio * part = ratio / parts * (sum of the parts)
            return self._reduced(output, role.ratio / self.parts)
        # A total that is computed for the full batch is a sum or count, and the same for all parts.
        is_total = output.from_totals and output.word != "rows"
        if output.is_own_word and output.word in ("sum", "count", "rows") and not is_total:
            raise _contradiction(output, "is the same for every part of the batch", "auto")
        return OutputRole("whole")

    def _not_separable(self, output: TracedOutput, role: NotSeparable) -> OutputRole:
        if not self.per_microbatch or not role.is_excusable:
            raise BatchError(
                f"{_capital(output.name)} does not follow from the results for {self.parts} parts "
                f"of the batch: {role}.",
                _advice(role),
            )
        # Of each part as asked: its shape says how the parts combine.
        if output.scaling_axes == (0,):
            return OutputRole("rows")
        if output.scaling_axes:
            raise BatchError(_elsewhere(output, output.scaling_axes[0]))
        return self._as_asserted(output)

    def _as_asserted(self, output: TracedOutput) -> OutputRole:
        """Role of an output that only its word decides."""
        if output.word not in COMBINE:
            raise BatchError(
                f"{_capital(output.name)} has no batch axis and depends on statistics of each of "
                f"the {self.parts} parts.",
                "Say how it combines over them: reduce='mean' if it is a mean over the examples, "
                "'sum' if it is a sum. (A guess could be silently wrong.)",
            )
        return _combined(COMBINE[output.word])

    def _rows(self, output: TracedOutput, role: Split | Replicated) -> OutputRole:
        # Constant rows carry no axis in their role: the shapes say where the batch is.
        axis = role.axis if isinstance(role, Split) else output.scaling_axes[0]
        if axis != 0:
            raise BatchError(_elsewhere(output, axis))
        if not same(role.ratio, 1):
            raise BatchError(
                f"{_capital(output.name)} is scaled by the length of the batch: it is "
                f"{float(role.ratio):.6g} times as large for the full batch as for one of its "
                f"{self.parts} parts. Divide by a number of your own, or sum up."
            )
        if output.is_own_word and output.word not in ("auto", "rows"):
            raise _contradiction(output, "has a row for each example", "rows")
        return OutputRole("rows")

    def _extreme(self, output: TracedOutput, role: PartialExtreme) -> OutputRole:
        if output.word not in ("auto", role.which):
            if self.per_microbatch and output.word in COMBINE:
                return _combined(COMBINE[output.word])  # statistics of parts, combined as asked
            raise _contradiction(output, f"is a {role.which} over the examples", role.which)
        return _combined(role.which)

    def _reduced(self, output: TracedOutput, ratio: Ratio) -> OutputRole:
        inferred = self._inferred(ratio)
        if inferred is None:
            raise BatchError(
                f"{_capital(output.name)} depends on the length of the batch other than as a sum "
                f"or mean over the examples: for the full batch it is {float(ratio):.6g} times the "
                f"sum over its {self.parts} parts, where 1 would be a sum and "
                f"{float(1 / self.parts):.6g} a mean. Return a sum or a mean."
            )
        # A sum divided by a total of the batch is what its author calls a mean.
        is_weighted_mean = inferred == "sum" and output.from_totals and output.word == "mean"
        if output.word == "auto" or COMBINE.get(output.word) == inferred or is_weighted_mean:
            return OutputRole("reduced", inferred)
        raise _contradiction(output, f"is a {inferred} over the examples", inferred)

    def _inferred(self, ratio: Ratio) -> Combine | None:
        if same(ratio, 1):  # full = sum of the parts
            return "sum"
        # full = ratio * sum of the parts: 1 is a sum, 1 / parts is a mean.
        return "mean" if same(ratio * self.parts, 1) else None


def roles_of_one_part(
    outputs: Sequence[TracedOutput], batch: int | None, state: Sequence[int]
) -> tuple[OutputRole, ...]:
    """Roles of outputs where the batch is not split and nothing can mix.

    Args:
      outputs: the outputs.
      batch: length of the batch, None if no input has one.
      state: positions of the outputs that are new state.
    """
    return tuple(
        OutputRole("state" if output.from_batch else "whole")
        if position in state
        else _role_of_one_part(output, batch)
        for position, output in enumerate(outputs)
    )


def _role_of_one_part(output: TracedOutput, batch: int | None) -> OutputRole:
    aval = output.micro
    # Without a second trace the leading length decides; for one part all kinds give equal values.
    if aval.shape and aval.shape[0] == batch:  # by shape: with one part nothing is combined
        return OutputRole("rows")
    if aval.shape or not output.from_inputs or not jnp.issubdtype(aval.dtype, jnp.inexact):
        return OutputRole("whole")
    return OutputRole("reduced", "sum" if COMBINE.get(output.word) == "sum" else "mean")


def _combined(combine: Combine) -> OutputRole:
    return OutputRole("extreme" if combine in ("max", "min") else "reduced", combine)


def _contradiction(output: TracedOutput, found: str, word: str) -> BatchError:
    return BatchError(
        f"{_capital(output.name)} {found}, but reduce says {output.word!r}. Pass reduce='auto', or "
        f"a tree of words with {word!r} for this output, or return a {output.word}."
    )


def _elsewhere(output: TracedOutput, axis: int) -> str:
    return (
        f"{_capital(output.name)} has the examples along axis {axis}, of "
        f"{list(output.full.shape)}; parts of the batch are concatenated along axis 0. Transpose "
        "it first."
    )


def _advice(role: NotSeparable) -> str:
    advice = (
        "Use one microbatch without replicas, or change the function so that it treats each "
        "example by itself."
    )
    if not role.is_excusable:
        return advice
    return (
        f"{advice} If each part may be a batch by itself, pass batch_statistics='per_microbatch'."
    )


def _capital(name: str) -> str:
    return name[0].upper() + name[1:]
