"""Training text of the quickstart, as bytes, and random windows of it."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PATH = Path(__file__).with_name("text.txt")


def read_text() -> bytes:
    """The text that the package ships: English prose, ASCII, about 4,400 bytes."""
    return PATH.read_bytes()


def draw_batches(
    text: bytes, steps: int, batch: int, length: int, seed: int = 0
) -> NDArray[np.int32]:
    """Random windows of `text`, int32[steps, batch, length]; equal for equal seeds.

    Raises:
      ValueError: the text is shorter than a window.
    """
    if len(text) < length:
        raise ValueError(
            f"text must have at least {length} bytes (one window), got {len(text)}. "
            "Use a longer text or a shorter window."
        )
    draw = np.random.default_rng(seed)
    starts = draw.integers(0, len(text) - length + 1, size=(steps, batch, 1))
    windows = starts + np.arange(length)  # [steps, batch, length], positions in the text
    return np.frombuffer(text, dtype=np.uint8)[windows].astype(np.int32)
