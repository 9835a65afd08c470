"""Checkpoints written in the background, while training goes on."""

from __future__ import annotations

from typing import Any, Self

import jax
import numpy as np

from layerwise_jax.checkpoint.files import check_new_step, open_to_write, start_step
from layerwise_jax.checkpoint.save import (
    OPTIMIZER_STATE,
    PARAMS,
    Directory,
    StateMover,
    home_of,
    trees_to_save,
)
from layerwise_jax.pipeline import Pipeline
from layerwise_jax.stage.placement import Staged


class CheckpointWriter:
    """Writer of checkpoints that returns as soon as the arrays are copied.

        with lw.CheckpointWriter(directory, pipeline, step.optimizer, keep=3) as writer:
            for number, batch in enumerate(batches):
                staged, state, loss = step(staged, state, batch)
                writer.save(number, staged, state)

    The files are those of `save_checkpoint`. A step gets its name when all of it is on disk, by
    every process; `save` waits for the step before it, and leaving the block waits for the last.
    """

    def __init__(
        self,
        directory: Directory,
        pipeline: Pipeline,
        optimizer: StateMover | None = None,
        keep: int | None = None,
    ):
        """Open a directory of steps; the arguments are those of `save_checkpoint`."""
        self._home = home_of(directory)
        self._pipeline = pipeline
        self._optimizer = optimizer
        self._keep = keep
        self._orbax = open_to_write(self._home, (PARAMS, OPTIMIZER_STATE), keep, in_background=True)

    def save(self, step: int, staged: Staged, optimizer_state: Any = None) -> None:
        """Copy placed parameters and optimizer state, and start to write them.

        The arguments may be donated afterwards.

        Raises:
          ValueError: as `save_checkpoint`; also whatever failed in the save before.
        """
        self.wait()
        check_new_step(self._home, step, self._keep)
        trees = trees_to_save(self._pipeline, staged, optimizer_state, self._optimizer)
        # numpy may view memory that the next training step is given to overwrite.
        own = jax.tree.map(lambda x: np.array(x) if isinstance(x, np.ndarray) else x, trees)
        start_step(self._orbax, step, own)

    def wait(self) -> None:
        """Wait until every save is on disk; raises what failed."""
        self._orbax.wait_until_finished()

    def close(self) -> None:
        """Wait for every save, and release the directory."""
        self.wait()
        self._orbax.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
