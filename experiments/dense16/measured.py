"""Tables of the measurements: strategies side by side, with predictions."""

from collections.abc import Sequence

from experiments.dense16.names import STRATEGIES
from experiments.dense16.predictions import shape_text
from experiments.dense16.runs import Record, Run
from experiments.grid import Grid, count, signed
from layerwise_jax.simulate import Strategy

RESIDENCY = ("resident", "streaming")
RIVALS = ("tensor", "tensor x pipeline")


def best(records: Sequence[Record], *names: str) -> Record | None:
    """The fastest record of these strategies in any shape; None without one."""
    ran = [r for r in records if r["strategy"] in names and r.get("tokens_per_second")]
    return max(ran, key=lambda record: record["tokens_per_second"], default=None)


def ratio(records: Sequence[Record], name: str, rival: str) -> float | None:
    """Tokens/s of one strategy over another's, each in its best shape."""
    ours, theirs = best(records, name), best(records, rival)
    return ours["tokens_per_second"] / theirs["tokens_per_second"] if ours and theirs else None


def strategies_grid(runs: Sequence[Run]) -> Grid | None:
    """One row per setting, one column per strategy: tokens/s of its best shape, and two ratios."""
    rows = []
    for run in runs:
        for setting, records in run.settings().items():
            found = {name: best(records, name) for name in STRATEGIES}
            most = max((r["tokens_per_second"] for r in found.values() if r), default=0)
            cells = [_rate(found[name], most) for name in STRATEGIES]
            ratios = [_times(ratio(records, "layer-wise", rival)) for rival in RIVALS]
            megabytes = setting.layer_bytes * setting.layers / 1e6 / setting.devices
            rows.append([str(setting), f"{megabytes:,.0f}", *cells, *ratios])
    columns = ["setting", "MB of weights a device, shared out", *STRATEGIES]
    return (
        Grid("", [*columns, *(f"layer-wise : {rival}" for rival in RIVALS)], rows) if rows else None
    )


def _rate(record: Record | None, most: float) -> str:
    if record is None:
        return "-"
    text = count(record["tokens_per_second"])
    return f"**{text}**" if record["tokens_per_second"] == most else text


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def all_records_grid(run: Run) -> Grid:
    """All records of strategies with all figures."""
    columns = ["setting", "strategy", "DP x PP x TP", "tokens/s", "step, ms", "fastest to slowest"]
    columns += [
        "between two tokens, ms",
        "1/TPS, ms",
        "GB a device",
        "compile, s",
        "predicted, tokens/s",
        "error",
        "tokens",
    ]
    rows = []
    for setting, records in run.settings().items():
        for record in records:
            shape = " x ".join(
                str(record["mesh"].get(axis, 1)) for axis in ("data", "stage", "tensor")
            )
            rows.append([str(setting), record["strategy"], shape, *_figures(record)])
    return Grid(str(run), columns, rows)


def _figures(record: Record) -> list[str]:
    if not record.get("tokens_per_second"):
        return [record.get("error", "not run").splitlines()[0][:80], *[""] * 9]
    low, high = (f"{1e3 * seconds:.4g}" for seconds in record["spread"])
    predicted = record.get("predicted")
    said = ["", ""]
    if predicted:
        rate = predicted["tokens_per_second"]
        said = [count(rate), signed(rate / record["tokens_per_second"] - 1)]
    return [
        count(record["tokens_per_second"]),
        f"{1e3 * record['seconds_per_step']:.4g}",
        f"{low} to {high}",
        f"{1e3 * record['inter_token_latency']:.4g}",
        f"{1e3 * record['seconds_per_token']:.3g}",
        f"{record['bytes_per_device'] / 1e9:.3g}",
        f"{record['compile_seconds']:.1f}",
        *said,
        (record.get("tokens_digest") or "")[:8],
    ]


def stage_grid(runs: Sequence[Run]) -> Grid | None:
    """One row per microbatch of a stage without neighbours: time, floor, rate, DRAM reads."""
    rows = []
    for record in records_of(runs, "stage"):
        if "floor_seconds" not in record:
            continue
        low, high = (f"{1e6 * seconds:,.0f}" for seconds in record["spread"])
        rows.append(
            [
                str(record["batch"]),
                f"{record['context']:,}",
                f"{1e6 * record['seconds_per_step']:,.0f}",
                f"{low} to {high}",
                f"{1e6 * record['floor_seconds']:,.0f}",
                f"{record['floor_share']:.0%}",
                count(record["batch"] / record["seconds_per_step"]),
                _share_read(counters_of(runs, record)),
            ]
        )
    columns = [
        "sequences",
        "context",
        "us a tick",
        "fastest to slowest",
        "floor, us",
        "floor / measured",
    ]
    columns += ["tokens/s in steady state", "read from DRAM, of weights and cache"]
    return Grid("", columns, rows) if rows else None


