"""Several processes give the results of one: see `worker.py` for the checks that each runs."""

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import optax
import pytest

import layerwise_jax as lw
from experiments.multihost.launch import free_port
from tests.processes.worker import data, farthest, loss_fn

ROOT = Path(__file__).parents[2]
TOLERANCE = 2e-6  # float32, entries of about 1


def restored_by_one_process(steps: Path) -> float:
    """The difference of two saved steps from two unstaged ones, read here, without a cluster."""
    params, x, y = data()
    tx = optax.adamw(1e-2)
    trained, state = params, tx.init(params)
    for _ in range(2):
        updates, state = tx.update(jax.grad(loss_fn)(trained, x, y), state, trained)
        trained = optax.apply_updates(trained, updates)
    saved = lw.read_checkpoint(steps, params, tx.init(params))
    return farthest((saved.params, saved.optimizer_state), (trained, state))


@functools.cache
def found(processes: int, devices: int) -> list[dict[str, Any]]:
    """What every process found."""
    with tempfile.TemporaryDirectory() as directory:
        port = free_port()
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.processes.worker"]
                + [str(x) for x in (process, processes, port, directory, devices)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for process in range(processes)
        ]
        texts = [process.communicate()[0] for process in running]
        assert restored_by_one_process(Path(directory) / "steps") < 10 * TOLERANCE
    lines = [[x for x in text.splitlines() if x.startswith("FOUND ")] for text in texts]
    assert all(lines), "\n".join(texts)[-6000:]
    return [json.loads(line[-1].removeprefix("FOUND ")) for line in lines]


def check(results: list[dict[str, Any]], num_devices: int) -> None:
    own = "a_process_holds_only_its_stages"
    for result in results:
        for name in (
            "value_and_gradients",
            "gradients_of_a_call",
            "replicas_across_processes_and_within",
            "place_takes_global_arrays",
            "place_takes_a_process_s_own_stages",
            "a_batch_as_each_process_s_own_rows",
            "compile_with_trials",
            "checkpoints_in_the_background",
        ):
            assert result[name] < TOLERANCE, name
        assert max(result["training_and_checkpoints"].values()) < 10 * TOLERANCE
        assert result["gather_to_shardings_that_are_asked_for"] == [True, False]
        assert result["tokens_of_prompts_read_at_once"]
        assert result["plan_prints_what_crosses_processes"]
        assert result["devices_without_a_mesh"] == num_devices
        held, whole = result[own]
        assert held * len(results) == whole
        # Plans, programs and tokens: equal on all processes.
        same = {name: value for name, value in result.items() if name != own}
        assert same == {name: value for name, value in results[0].items() if name != own}


def test_two_processes_with_two_devices_each() -> None:
    results = found(2, 2)
    check(results, 4)
    assert [len(tokens) for tokens in results[0]["tokens"]] == [5, 5, 5]


@pytest.mark.slow
def test_four_processes_with_two_devices_each_generate_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CHECKPOINTS", "20")
    results = found(4, 2)
    check(results, 8)
    assert results[0]["tokens"] == found(2, 2)[0]["tokens"] == found(1, 4)[0]["tokens"]
