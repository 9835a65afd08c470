"""Which strategy to choose, and why, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from layerwise_jax.simulate.predictor import Prediction, StepWork

# Predictions closer than this say that it does not matter which.
TIE = 1.03


def is_layer_wise(row: Prediction) -> bool:
    """Whether each of several stages has layers of its own, whole or in fewer parts than there are
    stages.
    """
    return "layer-wise" in row.strategy.name


def shape_text(row: Prediction) -> str:
    """The strategy with its mesh: `tensor x pipeline (stage 2, tensor 8)`."""
    sizes = ", ".join(f"{axis} {size}" for axis, size in row.strategy.mesh.items() if size > 1)
    return f"{row.strategy.name} ({sizes})" if sizes else row.strategy.name


def advise(rows: Sequence[Prediction], best_latency: Prediction | None) -> str:
    """What to choose among all rows, whether layer-wise is it, and what is best for an example
    alone.
    """
    fitting = [row for row in rows if row.fits_memory]
    if not fitting:
        least = min(rows, key=lambda row: row.bytes_per_device)
        return (
            f"Nothing fits a device's memory of {least.memory_bytes:,.0f} bytes; "
            f"{shape_text(least)} holds the least, "
            f"{least.bytes_per_device:,.0f} bytes a device. Use more devices, a smaller batch, or "
            "fewer bits."
        )
    fastest = min(fitting, key=lambda row: row.step_seconds)
    sentences = [_on_fastest(fastest), _on_layer_wise(fitting, fastest), _on_cache(fitting)]
    if best_latency:
        sentences.append(_on_latency(best_latency))
    return " ".join(sentences)


def _on_fastest(fastest: Prediction) -> str:
    rate = (
        f"{fastest.tokens_per_second:,.0f} {rate_unit(fastest.work)}, "
        f"{time_text(fastest.step_seconds)} a step"
    )
    return f"Fastest: {shape_text(fastest)}, {rate}, bound by {fastest.bound_by}."


def _on_latency(best: Prediction) -> str:
    unit = "one sequence" if best.work.kind == "decode" else "one example"
    return (
        f"For {unit} alone {shape_text(best)} takes least, "
        f"{time_text(best.inter_token_latency)} a step."
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
            "Layer-wise is not possible here: it takes two devices, two layers and memory for them."
        )
    if not others:
        return "Nothing but layer-wise fits the devices' memory."
    rival = min(others, key=lambda row: row.step_seconds)
    ratio = rival.step_seconds / ours.step_seconds
    if is_layer_wise(fastest):
        if ratio < TIE:
            return f"{shape_text(rival).capitalize()} does as well, within {ratio - 1:.1%}."
        return (
            f"Layer-wise it is: {ratio:.2f}x as fast as {shape_text(rival)}; "
            f"{_reason(rival, ours)}."
        )
    if 1 / ratio < TIE:
        return f"{shape_text(ours).capitalize()} does as well, within {1 / ratio - 1:.1%}."
    return (
        f"Layer-wise is not it: {shape_text(rival)} is {1 / ratio:.2f}x as fast as "
        f"{shape_text(ours)}; "
        f"{_reason(ours, rival)}."
    )


def _reason(slower: Prediction, faster: Prediction) -> str:
    """Why the one takes longer than the other: where it loses most."""
    mine, theirs = _by_cause(slower), _by_cause(faster)
    lost = {cause: mine[cause] - theirs[cause] for cause in mine}
    cause = max(lost, key=lambda name: lost[name])
    return (
        f"the latter spends {time_text(lost[cause])} more of a step on {cause} "
        f"({_detail(cause, slower)})"
    )


def _by_cause(row: Prediction) -> dict[str, float]:
    """Seconds of a step; reading is one cause, wherever from, and idle ticks are another."""
    busy = asdict(row.seconds_by_part * (1 - row.bubble_share))
    return {
        "reading": busy.pop("memory") + busy.pop("cache"),
        **busy,
        "idle ticks": row.bubble_share * row.step_seconds,
    }


def _detail(cause: str, slower: Prediction) -> str:
    groups, stages = slower.num_groups, slower.strategy.stage
    if cause == "reading":
        again = f"{groups} groups each read" if groups > 1 else "each device reads"
        return f"{again} all of its weights, {slower.weight_bytes / 1e6:,.1f} MB a device"
    if cause == "arithmetic":
        return "its devices have more of it each"
    if cause == "links":
        return f"{slower.link_bytes / 1e6:,.1f} MB go over them"
    if cause == "idle ticks":
        return f"{slower.bubble_share:.1%} of all, with {groups} groups for {stages} stages"
    ticks = f"{slower.num_ticks} ticks" if slower.num_ticks > 1 else "one tick"
    return f"{ticks} with {slower.collectives} collectives, and every layer's launches in each"


def _on_cache(fitting: Sequence[Prediction]) -> str:
    resident = [row for row in fitting if row.is_resident]
    if not resident:
        return "No strategy keeps its weights in the cache."
    names = dict.fromkeys(shape_text(row) for row in resident)
    return f"Weights stay in the cache under {', '.join(names)}."


def rate_unit(work: StepWork) -> str:
    """Tokens, or examples where it is not known how many tokens one has."""
    return "tokens/s" if work.kind == "decode" or work.tokens > 1 else "examples/s"


def time_text(seconds: float) -> str:
    """Seconds in the unit that leaves one to three digits before the point."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
