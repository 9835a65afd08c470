"""Figures of `gpu.py` as a table and as a picture.

python -m experiments.training.gpu_report --results=experiments/training/results/gpu.json
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from absl import app, flags
from matplotlib.figure import Figure

from experiments import command
from experiments.grid import Grid

matplotlib.use("Agg")

COLUMNS = (
    "strategy",
    "step, ms: median",
    "fastest to slowest",
    "tokens a second",
    "of the peak",
    "memory a device, GB",
    "state",
    "workspace",
    "compile, s",
    "loss, first step",
    "last",
    "largest difference",
)
RED, BLUE, GREY = "#de2d26", "#3182bd", "#bdbdbd"


def rows(results: Mapping[str, Any]) -> list[list[str]]:
    """One row per strategy with the cells of `COLUMNS`, or the reason why it did not run."""
    return [_row(results, name, about) for name, about in _in_order(results)]


def _in_order(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Strategies in the order of compilation, layer-wise ones last, by microbatches."""
    return sorted(
        results["strategies"].items(),
        key=lambda item: (item[0].startswith("layer-wise"), item[1].get("microbatches", 0)),
    )


def _row(results: Mapping[str, Any], name: str, about: Mapping[str, Any]) -> list[str]:
    compiled = "device_bytes" in about
    memory = (
        [f"{about[size] / 1e9:.1f}" for size in ("device_bytes", "argument_bytes", "temp_bytes")]
        if compiled
        else []
    )
    memory += [f"{about['compile_seconds']:.0f}"] if compiled else []
    if "step_seconds" not in about:
        reason = about.get("error", "not run").splitlines()[0][:80]
        return [name, reason, "", "", "", *(memory or [""] * 4), "", "", ""]
    return [
        name,
        _ms(about["step_seconds"]),
        f"{_ms(about['fastest_seconds'])} to {_ms(about['slowest_seconds'])}",
        f"{about['tokens_per_second']:,.0f}",
        f"{about['model_flops_utilisation']:.1%}",
        *memory,
        f"{about['losses'][0]:.4f}",
        f"{about['losses'][-1]:.4f}",
        f"{results['loss_differences'][name]:.1e}",
    ]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"


def heading(results: Mapping[str, Any]) -> str:
    """Model, machine, versions and command in one paragraph."""
    model, machine = results["model"], results["machine"]
    kinds = machine["devices"]
    return (
        f"{results['parameters'] / 1e9:.2f} billion parameters ({model['depth']} blocks of width "
        f"{model['width']}, "
        f"{model['heads']} heads, vocabulary {model['vocabulary']:,}), {results['examples']} "
        "sequences of "
        f"{model['sequence']:,} tokens a step, attention by {model['attention']}; {len(kinds)} x "
        f"{kinds[0]}, "
        f"{machine['cores']} cores, JAX {results['versions']['jax']}, {results['date'][:10]}, "
        f"`{results['command']}`, {results['seconds_in_all']:.0f} s in all. {results['rounds']} "
        "rounds of "
        f"{results['steps_per_turn']} steps from the same start, the first of each not timed; "
        f"{results['compiled_at_a_time']} programs compiled at a time. Differences of losses "
        "are from the first strategy's at the same step, relative; bfloat16 rounds by up to 2e-3."
    )


def table(results: Mapping[str, Any]) -> Grid:
    """The table below its heading; the notes describe every strategy."""
    notes = [f"- {name}: {about['how']}." for name, about in _in_order(results) if "how" in about]
    return Grid(heading(results), COLUMNS, rows(results), notes)


def markdown(results: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    return table(results).markdown() + "\n"


def print_table(results: Mapping[str, Any]) -> None:
    """Print the table to the terminal."""
    table(results).show(command.make_console())


def draw(results: Mapping[str, Any], path: Path) -> Path:
    """Bars of step time (fastest to slowest) and memory (state, workspace); returns `path`."""
    ran = {name: about for name, about in _in_order(results) if "step_seconds" in about}
    names, figures = list(ran)[::-1], list(ran.values())[::-1]
    figure = Figure(figsize=(11, 1.4 + 0.38 * len(names)), layout="constrained")
    times, memory = figure.subplots(1, 2, sharey=True)
    medians = [1e3 * about["step_seconds"] for about in figures]
    below = [1e3 * (about["step_seconds"] - about["fastest_seconds"]) for about in figures]
    above = [1e3 * (about["slowest_seconds"] - about["step_seconds"]) for about in figures]
    colours = [RED if name.startswith("layer-wise") else BLUE for name in names]
    times.barh(
        names, medians, xerr=[below, above], color=colours, error_kw={"elinewidth": 1, "capsize": 2}
    )
    times.set_xlabel("a step, ms (median; fastest to slowest)")
    state = [about["argument_bytes"] / 1e9 for about in figures]
    rest = [about["device_bytes"] / 1e9 - held for about, held in zip(figures, state, strict=True)]
    memory.barh(names, state, color=colours, label="arguments: weights, moments, batch")
    memory.barh(names, rest, left=state, color=GREY, label="workspace: activations, gradients")
    memory.set_xlabel("memory a device, GB (the compiler's account)")
    figure.legend(
        *memory.get_legend_handles_labels(), loc="outside lower right", ncols=2, fontsize="small"
    )
    model, kinds = results["model"], results["machine"]["devices"]
    figure.suptitle(
        f"A training step of a GPT of {results['parameters'] / 1e9:.2f} billion parameters, "
        f"{results['examples']} x {model['sequence']} tokens, on {len(kinds)} x {kinds[0]}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def main(argv: list[str]) -> None:
    command.refuse_arguments(argv)
    print_table(json.loads(Path(RESULTS.value).read_text(encoding="utf-8")))


if __name__ == "__main__":
    RESULTS = flags.DEFINE_string(
        "results", None, "JSON file that experiments.training.gpu wrote", required=True
    )
    app.run(main)
