"""JaxPP's programs for a subject, run in a separate process and environment.

    PYTHON_OF_JAXPP -m experiments.training.jaxpp_rival SUBJECT STAGES MICROBATCHES

Writes lines of JSON to standard output: first the compile time of every program; then, for every
line read from standard input, one repetition of every program. The unstaged steps are among them,
since this JAX is another one. The environment needs JaxPP and Flax; of layerwise_jax only the
example models are imported, so an older Python is sufficient.
"""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jaxpp.api as jaxpp  # pyright: ignore[reportMissingImports]
import numpy as np
from jaxpp.schedules import GPipe  # pyright: ignore[reportMissingImports]

from experiments.training.stopwatch import timed
from experiments.training.subjects import (
    SUBJECTS,
    Subject,
    accumulating_step,
    descend,
    split,
    unstaged_step,
)


def marked(subject: Subject, last_blocks: Sequence[str]) -> Callable[..., jax.Array]:
    """The loss with JaxPP's markers after the last block of every stage, and at the end."""

    def mark(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        result = next_call(*args, **kwargs)
        ends = context.method_name == "__call__" and context.module.name in last_blocks
        return jaxpp.mark_stage_end(result) if ends else result

    def loss(params: Any, *inputs: jax.Array) -> jax.Array:
        with nn.intercept_methods(mark):
            return jaxpp.mark_stage_end(subject.loss(params, *inputs))

    return loss


def pipelined_step(
    subject: Subject, schedule: Any, mesh: Any, num_microbatches: int
) -> Callable[..., Any]:
    """Step from (params, *batch) to (params, loss), compiled at its first call."""
    loss = marked(subject, subject.last_blocks(schedule.num_stages))

    def step(params: Any, *inputs: jax.Array) -> tuple[Any, jax.Array]:
        def of_microbatch(microbatch: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
            return jax.value_and_grad(lambda p, *x: loss(p, *x) / num_microbatches)(
                params, *microbatch
            )

        losses, grads = jaxpp.treduce(
            of_microbatch, split(inputs, num_microbatches), schedule=schedule
        )
        return descend(params, grads), losses

    return jaxpp.mpmd_jit_with_loop(step, mpmd_mesh=mesh)


def schedules(num_stages: int) -> dict[str, Any]:
    """JaxPP's schedules by the names of the staged runs."""
    named = {
        "1F1B": jaxpp.Std1F1B(num_stages),
        "GPipe": GPipe(num_stages),
        "zero bubble": jaxpp.ZeroBubble(num_stages),
    }
    if num_stages % 2 == 0:
        named["interleaved 1F1B"] = jaxpp.Interleaved1F1B(num_stages, num_stages // 2)
    return named


class Runner:
    """A step and its parameters."""

    def __init__(self, step: Callable[..., Any], subject: Subject, num_microbatches: int):
        self.step, self.params = step, subject.params
        self.batch = subject.batch(num_microbatches)

    def advance(self) -> dict[str, float]:
        """Takes one step: seconds, and the loss before it."""
        seconds, (self.params, loss) = timed(lambda: self.step(self.params, *self.batch))
        return {"wall": seconds.wall, "cpu": seconds.cpu, "loss": float(np.sum(on_host(loss)))}


def on_host(x: Any) -> np.ndarray:
    """A JAX or JaxPP array as a numpy array."""
    local = getattr(x, "to_mpmd_local_array", x)
    return np.asarray(local[0] if isinstance(local, list) else local)


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def pipelined_steps(
    subject: Subject, num_stages: int, num_microbatches: int
) -> dict[str, Callable[..., Any]]:
    steps = {}
    for name, schedule in schedules(num_stages).items():
        devices = np.array(jax.devices()[: getattr(schedule, "mpmd_dim", num_stages)])
        mesh = jaxpp.MpmdMesh(jax.sharding.Mesh(devices, ("stage",)), "stage")
        steps[f"JaxPP {name}"] = pipelined_step(subject, schedule, mesh, num_microbatches)
    return steps


def main(subject_name: str, num_stages: int, num_microbatches: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", num_stages)
    subject = SUBJECTS[subject_name]()
    steps = {"unstaged": jax.jit(unstaged_step(subject))}
    steps["accumulating"] = jax.jit(accumulating_step(subject, num_microbatches))
    steps |= pipelined_steps(subject, num_stages, num_microbatches)
    runners = {name: Runner(step, subject, num_microbatches) for name, step in steps.items()}
    first, failures = {}, {}
    for name, runner in list(runners.items()):
        try:
            first[name] = runner.advance()
        except (
            Exception
        ) as error:  # whatever it fails with belongs in the table, beside what it can do
            failures[name] = f"{type(error).__name__}: {error}"
            del runners[name]
    say(jax=jax.__version__, jaxpp=jaxpp.__version__, first=first, failures=failures)
    for _ in sys.stdin:
        say(steps={name: runner.advance() for name, runner in runners.items()})


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python -m experiments.training.jaxpp_rival SUBJECT STAGES MICROBATCHES")
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
