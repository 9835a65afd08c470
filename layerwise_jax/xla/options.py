"""XLA:GPU options that change a stage's working set, as named choices that are tried on a program.

Options are set for one program (`compiler_options`), never for the process. No XLA option keeps
weights in L2: the scheduler's memory limit ignores arguments, and the configured cache size changes
nothing. Options do change the workspace that a program needs in addition to its weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from layerwise_jax.xla.aot import Options

# Timings of one program vary by this factor from run to run; smaller slowdowns are ignored.
TIMING_NOISE = 1.03
NOTHING_PINS_L2 = (
    "No XLA option keeps weights in L2; a smaller working set makes it likely that they stay."
)


class OptionError(ValueError):
    """The compiler does not know an option, or refuses its value."""


@dataclass(frozen=True)
class Choice:
    """Named setting of options.

    Attributes:
      name: short description of the effect.
      options: values by XLA option.
      reason: expected effect on workspace or time.
      evidence: measured effect.
    """

    name: str
    options: Options
    reason: str
    evidence: str


CHOICES = (
    Choice(
        name="no split-K",
        options={"xla_gpu_experimental_force_split_k": 1},
        reason=(
            "Split-K parts the sum of a product and holds every part's result in float32 "
            "until they are added."
        ),
        evidence=(
            "An MLP of 2048 x 8192 in float16 on 64 rows, compiled for an H100: 9.4 MB of "
            "workspace, then 1.0."
        ),
    ),
    Choice(
        name="library products",
        options={"xla_gpu_enable_triton_gemm": False},
        reason=(
            "cuBLASLt takes a workspace of fixed size instead of one that grows with the product."
        ),
        evidence=(
            "The same MLP: 5.2 MB. A scan over layers of 1024 x 4096: 34 MB instead of 21. "
            "It depends."
        ),
    ),
    Choice(
        name="double-buffered loops",
        options={"xla_gpu_enable_while_loop_double_buffering": True},
        reason="Two turns in one body spare the copy that hands a turn's result to the next.",
        evidence=(
            "Resident chains, psum and ppermute ticks and small decode on an H200: within 3 "
            "% of the default."
        ),
    ),
)
HAZARDS = (
    Choice(
        name="command buffers off",
        options={"xla_gpu_enable_command_buffer": ""},
        reason="Every kernel is then launched by the host, one by one.",
        evidence="Decode on an H200 took twice as long.",
    ),
    Choice(
        name="collectives and loops in command buffers",
        options={"xla_gpu_enable_command_buffer": "COLLECTIVES,WHILE"},
        reason="The loop over ticks holds a ppermute, which cannot be recorded.",
        evidence="Programs with ppermute failed on an H200 (JAX 0.11.2).",
    ),
    Choice(
        name="unrolled loops",
        options={"xla_gpu_enable_while_loop_unrolling": "WHILE_LOOP_UNROLLING_FULL_UNROLL"},
        reason=(
            "The loop over ticks is as long as the batch is, and unequal stages branch inside it."
        ),
        evidence="Loops with a switch failed on an H200 (JAX 0.11.2).",
    ),
)


class Sized(Protocol):
    """Interface of a compiled program with sizes in bytes, such as `aot.CompiledProgram`."""

    @property
    def temp_bytes(self) -> int: ...

    @property
    def peak_bytes(self) -> int: ...


@dataclass(frozen=True)
class Trial:
    """Trial of one choice on top of the accepted ones; sizes are None if it did not compile.

    Attributes:
      name: the choice.
      accepted: True if the choice was kept.
      verdict: reason in words.
      temp_bytes, peak_bytes: workspace and peak memory of the program compiled with it.
      seconds: time of a run; None if not timed.
    """

    name: str
    accepted: bool
    verdict: str
    temp_bytes: int | None
    peak_bytes: int | None
    seconds: float | None = None


@dataclass(frozen=True)
class OptionsReport:
    """Options that `choose_options` chose, with all trials; the first is the compiler's default."""

    options: Options
    trials: tuple[Trial, ...]

    @property
    def before(self) -> Trial:
        return self.trials[0]

    @property
    def after(self) -> Trial:
        return [trial for trial in self.trials if trial.accepted][-1]

    def __str__(self) -> str:
        rows = [_row(trial) for trial in self.trials]
        chosen = (
            ", ".join(f"{name}={value!r}" for name, value in self.options.items())
            or "the compiler's defaults"
        )
        change = f"workspace {self.before.temp_bytes} B before, {self.after.temp_bytes} B after"
        return "\n".join([*rows, f"chosen: {chosen}; {change}", NOTHING_PINS_L2])


