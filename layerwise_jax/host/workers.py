"""Worker threads, one per device column, kept from step to step; mailboxes, new for every step.

A mailbox hands one array from the thread that makes it to the one that reads it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import jax

# How often a caller that waits wakes up, so that Ctrl-C reaches it. Seconds.
WAKE_SECONDS = 0.2

Job = Callable[[], None]


class Workers:
    """Threads that each run one job a step.

    Threads are daemons and hold no reference to this object: they end when it is closed or
      collected.
    """

    def __init__(self, count: int):
        self._jobs: list[SimpleQueue[Any]] = [SimpleQueue() for _ in range(count)]
        for column, jobs in enumerate(self._jobs):
            threading.Thread(
                target=_work, args=(jobs,), name=f"lw-column-{column}", daemon=True
            ).start()
        self.close = weakref.finalize(self, _close, self._jobs)

    def run(self, jobs: Sequence[Job], stop: Callable[[], None]) -> list[BaseException | None]:
        """Run one job in each thread and wait for all.

        Args:
          jobs: one for every thread.
          stop: makes all jobs return soon; called when a job fails and on Ctrl-C.

        Returns:
          Every job's exception, or None.
        """
        failures: list[BaseException | None] = [None] * len(jobs)
        # Counts finished jobs; acquire with a timeout lets Ctrl-C through.
        left = threading.Semaphore(0)
        x64 = bool(
            jax.config.read("jax_enable_x64")
        )  # contexts of the caller are not those of a thread

        def guarded(column: int, job: Job) -> None:
            try:
                with jax.enable_x64(x64):
                    job()
            except BaseException as error:
                failures[column] = error
                stop()
            finally:
                left.release()

        for column, (queue, job) in enumerate(zip(self._jobs, jobs, strict=True)):
            # Defaults bind the loop's values now.
            queue.put(lambda column=column, job=job: guarded(column, job))
        waiting = len(jobs)
        try:
            while waiting:
                waiting -= left.acquire(timeout=WAKE_SECONDS)
        except BaseException:
            stop()
            while waiting:  # jobs use the step's arrays: leave only once they have returned
                waiting -= left.acquire(timeout=WAKE_SECONDS)
            raise
        return failures


def _work(jobs: SimpleQueue[Any]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # a finished step's arrays must not live until the next one


def _close(jobs: Sequence[SimpleQueue[Any]]) -> None:
    for queue in jobs:
        queue.put(None)


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
        """The message; waits for it, or with `wait=False` (one thread) requires that it is there.

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
            # Also in boxes that have a message: that message is taken first.
            box.put(_STOP)


_STOP = object()
