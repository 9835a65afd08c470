"""Step times of all programs of a subject, measured in turns."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from experiments.training.staging import (
    DIFFERENTIATED,
    SCHEDULED,
    STORED,
    Program,
    device_bytes,
    staged_program,
    unstaged_programs,
)
from experiments.training.stopwatch import timed
from experiments.training.subjects import SUBJECTS

ROOT = Path(__file__).parents[2]
WAYS = (DIFFERENTIATED, *SCHEDULED, *STORED)


@dataclass(eq=False)
class Runner:
    """A compiled step and its parameters."""

    program: Program
    compiled: Callable[..., Any]
    params: Any
    figures: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def compile(cls, program: Program) -> Runner:
        lower = jax.jit(program.step).lower
        seconds, compiled = timed(lambda: lower(program.params, *program.batch).compile())
        return cls(
            program,
            compiled,
            program.params,
            {"compile_seconds": seconds.wall, "bytes": device_bytes(compiled, program.batch)},
        )

    def advance(self) -> dict[str, float]:
        """Takes one step: seconds, and the loss before it."""
        seconds, (self.params, loss) = timed(
            lambda: self.compiled(self.params, *self.program.batch)
        )
        return {"wall": seconds.wall, "cpu": seconds.cpu, "loss": float(loss)}


class Rival:
    """JaxPP in a separate process, which takes one step of each of its programs per request."""

    def __init__(self, python: str, subject: str, num_stages: int, num_microbatches: int):
        """Start it; it compiles until `first` is read."""
        arguments = [
            "-m",
            "experiments.training.jaxpp_rival",
            subject,
            str(num_stages),
            str(num_microbatches),
        ]
        self.process = subprocess.Popen(
            [python, *arguments], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.first = self._answer()

    def advance(self) -> dict[str, dict[str, float]]:
        """Takes a step of every program, as `Runner.advance` does."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()["steps"]

    def close(self) -> None:
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"JaxPP's process ended with {self.process.wait()}; its own words are above."
            )
        return json.loads(line)


def measure_subject(
    name: str,
    num_stages: int,
    num_microbatches: int,
    repetitions: int,
    jaxpp_python: str | None,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Time every way of training one subject, in turns.

    Args:
      name: of `SUBJECTS`.
      num_stages: stages; schedules with two stages a device take half as many devices.
      num_microbatches: parts of the batch.
      repetitions: timed steps of every program, after one that is not counted.
      jaxpp_python: an interpreter in which JaxPP can be imported; None to go without.
      progress: told of every program compiled and every round of repetitions.

    Returns:
      The subject's title, `programs` by name (samples of wall and CPU seconds, losses, compile
      seconds, bytes), and `rival` likewise, or None.
    """
    subject = SUBJECTS[name]()
    programs = unstaged_programs(subject, num_microbatches)
    programs += [staged_program(subject, way, num_stages, num_microbatches) for way in WAYS]
    runners = []
    for program in programs:
        runners.append(Runner.compile(program))
        progress(f"{name}: {program.name} compiled")
    rival = Rival(jaxpp_python, name, num_stages, num_microbatches) if jaxpp_python else None
    progress(f"{name}: JaxPP {'compiled' if rival else 'not run'}")
    rounds, rival_rounds = [], []
    for turn in range(repetitions + 1):
        rounds.append({runner.program.name: runner.advance() for runner in runners})
        if rival:
            rival_rounds.append(rival.advance())
        progress(f"{name}: round {turn}")
    figures: dict[str, Any] = {"title": subject.title, "rival": None}
    figures["programs"] = {
        runner.program.name: runner.figures | samples(rounds, runner.program.name)
        for runner in runners
    }
    if rival:
        rival.close()
        figures["rival"] = rival_figures(rival.first, rival_rounds)
    return figures


def samples(rounds: Sequence[dict[str, dict[str, float]]], program: str) -> dict[str, Any]:
    """Seconds of one program without the first round, and its losses."""
    steps = [turn[program] for turn in rounds]
    return {
        "wall_seconds": [step["wall"] for step in steps[1:]],
        "cpu_seconds": [step["cpu"] for step in steps[1:]],
        "losses": [step["loss"] for step in steps],
    }


def rival_figures(
    first: dict[str, Any], rounds: Sequence[dict[str, dict[str, float]]]
) -> dict[str, Any]:
    """Figures of the rival in the format of the staged runs."""
    programs = {}
    for name, step in first["first"].items():
        found = samples(rounds, name)
        usual = statistics.median(found["wall_seconds"])
        programs[name] = found | {
            "compile_seconds": step["wall"] - usual,
            "losses": [step["loss"], *found["losses"][:-1]],
        }
    return {
        "jax": first["jax"],
        "jaxpp": first["jaxpp"],
        "programs": programs,
        "failures": first["failures"],
    }
