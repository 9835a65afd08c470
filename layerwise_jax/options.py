"""Options of a staged function: the choices that `layerwise` and `build_pipeline` share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from layerwise_jax._arguments import updated_options
from layerwise_jax.batch.outputs import check_words
from layerwise_jax.schedule.registry import SCHEDULES, ScheduleName
from layerwise_jax.schedule.table import Schedule
from layerwise_jax.stage.state import StatePick

Remat = Literal["stage", "cheap"]
Executor = Literal["auto", "loop", "host"]

# The words of every option that takes one; None is allowed beside them.
WORDS: Mapping[str, tuple[str, ...]] = {
    "batch_statistics": ("per_microbatch",),
    "remat": get_args(Remat),
}


@dataclass(frozen=True)
class PipelineOptions:
    """Choices of how a function is staged and run. Each value is checked when it is made.

    Attributes:
      in_axes: as in `jax.vmap`, over the inputs: 0 for an input that microbatches split along its
        leading axis, None for one that every microbatch gets whole. Random keys and scalars are
        never split.
      reduce: how outputs without a batch axis combine over microbatches. "auto" infers it for each;
        "mean", "sum", "count", "max" or "min" asserts it for all, a tree of words (with "rows" for
        outputs with a batch axis) for each. None is "auto".
      state: picks from the function's outputs new values of some parameters (running averages): a
        tree with the paths that they have in the parameters. "mutated" takes every nnx Variable
        that the function mutates. A call then returns (value, placed parameters with the new
        state). State that no example touches is replaced once a call; other state is updated by
        the microbatches in their order.
      batch_statistics: "per_microbatch" accepts operations that mix the examples of a batch; each
        microbatch is then a batch for them. None refuses such operations.
      schedule: order of forwards and backwards in training: a name, or a `Schedule`.
      remat: "stage" recomputes a stage's forward in its backward; "cheap" keeps products,
        convolutions and attention and recomputes the rest; None stashes residuals, as the
        function's own `jax.checkpoint` policies leave them.
      trainable: parameters that `value_and_grad` differentiates: a tree of booleans with the
        parameters' structure or a prefix of it, or a function from their types to one. None trains
        all.
      skip_bubbles: whether an idle device branches around its work. None chooses: a branch on
        emulated devices, which share a processor; masked work on accelerators, which wait anyway.
      bubble_fill: fill value for the inputs of idle ticks. Tests pass NaN to show that none leaks.
      executor: "loop" runs all stages in one program, which jit, grad and vmap accept; "host" runs
        each as separate programs, driven by a thread per device, for training with long ticks.
        "auto" chooses.
      xla_options: compiler options of executor "host"'s programs.

    Raises:
      ValueError: a value is not one of those above; the message names the option.
    """

    in_axes: Any = 0
    reduce: Any = "auto"
    state: StatePick = None
    batch_statistics: Literal["per_microbatch"] | None = None
    schedule: ScheduleName | Schedule = "1f1b"
    remat: Remat | None = "stage"
    trainable: Any = None
    skip_bubbles: bool | None = None
    bubble_fill: float = 0.0
    executor: Executor = "auto"
    xla_options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_words(self.reduce)
        for name, words in WORDS.items():
            _check_word(name, getattr(self, name), (*words, None))
        _check_word("executor", self.executor, get_args(Executor))
        if not isinstance(self.schedule, Schedule):
            _check_word("schedule", self.schedule, tuple(SCHEDULES), "or a Schedule")
        if self.state not in (None, "mutated") and not callable(self.state):
            raise ValueError(
                f"state must be a function of fn's outputs, 'mutated' or None, got {self.state!r}. "
                "Pass for example lambda out: out[1], where fn returns (value, new state)."
            )
        if self.skip_bubbles not in (True, False, None):
            raise ValueError(
                f"skip_bubbles must be True, False or None, got {self.skip_bubbles!r}."
            )

    def updated(self, **choices: Any) -> PipelineOptions:
        """These options with some of them replaced.

        Raises:
          TypeError: an option of that name does not exist.
          ValueError: a value is refused.
        """
        return updated_options(self, choices)


def _check_word(name: str, value: Any, words: tuple[str | None, ...], other: str = "") -> None:
    """Refuse a value that is none of an option's words."""
    if not isinstance(value, str | None) or value not in words:
        listed = ", ".join(repr(word) for word in words[: len(words) if other else -1])
        raise ValueError(f"{name} must be {listed} {other or f'or {words[-1]!r}'}, got {value!r}.")
