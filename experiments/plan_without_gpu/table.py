"""What was measured, as Markdown."""

from collections.abc import Mapping
from typing import Any

MIB = 2**20


def comparison_table(figures: Mapping[str, Any]) -> str:
    """A row a program: bytes for the absent device and for the real one, and the second over the first."""
    absent, real = figures["absent"], figures["real"]
    columns = ["stage", "arguments", "outputs", "workspace: absent", "real", "ratio", "real, kernels not timed"]
    columns += ["peak: absent", "real", "ratio"]
    lines = [
        f"Absent: {absent['device']}, JAX {absent['jax']}. Real: {real['device']}, JAX {real['jax']}. MiB.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for name, variants in real["programs"].items():
        lines.append(_comparison_row(name, absent["programs"].get(name, {}), variants))
    return "\n".join(lines) + "\n"


def _comparison_row(name: str, absent: Mapping[str, Any], real: Mapping[str, Any]) -> str:
    before, after = absent.get("default", {}), real.get("default", {})
    reason = before.get("error", "") or after.get("error", "")
    if reason or not before or not after:
        return f"| {name} | {reason or 'not compiled'} |" + " |" * 8
    untimed = real.get("kernels not timed", {}).get("temp_bytes")
    cells = [_both(before, after, "argument_bytes"), _both(before, after, "output_bytes")]
    cells += [_mib(before["temp_bytes"]), _mib(after["temp_bytes"]), _ratio(before, after, "temp_bytes")]
    cells += ["" if untimed is None else _mib(untimed)]
    cells += [_mib(before["peak_bytes"]), _mib(after["peak_bytes"]), _ratio(before, after, "peak_bytes")]
    return f"| {name} | {' | '.join(cells)} |"


def _both(before: Mapping[str, Any], after: Mapping[str, Any], size: str) -> str:
    """One figure where both are equal, as they should be."""
    same = before[size] == after[size]
    return _mib(before[size]) if same else f"{_mib(before[size])}, real {_mib(after[size])}"


def _ratio(before: Mapping[str, Any], after: Mapping[str, Any], size: str) -> str:
    if before[size] == after[size]:
        return "1"
    return f"{after[size] / before[size]:.3g}" if before[size] else "-"


def _mib(count: float) -> str:
    return f"{count / MIB:.3g}" if count < 1000 * MIB else f"{count / MIB:,.0f}"
