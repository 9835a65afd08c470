"""Tables of the measurements as Markdown."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.training.memory import growth

KIB, MIB = 2**10, 2**20


def circumstances(figures: Mapping[str, Any]) -> str:
    """Machine, versions and date of the figures."""
    return (
        f"{figures['machine']}; Python {figures['python']}, JAX {figures['jax']}; "
        f"{figures['date']}."
    )


def memory_table(figures: Mapping[str, Any]) -> str:
    """One row per way of training: temporary MiB per device by number of microbatches, and its
    growth.
    """
    head = [
        "temporary MiB a device",
        *(f"{count} microbatches" for count in figures["microbatches"]),
    ]
    head += ["microbatches stashed", "growth at equal stash"]
    lines = [circumstances(figures)]
    for kind, found in figures["stages"].items():
        first = next(iter(found["ways"].values()))
        inputs = ", ".join(f"{sizes['inputs'] / MIB:.2f}" for sizes in first)
        lines += [
            "",
            f"{kind.capitalize()} stages: {found['title']}; {figures['devices']} devices.",
        ]
        lines += [
            f"Each device holds the inputs besides: {inputs} MiB.",
            "",
            _row(head),
            _rule(len(head)),
        ]
        lines += [_memory_row(name, held) for name, held in found["ways"].items()]
    return "\n".join(lines)


def _memory_row(name: str, held: Sequence[dict[str, Any]]) -> str:
    grows = growth(held)
    cells = [f"{sizes['temporary'] / MIB:.2f}" for sizes in held]
    cells.append(
        "-" if held[0]["stash_slots"] is None else _listed([sizes["stash_slots"] for sizes in held])
    )
    return _row([name, *cells, "-" if grows is None else f"{grows:+.1%}"])


def step_time_table(figures: Mapping[str, Any]) -> str:
    """One table per subject, one row per program."""
    head = (
        f"{figures['stages']} stages, {figures['microbatches']} microbatches, "
        f"{figures['repetitions']} repetitions."
    )
    lines = [circumstances(figures), head]
    for found in figures["subjects"].values():
        columns = [
            "program",
            "CPU ms: median",
            "least to most",
            "over unstaged",
            "over accumulating",
        ]
        columns += [
            "wall ms",
            "wall over unstaged",
            "compile s",
            "temporary KiB",
            "loss first",
            "last",
        ]
        lines += ["", f"{found['title']}:", "", _row(columns), _rule(len(columns))]
        programs = found["programs"]
        lines += [_program_row(name, x, programs) for name, x in programs.items()]
        lines += _rival_rows(found["rival"], len(columns))
    return "\n".join(lines)


def _rival_rows(rival: Mapping[str, Any] | None, columns: int) -> list[str]:
    if rival is None:
        return [_row(["JaxPP", "not run", *[""] * (columns - 2)])]
    programs = rival["programs"]
    rows = []
    for name, figures in programs.items():
        label = name if name.startswith("JaxPP") else f"{name}, JAX {rival['jax']}"
        rows.append(_program_row(label, figures, programs))
    return rows + [
        _row([name, why, *[""] * (columns - 2)]) for name, why in rival["failures"].items()
    ]


def _program_row(label: str, figures: Mapping[str, Any], programs: Mapping[str, Any]) -> str:
    cpu, wall = figures["cpu_seconds"], figures["wall_seconds"]
    held = figures.get("bytes")
    return _row(
        [
            label,
            f"{1e3 * statistics.median(cpu):.1f}",
            f"{1e3 * min(cpu):.1f} to {1e3 * max(cpu):.1f}",
            f"{ratio(figures, programs['unstaged'], 'cpu_seconds'):.2f}",
            f"{ratio(figures, programs['accumulating'], 'cpu_seconds'):.2f}",
            f"{1e3 * statistics.median(wall):.1f}",
            f"{ratio(figures, programs['unstaged'], 'wall_seconds'):.2f}",
            f"{figures['compile_seconds']:.1f}",
            f"{held['temporary'] / KIB:,.0f}" if held else "-",
            f"{figures['losses'][0]:.5f}",
            f"{figures['losses'][-1]:.5f}",
        ]
    )


def ratio(figures: Mapping[str, Any], base: Mapping[str, Any], seconds: str) -> float:
    """Median over the median of `base`."""
    return statistics.median(figures[seconds]) / statistics.median(base[seconds])


def rivals_table(figures: Mapping[str, Any]) -> str:
    """One row per schedule and subject: CPU time of the staged run and of JaxPP, over the unstaged
    step's.
    """
    columns = ["model", "schedule", "ours, recomputing", "ours, stored", "JaxPP"]
    columns += [
        "recomputing over JaxPP",
        "stored over JaxPP",
        "by the clock: recomputing",
        "stored",
    ]
    lines = [_row(columns), _rule(len(columns))]
    for name, found in figures["subjects"].items():
        if found["rival"] is None:
            lines.append(_row([name, "", "", "", "not run", *[""] * 4]))
            continue
        labels = [label for label in found["rival"]["programs"] if label.startswith("JaxPP")]
        lines += [_rival_row(name, label.removeprefix("JaxPP "), found) for label in labels]
    return "\n".join(lines)


def _rival_row(name: str, schedule: str, found: Mapping[str, Any]) -> str:
    ours, rival = found["programs"], found["rival"]["programs"]

    def shares(seconds: str) -> tuple[float, float, float]:
        return (
            ratio(ours[schedule], ours["unstaged"], seconds),
            ratio(ours[f"{schedule}, stored"], ours["unstaged"], seconds),
            ratio(rival[f"JaxPP {schedule}"], rival["unstaged"], seconds),
        )

    recomputing, stored, theirs = shares("cpu_seconds")
    recomputing_wall, stored_wall, theirs_wall = shares("wall_seconds")
    figures = [recomputing, stored, theirs, recomputing / theirs, stored / theirs]
    figures += [recomputing_wall / theirs_wall, stored_wall / theirs_wall]
    return _row([name, schedule, *(f"{x:.2f}" for x in figures)])


def schedules_table(figures: Mapping[str, Any]) -> str:
    """One row per schedule: simulated, and in closed form."""
    columns = [
        "schedule",
        "makespan",
        "in closed form",
        "bubble",
        "live microbatches by device",
        "in closed form",
    ]
    lines = [_row(columns), _rule(len(columns))]
    for name, found in figures["schedules"].items():
        known = found["expected"]
        lines.append(
            _row(
                [
                    name,
                    f"{found['makespan']:g} s",
                    "-" if known["makespan"] is None else f"{known['makespan']:g} s",
                    f"{found['bubble']:.1%}",
                    _listed(found["live"]),
                    "-" if known["live"] is None else _listed(known["live"]),
                ]
            )
        )
    return "\n".join(lines)


def losses_table(figures: Mapping[str, Any]) -> str:
    """One row per subject: first and last losses of both runs, and their difference."""
    columns = [
        "model",
        "first loss",
        "last loss, staged",
        "unstaged",
        "apart at the end",
        "most apart at any step",
    ]
    lines = [circumstances(figures), "", _row(columns), _rule(len(columns))]
    for run in figures["subjects"].values():
        cells = [
            f"{run['staged'][0]:.6f}",
            f"{run['staged'][-1]:.6f}",
            f"{run['unstaged'][-1]:.6f}",
        ]
        lines.append(
            _row([run["title"], *cells, f"{run['apart_at_end']:.1e}", f"{run['most_apart']:.1e}"])
        )
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(columns: int) -> str:
    return "|---" * columns + "|"


def _listed(counts: Sequence[int]) -> str:
    return ", ".join(map(str, counts))
