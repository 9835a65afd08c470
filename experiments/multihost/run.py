"""A run that is killed and restarted, and its comparison with one that is not."""

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from experiments import command
from experiments.multihost.launch import Cluster, Ended

# Losses of both runs are float32 sums over the same numbers in another order.
TOLERANCE = 1e-4
POLL_SECONDS = 0.05


class Setup(NamedTuple):
    """A run: processes, emulated devices of each, training steps, kills and their seed."""

    processes: int
    devices: int
    steps: int
    kills: int
    seed: int


class Kill(NamedTuple):
    """One kill: the step that was reached, the process, and the survivors' exit statuses."""

    step: int
    process: int
    survivors: list[int]


def run(setup: Setup, directory: Path, results: Path) -> int:
    """Train with kills and without; print and draw both.

    Returns:
      0 if the losses agree and every survivor of a kill exited with another status than 0.
    """
    console = command.make_console()
    shutil.rmtree(directory, ignore_errors=True)
    alone = directory / "one_process"
    together = directory / "processes"
    for folder in (alone, together):
        folder.mkdir(parents=True)
    console.print(f"one process, {setup.processes * setup.devices} devices")
    flags = [f"--steps={setup.steps}", f"--emulated={setup.processes * setup.devices}"]
    check(Cluster(1, flags, alone).wait())
    kills = train_with_kills(setup, together, console)
    expected = losses(alone)
    found = losses(together)
    worst = max(abs(found[step] - loss) / abs(loss) for step, loss in expected.items())
    console.print(
        f"{len(expected)} losses, {len(kills)} kills; largest difference {worst:.1e} of a loss"
    )
    write(results, setup, expected, found, kills)
    quiet = [kill for kill in kills if 0 in kill.survivors]
    if quiet:
        console.print(f"survivors that exited with 0: {quiet}", style="red")
    return 0 if worst <= TOLERANCE and not quiet else 1


def train_with_kills(setup: Setup, directory: Path, console: Console) -> list[Kill]:
    """Start, kill and restart until all steps are done."""
    draw = random.Random(setup.seed)
    moments = sorted(draw.sample(range(setup.steps), setup.kills))
    flags = [f"--steps={setup.steps}", f"--emulated={setup.devices}"]
    kills = []
    for moment in moments:
        cluster = Cluster(setup.processes, flags, directory)
        while last_step(directory) < moment and cluster.is_running():
            time.sleep(POLL_SECONDS)
        time.sleep(draw.random() / 2)  # somewhere within a step or a save
        victim = draw.randrange(setup.processes)
        cluster.kill(victim)
        ends = cluster.wait()
        survivors = [end.status for i, end in enumerate(ends) if i != victim]
        kills.append(Kill(last_step(directory), victim, survivors))
        console.print(f"process {victim} killed in step {kills[-1].step}; others ended {survivors}")
    check(Cluster(setup.processes, flags, directory).wait())
    return kills


def check(ends: list[Ended]) -> None:
    """Refuse a process that failed, with its last words."""
    for i, end in enumerate(ends):
        if end.status:
            raise RuntimeError(f"process {i} ended with status {end.status}:\n{end.messages}")


def losses(directory: Path) -> dict[int, float]:
    """The loss of every step, from the last process that computed it."""
    lines = (directory / "losses.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {record["step"]: record["loss"] for record in records}


def last_step(directory: Path) -> int:
    """The last step of which the loss is known; -1 before the first."""
    if not (directory / "losses.jsonl").exists():
        return -1
    return max(losses(directory), default=-1)


def write(results: Path, setup: Setup, expected: Any, found: Any, kills: list[Kill]) -> None:
    """Write the losses as JSON and draw them, if matplotlib is installed."""
    results.mkdir(parents=True, exist_ok=True)
    record = {
        "setup": setup._asdict(),
        "one_process": expected,
        "processes": found,
        "kills": [kill._asdict() for kill in kills],
    }
    (results / "multihost.json").write_text(json.dumps(record, indent=1) + "\n")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(list(expected), list(expected.values()), lw=4, alpha=0.4, label="one process")
    steps = sorted(found)
    axes.plot(steps, [found[s] for s in steps], "k.", ms=4, label=f"{setup.processes} processes")
    for kill in kills:
        axes.axvline(kill.step, color="tab:red", ls=":")
        axes.text(kill.step, axes.get_ylim()[1], f" kill {kill.process}", va="top", color="tab:red")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    figure.savefig(results / "multihost.png", dpi=120)
