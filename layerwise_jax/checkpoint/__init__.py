"""Checkpoints in the user's own parameter tree."""

from layerwise_jax.checkpoint.leaves import CheckpointError
from layerwise_jax.checkpoint.save import (
    Checkpoint,
    checkpoint_steps,
    read_checkpoint,
    restore_checkpoint,
    save_checkpoint,
)
from layerwise_jax.checkpoint.writer import CheckpointWriter

__all__ = [
    "Checkpoint",
    "checkpoint_steps",
    "read_checkpoint",
    "restore_checkpoint",
    "save_checkpoint",
    "CheckpointError",
    "CheckpointWriter",
]
