"""Mailboxes: hand one array from the thread that makes it to the one that reads it. New ones for
every step.
"""

from __future__ import annotations

from collections.abc import Iterable
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple


class Key(NamedTuple):
    """A message: an activation on its way to a consumer, or its cotangent on the way back.

    Attributes:
      kind: "activation" or "cotangent".
      value: the value of the program.
      consumer: the stage that reads the value.
      microbatch: the microbatch.
    """

    kind: str
    value: int
    consumer: int
    microbatch: int


class StoppedError(Exception):
    """Another column has failed, so that a message will not come."""


class Mailboxes:
    """One single-use mailbox for every message of a step."""

    def __init__(self, keys: Iterable[Key]):
        self._boxes: dict[Key, SimpleQueue[Any]] = {key: SimpleQueue() for key in keys}

    def put(self, key: Key, array: Any) -> None:
        self._boxes[key].put(array)

    def get(self, key: Key, *, wait: bool) -> Any:
        """The message; waits for it, or (one thread runs all columns) takes it for granted that it
        is there.

        Raises:
          StoppedError: another column has failed.
        """
        try:
            item = self._boxes[key].get(block=wait)
        except Empty:
            raise AssertionError(
                f"{key} is read before it is written: the schedule's order is wrong"
            ) from None
        if item is _STOP:
            raise StoppedError
        return item

    def stop(self) -> None:
        """Wake every thread that waits, or will wait."""
        for box in self._boxes.values():
            box.put(_STOP)


_STOP = object()
