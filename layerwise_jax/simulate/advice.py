"""Advice in sentences: the fastest strategy, and the reason why others are slower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from layerwise_jax._tables import plural, seconds_text
from layerwise_jax.simulate.predictor import Prediction, StepWork

# Ratio of step times below which two strategies count as equal.
TIE = 1.03


def is_layer_wise(row: Prediction) -> bool:
    """True for strategies named layer-wise: stages, each split over fewer devices than stages."""
    return "layer-wise" in row.strategy.name


def shape_text(row: Prediction) -> str:
    """Name and mesh of a strategy, as in `tensor x pipeline (stage 2, tensor 8)`."""
    sizes = ", ".join(f"{axis} {size}" for axis, size in row.strategy.mesh.items() if size > 1)
    return f"{row.strategy.name} ({sizes})" if sizes else row.strategy.name


def advise(rows: Sequence[Prediction], best_latency: Prediction | None) -> str:
    """Advice for all rows: the fastest strategy, layer-wise compared with the others, residency.

    Args:
      rows: predictions for the whole batch.
      best_latency: the fastest prediction for a single example; None for training.
    """
    fitting = [row for row in rows if row.fits_memory]
    if not fitting:
        least = min(rows, key=lambda row: row.bytes_per_device)
        return (
            f"Nothing fits a device's memory of {least.memory_bytes:,.0f} bytes; "
            f"{shape_text(least)} needs the least, {least.bytes_per_device:,.0f} bytes a device. "
            "Use more devices, a smaller batch, or fewer bits."
        )
    fastest = min(fitting, key=lambda row: row.step_seconds)
    sentences = [_on_fastest(fastest), _on_layer_wise(fitting, fastest), _on_cache(fitting)]
    if best_latency:
        sentences.append(_on_latency(best_latency))
    return " ".join(sentences)


def _on_fastest(fastest: Prediction) -> str:
    rate = (
        f"{fastest.tokens_per_second:,.0f} {rate_unit(fastest.work)}, "
        f"{seconds_text(fastest.step_seconds)} a step"
    )
    return f"Fastest: {shape_text(fastest)}, {rate}, bound by {fastest.bound_by}."


def _on_latency(best: Prediction) -> str:
    unit = "one sequence" if best.work.kind == "decode" else "one example"
    return (
        f"For a batch of {unit}, {shape_text(best)} is fastest: "
        f"{seconds_text(best.inter_token_latency)} a step."
    )


def _on_layer_wise(fitting: Sequence[Prediction], fastest: Prediction) -> str:
    ours = min(
        (row for row in fitting if is_layer_wise(row)),
        key=lambda row: row.step_seconds,
        default=None,
    )
    others = [row for row in fitting if not is_layer_wise(row)]
    if ours is None:
        return (
            "Layer-wise is not possible here: it needs two devices, two layers and memory for them."
        )
    if not others:
        return "Only layer-wise strategies fit the devices' memory."
    rival = min(others, key=lambda row: row.step_seconds)
    ratio = rival.step_seconds / ours.step_seconds
    if is_layer_wise(fastest):
        if ratio < TIE:
            return f"{shape_text(rival).capitalize()} is equally fast, within {ratio - 1:.1%}."
        return (
            f"Layer-wise is the fastest here, {ratio:.2f}x as fast as {shape_text(rival)}: "
            f"{_reason(rival, ours)}."
        )
    if 1 / ratio < TIE:
        return f"{shape_text(ours).capitalize()} is equally fast, within {1 / ratio - 1:.1%}."
    return (
        f"Layer-wise is not the fastest here: {shape_text(rival)} is {1 / ratio:.2f}x as fast as "
        f"{shape_text(ours)}: {_reason(ours, rival)}."
    )


def _reason(slower: Prediction, faster: Prediction) -> str:
    """The cause in which the slower strategy loses the most time to the faster one."""
    slow = _by_cause(slower)
    fast = _by_cause(faster)
    lost = {cause: slow[cause] - fast[cause] for cause in slow}
    cause = max(lost, key=lambda name: lost[name])
    return (
        f"the latter spends {seconds_text(lost[cause])} more of a step on {cause} "
        f"({_detail(cause, slower)})"
    )


def _by_cause(row: Prediction) -> dict[str, float]:
    """Seconds of a step by cause; reads of memory and cache are one cause, idle ticks another."""
    busy = asdict(row.seconds_by_part * (1 - row.bubble_share))
    return {
        "reading": busy.pop("memory") + busy.pop("cache"),
        **busy,
        "idle ticks": row.bubble_share * row.step_seconds,
    }


def _detail(cause: str, slower: Prediction) -> str:
    groups = slower.num_groups
    stages = slower.strategy.stage
    if cause == "reading":
        again = f"each of {groups} groups reads" if groups > 1 else "each device reads"
        return f"{again} all its weights, {slower.weight_bytes / 1e6:,.1f} MB a device"
    if cause == "arithmetic":
        return "more of it on each device"
    if cause == "links":
        return f"{slower.link_bytes / 1e6:,.1f} MB sent"
    if cause == "idle ticks":
        return (
            f"{slower.bubble_share:.1%} of all, with {groups} {plural(groups, 'group')} for "
            f"{stages} {plural(stages, 'stage')}"
        )
    return (
        f"{slower.num_ticks} {plural(slower.num_ticks, 'tick')} with {slower.collectives} "
        f"{plural(slower.collectives, 'collective')}, and every layer's launches in each"
    )


def _on_cache(fitting: Sequence[Prediction]) -> str:
    resident = [row for row in fitting if row.is_resident]
    if not resident:
        return "No strategy keeps its weights in the cache."
    names = dict.fromkeys(shape_text(row) for row in resident)
    return f"Weights stay in the cache under {', '.join(names)}."


def rate_unit(work: StepWork) -> str:
    """Unit of throughput: tokens/s, or examples/s if an example's tokens are unknown."""
    return "tokens/s" if work.kind == "decode" or work.tokens > 1 else "examples/s"
