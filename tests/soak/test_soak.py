"""A sample of the soak, and its journal."""

from pathlib import Path

import pytest

from tests.soak import kills, memory, mutations, triples
from tests.soak.journal import Journal

SEED = 1


def test_triples() -> None:
    assert Journal(None).run("triples", SEED, 4, triples.check) == []


def test_mutations() -> None:
    journal = Journal(None)
    assert journal.run("mutations", SEED, 200, mutations.check) == []
    (entry,) = journal.parts.values()
    for subject in ("plan", "spec", "assignment", "checkpoint"):
        assert entry["results"][f"{subject} refused"] > 0


def test_kills() -> None:
    with kills.Saver() as saver:
        assert Journal(None).run("kills", SEED, 2, saver.check) == []


@pytest.mark.parametrize("part", memory.PARTS)
def test_memory(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "WARM_UP", 5)
    assert Journal(None).run(part, SEED, 15, memory.PARTS[part]()) == []


def test_memory_that_grows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax.numpy as jnp

    monkeypatch.setattr(memory, "WARM_UP", 5)
    kept: list[object] = []
    growth = memory.Growth(lambda index: kept.append(jnp.ones(10) * index))
    (finding,) = Journal(None).run("leak", SEED, 10, growth)
    assert "5 arrays more after 5 runs" in finding


def test_a_journal_is_resumed(tmp_path: Path) -> None:
    seen: list[int] = []

    def check(seed: int, index: int) -> str:
        seen.append(index)
        assert index != 3
        return "fine"

    path = tmp_path / "soak.json"
    Journal(path).run("part", SEED, 2, check)
    findings = Journal(path).run("part", SEED, 5, check)
    assert seen == [0, 1, 2, 3, 4]
    assert len(findings) == 1
    assert "index 3: AssertionError" in findings[0]
    assert "| part, seed 1 | 5 | finding 1, fine 4 | 1 |" in Journal(path).table()