def _share_read(counters: Record | None) -> str:
    if counters is None:
        return "-"
    must_read = counters["stage_weight_bytes"] + counters["group_cache_bytes"]
    return f"{counters['dram_bytes_per_tick'] / must_read:.1%}"


def residency_grid(runs: Sequence[Run]) -> Grid | None:
    """One row per size of a stage and number of sequences: resident against streamed weights."""
    found: dict[tuple[float, int, int], dict[str, Record]] = {}
    for record in records_of(runs, "residency"):
        key = record["stage_weight_bytes"], record["batch"], record["context"]
        found.setdefault(key, {}).setdefault(record["weights"], record)
    rows = []
    for (size, batch, context), both in sorted(found.items()):
        times = [both[name]["seconds_per_step"] if name in both else None for name in RESIDENCY]
        gain = f"{times[1] / times[0]:.2f}" if times[0] and times[1] else "-"
        cells = [f"{1e6 * seconds:.1f}" if seconds else "-" for seconds in times]
        counters = [counters_of(runs, both[name]) if name in both else None for name in RESIDENCY]
        caches = [each["groups"] * each["group_cache_bytes"] for each in counters if each]
        reads = [each["dram_bytes_per_tick"] if each else None for each in counters]
        rows.append(
            [
                _megabytes(size),
                str(batch),
                str(context),
                _megabytes(max(caches, default=None)),
                *cells,
                gain,
            ]
        )
        rows[-1] += map(_megabytes, reads)
    columns = [
        "MB of weights",
        "sequences",
        "positions",
        "MB of both caches",
        "us a layer, the same weights",
    ]
    columns += [
        "other weights in turn",
        "gain",
        "MB read from DRAM a tick, the same weights",
        "other weights in turn",
    ]
    return Grid("", columns, rows) if rows else None


def counters_of(runs: Sequence[Run], timed: Record) -> Record | None:
    """DRAM reads of a timed stage; None if they were not counted."""
    same = ("model", "batch", "context")
    for record in records_of(runs, "counters"):
        if all(record[name] == timed[name] for name in same) and record["weights"] == timed.get(
            "weights", "resident"
        ):
            return record
    return None


def _megabytes(size: float | None) -> str:
    return "-" if size is None else f"{size / 1e6:.1f}"


def overhead_grid(runs: Sequence[Run]) -> Grid | None:
    """One row per model: the ring's tick, its stage without and with the ends' work, the
    remainder.
    """
    names = (
        "tick_seconds",
        "stage_seconds",
        "overhead_seconds",
        "stage_with_ends_seconds",
        "overhead_over_ends_seconds",
    )
    rows = []
    for run in runs:
        for record in (r for r in run.records if r["kind"] == "overhead"):
            parts = [f"{1e6 * record[name]:.1f}" if name in record else "-" for name in names]
            model = record["model"]
            what = (
                f"{model['layers'] // record['mesh']['stage']} x "
                f"d={model['heads'] * model['head_dim']}"
            )
            rows.append(
                [f"{run.machine['count']} x {run.device}", what, str(record["batch"]), *parts]
            )
    columns = ["devices", "stage", "batch", "tick, us", "layers alone, us", "the rest, us"]
    columns += ["with embedding, head and sampling, us", "the rest, us"]
    return Grid("", columns, rows) if rows else None


def records_of(runs: Sequence[Run], kind: str) -> list[Record]:
    """All records of one kind, from all runs."""
    return [record for run in runs for record in run.records if record["kind"] == kind]


def emulated_grid(records: Sequence[Record]) -> Grid:
    """One row per strategy on emulated devices: its shape, and the share of tokens equal to one
    device's.
    """
    model = records[0]["model"]
    title = (
        f"{model['layers']} layers of width {model['heads'] * model['head_dim']}, "
        f"{records[0]['batch']} sequences, "
    )
    rows = [
        [
            record["strategy"],
            shape_text(Strategy(record["strategy"], **record["mesh"])),
            f"{record['same_tokens']:.0%}",
            record["tokens_digest"],
            f"{record['bytes_per_device'] / 1e3:,.0f}",
            f"{record['compile_seconds']:.0f}",
        ]
        for record in records
    ]
    columns = [
        "strategy",
        "shape",
        "tokens as on one device",
        "their digest",
        "kB a device",
        "compile, s",
    ]
    return Grid(f"{title}{records[0]['steps']} steps, {model['dtype']}, emulated.", columns, rows)