def check_options(options: Options, compile_with: Callable[[Options], object]) -> None:
    """Check that the compiler knows every option and accepts its value.

    Args:
      options: values by XLA option.
      compile_with: function that compiles a small program with the given options.

    Raises:
      OptionError: the compiler refuses options; the message names each.
    """
    refused = []
    for name, value in options.items():
        try:
            compile_with({name: value})
        except RuntimeError as error:
            if "INVALID_ARGUMENT" not in str(error):
                raise
            refused.append(
                f"{name}={value!r} "
                f"({str(error).removeprefix('INVALID_ARGUMENT: ').splitlines()[0]})"
            )
    if refused:
        raise OptionError(
            f"options must be known to the compiler, got {', '.join(refused)}. Leave these out."
        )


def hazards(options: Options) -> tuple[str, ...]:
    """Warnings about options that are known to slow or break the loop over ticks."""
    return tuple(
        f"{hazard.name}: {hazard.reason} {hazard.evidence}"
        for hazard in HAZARDS
        if all(options.get(name) == value for name, value in hazard.options.items())
    )


def choose_options[Program: Sized](
    compile_with: Callable[[Options], Program],
    choices: Sequence[Choice] = CHOICES,
    run_seconds: Callable[[Program], float] | None = None,
) -> OptionsReport:
    """Greedy search for the options with the smallest working set.

    Each choice is tried on top of the accepted ones. It is kept if workspace and peak do not grow,
    one of them shrinks, and timed runs are not slower. Choices that do not compile are skipped.

    Args:
      compile_with: function that compiles the program with the given options.
      choices: choices in the order of trial.
      run_seconds: function that times a run of a compiled program; None without a device.
    """
    program = compile_with({})
    seconds = run_seconds(program) if run_seconds else None
    best = Trial(
        "default", True, "as the compiler would", program.temp_bytes, program.peak_bytes, seconds
    )
    trials, options = [best], {}
    for choice in choices:
        trial = _try(choice, {**options, **choice.options}, compile_with, run_seconds, best)
        trials.append(trial)
        if trial.accepted:
            best, options = trial, {**options, **choice.options}
    return OptionsReport(options, tuple(trials))


def _try[Program: Sized](
    choice: Choice,
    options: Options,
    compile_with: Callable[[Options], Program],
    run_seconds: Callable[[Program], float] | None,
    best: Trial,
) -> Trial:
    """Trial of a choice against the best so far."""
    try:
        program = compile_with(options)
        seconds = run_seconds(program) if run_seconds else None
    except RuntimeError as error:
        return Trial(
            choice.name, False, f"does not compile or run: {_first_line(error)}", None, None
        )
    temp, peak = program.temp_bytes, program.peak_bytes
    verdict = _objection(best, temp, peak, seconds)
    return Trial(choice.name, verdict is None, verdict or "smaller", temp, peak, seconds)


def _objection(best: Trial, temp: int, peak: int, seconds: float | None) -> str | None:
    """Reason why sizes and seconds are no better than the best; None if they are better."""
    assert best.temp_bytes is not None
    assert best.peak_bytes is not None
    if temp > best.temp_bytes or peak > best.peak_bytes:
        return "larger"
    if temp == best.temp_bytes and peak == best.peak_bytes:
        return "no smaller"
    if seconds is not None and best.seconds is not None and seconds > best.seconds * TIMING_NOISE:
        return "slower"
    return None


def _row(trial: Trial) -> str:
    sizes = (
        ""
        if trial.temp_bytes is None
        else f"workspace {trial.temp_bytes:>12} B, peak {trial.peak_bytes:>12} B, "
    )
    timed = "" if trial.seconds is None else f"{trial.seconds * 1e6:.1f} us, "
    return f"{'+' if trial.accepted else '-'} {trial.name:<24} {sizes}{timed}{trial.verdict}"


def _first_line(error: Exception) -> str:
    return re.split(r"\n", str(error).strip(), maxsplit=1)[0][:120]
