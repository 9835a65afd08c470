"""kill -9 at random moments of saving: no step that was reported as saved is lost or changed."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from layerwise_jax.checkpoint.files import read_step, saved_steps, write_step

KEEP = 2
LONGEST_DELAY = 0.5  # seconds from the first save to the kill; a save takes about a tenth


def tree_of(step: int) -> dict[str, Any]:
    """Values of a step: two arrays, one of them large enough for several writes."""
    return {
        "params": {"small": np.full(3, step), "large": np.full((300, 300), step, np.float32)},
        "optimizer_state": {"count": np.int32(step)},
    }


def save_on_and_on(directory: str, first: int, reports: Any) -> None:
    """Save step after step and report each once it is on disk; runs until it is killed."""
    step = first
    while True:
        trees = tree_of(step)
        write_step(Path(directory), step, trees, KEEP)
        reports.send(step)
        step += 1


class Saver:
    """Directory of steps, and processes that save into it until they are killed."""

    def __enter__(self) -> Saver:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self._directory = Path(tempfile.mkdtemp(prefix="soak-kills-"))
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._directory)

    def check(self, seed: int, index: int) -> str:
        """Kill a process that saves, then read all steps that are left."""
        rng = np.random.default_rng([seed, index])
        before = max(saved_steps(self._directory), default=0)
        reader, writer = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=save_on_and_on, args=(str(self._directory), before + 1, writer)
        )
        process.start()
        writer.close()
        assert process.pid is not None
        last = reader.recv()  # the first save is done
        time.sleep(rng.uniform(0, LONGEST_DELAY))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        while reader.poll():
            try:
                last = reader.recv()
            except EOFError:
                break
        leftovers = len(os.listdir(self._directory))
        steps = saved_steps(self._directory)
        assert steps, "all steps are lost"
        assert steps[-1] >= last, f"saved step {last}, but the latest is {steps[-1]}"
        for step in steps:
            found = read_step(self._directory, step, tree_of(step))
            for item, tree in tree_of(step).items():
                for name, leaf in tree.items():
                    np.testing.assert_array_equal(found[item][name], leaf)
        return "killed while saving" if leftovers > len(steps) else "killed between saves"
