"""One process of a training run: a transformer in stages over the devices of all processes.

    python -m experiments.multihost.worker --processes=2 --process=0 --coordinator=127.0.0.1:4321

The launcher `experiments.multihost` starts one per process. Where a cluster's scheduler starts the
processes (SLURM, MPI, Kubernetes), leave these three flags out: JAX finds their values itself.
"""

import json
from pathlib import Path

from absl import app, flags, logging

PROCESSES = flags.DEFINE_integer("processes", None, "processes of the run; None: found by JAX")
PROCESS = flags.DEFINE_integer("process", None, "index of this process; None: found by JAX")
COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0; None: found by JAX")
EMULATED = flags.DEFINE_integer(
    "emulated", 0, "emulated CPU devices of this process; 0: the devices that are there"
)
STEPS = flags.DEFINE_integer("steps", 40, "training steps in all, restarts included")
EVERY = flags.DEFINE_integer("save_every", 4, "steps between checkpoints", lower_bound=1)
DIRECTORY = flags.DEFINE_string("directory", "build/multihost", "folder of checkpoints and losses")
HEARTBEAT = flags.DEFINE_integer(
    "heartbeat", 10, "seconds after which a silent process counts as dead", lower_bound=1
)
CONNECT = flags.DEFINE_integer(
    "connect", 60, "seconds within which all processes must have started", lower_bound=1
)


def main(argv: list[str]) -> None:
    """Train from the last checkpoint, or from the start, to the last step."""
    del argv
    logging.set_verbosity(logging.WARNING)
    import jax

    import layerwise_jax as lw

    if EMULATED.value:
        lw.emulate_devices(EMULATED.value)
    if PROCESSES.value is None or PROCESSES.value > 1:
        jax.distributed.initialize(
            COORDINATOR.value,
            PROCESSES.value,
            PROCESS.value,
            initialization_timeout=CONNECT.value,
            heartbeat_timeout_seconds=HEARTBEAT.value,
        )
    train(Path(DIRECTORY.value), STEPS.value, EVERY.value)


def train(directory: Path, steps: int, save_every: int) -> None:
    """Train, save every few steps, and write the losses as lines of JSON."""
    import jax
    import optax

    import layerwise_jax as lw
    from layerwise_jax.examples import GPT, draw_batches, next_token_loss, read_text

    model = GPT(vocabulary=128, width=32, depth=4, heads=2, context=32)
    batches = draw_batches(read_text(), steps, batch=8, length=33)
    params = jax.device_get(jax.jit(model.init)(jax.random.key(0), batches[0][:, :-1]))
    pipeline = lw.layerwise(
        next_token_loss(model), params, batches[0], reduce="mean", capacity=None, num_microbatches=4
    )
    is_main = jax.process_index() == 0
    if is_main:
        print(pipeline.plan, flush=True)

    step = pipeline.train_step(optax.adamw(1e-2))
    placed = pipeline.place(params)
    state = step.init(placed)
    done = 0
    if lw.checkpoint_steps(directory / "steps"):
        saved = lw.restore_checkpoint(
            directory / "steps", pipeline, state, optimizer=step.optimizer
        )
        done, placed, state = saved.step, saved.params, saved.optimizer_state
    with (directory / "losses.jsonl").open("a") as log:
        for number in range(done, steps):
            placed, state, loss = step(placed, state, batches[number])
            if is_main:
                log.write(json.dumps({"step": number, "loss": float(loss)}) + "\n")
                log.flush()
            if (number + 1) % save_every == 0:
                lw.save_checkpoint(
                    directory / "steps",
                    number + 1,
                    pipeline,
                    placed,
                    state,
                    optimizer=step.optimizer,
                    keep=2,
                )


if __name__ == "__main__":
    app.run(main)
