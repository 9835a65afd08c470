"""Processes of a run on this machine: started together, killed one by one, awaited together."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# A process that outlives the heartbeat by so much hangs.
PATIENCE_SECONDS = 180


class Ended(NamedTuple):
    """The end of one process.

    Attributes:
      status: its exit status, negative for a signal.
      messages: the end of its standard error.
    """

    status: int
    messages: str


class Cluster:
    """Worker processes of one run, with a coordinator on a free port of this machine."""

    def __init__(self, processes: int, flags: Sequence[str], directory: Path):
        """Start the processes; their output goes to files in `directory`."""
        coordinator = f"127.0.0.1:{free_port()}"
        self.logs = [directory / f"process_{i}.log" for i in range(processes)]
        self.running = []
        for i, log in enumerate(self.logs):
            command = [
                sys.executable,
                *("-m", "experiments.multihost.worker"),
                *(f"--processes={processes}", f"--process={i}", f"--coordinator={coordinator}"),
                *(*flags, f"--directory={directory}"),
            ]
            with log.open("wb") as file:
                self.running.append(
                    subprocess.Popen(
                        command, stdout=file, stderr=subprocess.STDOUT, env=dict(os.environ)
                    )
                )

    def kill(self, process: int) -> None:
        """End one process at once, as a machine that fails does."""
        self.running[process].kill()

    def is_running(self) -> bool:
        """True while no process has ended."""
        return all(process.poll() is None for process in self.running)

    def wait(self) -> list[Ended]:
        """The ends of all processes; what hangs is ended.

        Raises:
          TimeoutExpired: a process hung.
        """
        try:
            statuses = [process.wait(PATIENCE_SECONDS) for process in self.running]
        finally:
            for process in self.running:
                process.kill()
        texts = [log.read_text(errors="replace") for log in self.logs]
        return [Ended(s, text[-4000:]) for s, text in zip(statuses, texts, strict=True)]


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
