"""Pictures of the measurements: strategies by setting, prediction errors, the paper's ratio."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from experiments.dense16.errors import TOLERANCE, Point, calibrated_points, stock_points
from experiments.dense16.measured import best, ratio
from experiments.dense16.names import STRATEGIES
from experiments.dense16.paper import BASELINE, CLAIMED_RATIO
from experiments.dense16.pictures import BLUE, GREY, RED, save
from experiments.dense16.runs import Record, Run
from layerwise_jax.cost import DeviceSpec
from layerwise_jax.simulate import predict, strategy_of_record, work_of

GREEN = "#31a354"
# The part that sweeps sizes has too many settings for panels; the table has them.
SWEPT = "sizes"
COLOURS = dict(zip(STRATEGIES, ("black", GREY, BLUE, "#756bb1", RED, "#fd8d3c"), strict=True))


def draw_measured(runs: Sequence[Run], path: Path) -> bool:
    """One panel per setting, one bar per strategy: measured range, prediction and bound of
    tokens/s.
    """
    found = [
        (run, s, records)
        for run in runs
        for s, records in run.settings().items()
        if len(records) > 1
    ]
    settings = [
        each for each in found if all(record.get("part") != SWEPT for record in each[2])
    ] or found
    if not settings:
        return False
    columns = min(3, len(settings))
    rows = -(-len(settings) // columns)
    figure = Figure(figsize=(5 * columns, 2.4 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(settings) :]:
        axes.set_axis_off()
    for axes, (run, setting, records) in zip(panels, settings, strict=False):
        shown = [(name, record) for name in STRATEGIES if (record := best(records, name))][::-1]
        colours = [RED if name.startswith("layer-wise") else BLUE for name, _ in shown]
        axes.barh(
            [name for name, _ in shown], [r["tokens_per_second"] for _, r in shown], color=colours
        )
        for j, (_, record) in enumerate(shown):
            _mark(axes, j, record, run)
        axes.set_title(str(setting), fontsize=8)
        axes.set_xlabel("tokens/s", fontsize=7)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.tick_params(labelsize=7)
    handles, labels = panels[0].get_legend_handles_labels()
    known = dict(zip(labels, handles, strict=True))
    figure.legend(
        known.values(), known.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    save(figure, path)
    return True


def _mark(axes: Axes, j: int, record: Record, run: Run) -> None:
    """Marks the range of a measurement, its prediction and its bound."""
    low, high = (record["batch"] / seconds for seconds in record["spread"][::-1])
    axes.plot([low, high], [j, j], color="black", linewidth=1.2, label="fastest to slowest")
    if record.get("predicted"):
        axes.plot(
            record["predicted"]["tokens_per_second"],
            j,
            "o",
            color="black",
            mfc="white",
            ms=5,
            label="predicted",
        )
    if run.spec is not None and (bound := _bound(record, run.spec)):
        axes.plot(bound, j, "k|", ms=12, label="bound: memory traffic")


def _bound(record: Record, spec: DeviceSpec) -> float | None:
    prediction = predict(work_of(record), strategy_of_record(record), spec)
    return None if prediction.is_resident else prediction.lower_bound_per_second


def draw_errors(runs: Sequence[Run], path: Path) -> bool:
    """Predicted against measured tokens/s with a band of 15 %, by calibration."""
    panels: dict[str, list[Point]] = {
        "as the software comes": [point for run in runs for point in stock_points(run)],
        "calibrated on each run": [point for run in runs for point in calibrated_points(run)],
    }
    rates = [
        rate
        for points in panels.values()
        for point in points
        for rate in (point.measured, point.predicted)
    ]
    if not rates:
        return False
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    ends = [min(rates) * 0.8, max(rates) * 1.25]
    low, high = ([x * (1 + side * TOLERANCE) for x in ends] for side in (-1, 1))
    for axes, (title, points) in zip(
        figure.subplots(1, 2, sharey=True), panels.items(), strict=True
    ):
        axes.fill_between(ends, low, high, color="#eeeeee")
        for name in dict.fromkeys(point.name for point in points):
            own = [point for point in points if point.name == name]
            measured, predicted = (
                [point.measured for point in own],
                [point.predicted for point in own],
            )
            axes.plot(measured, predicted, "o", color=COLOURS.get(name, GREEN), ms=5, label=name)
        axes.set(
            xscale="log",
            yscale="log",
            xlim=ends,
            ylim=ends,
            title=title,
            xlabel="measured tokens/s",
        )
    figure.axes[0].set_ylabel("predicted tokens/s")
    figure.axes[0].legend(fontsize=8)
    save(figure, path)
    return True


def draw_ratios(runs: Sequence[Run], path: Path) -> bool:
    """Layer-wise over tensor x pipeline, one bar per setting, beside the paper's ratio."""
    found = []
    for run in runs:
        for setting, records in run.settings().items():
            share = ratio(records, "layer-wise", BASELINE.strategy)
            if share is not None:
                found.append((str(setting), share))
    if not found:
        return False
    figure = Figure(figsize=(10, 1.4 + 0.34 * len(found)), layout="constrained")
    axes = figure.subplots()
    names, shares = zip(*found[::-1], strict=True)
    axes.barh(names, shares, color=[GREEN if share >= 1 else GREY for share in shares])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.axvline(CLAIMED_RATIO, color=RED, linestyle="--", label=f"the paper: {CLAIMED_RATIO:.1f}")
    axes.set_xlabel("tokens/s of layer-wise over the best tensor x pipeline")
    axes.legend(fontsize=8)
    save(figure, path)
    return True
