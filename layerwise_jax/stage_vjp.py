"""One stage's vjp for one microbatch: what follows the body, then the body, then what precedes it.

Each part's vjp is taken by itself, and inside its branch: a stage's residuals are never another's. What comes out is
the gradient of what arrived, and accumulators to which the gradients of this stage's weights were added in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from layerwise_jax.on_device import Moment, StageOnDevice, fill, from_wire, to_wire, wire_aval
from layerwise_jax.program import Value
from layerwise_jax.wiring import FromBody, FromBranch


class Pulled(NamedTuple):
    """What a stage's vjp gives: gradients of the lanes that came in, the accumulators, and the stage's outputs."""

    arrived_gradients: list[Any]
    accumulators: list[Any]
    outputs: list[Any]


class StageVjp:
    """One stage's vjp for one microbatch: `after`, then the body, then `before`."""

    def __init__(
        self,
        device: StageOnDevice,
        seed: float,
        moment: Moment,
        arrived: list[Any],
        slots: list[Any],
        gradients: list[Any],
        accumulators: list[Any],
    ):
        self.device, self.seed, self.moment, self.slots = device, seed, moment, slots
        self.loop, self.wiring = device.loop, device.loop.wiring
        self.arrived, self.accumulators = arrived, list(accumulators)
        self.lane_gradients = self._by_lane(gradients)
        self.of_body: dict[int, Any] = {}
        self.of_branch: dict[int, Any] = {}
        self.of_lanes = {j: jnp.zeros_like(g) for j, g in self.lane_gradients.items()}

    def _by_lane(self, gradients: list[Any]) -> dict[int, Any]:
        moving = [j for j, lane in enumerate(self.wiring.lanes) if lane.has_gradient]
        return dict(zip(moving, gradients, strict=True))

    def run(self) -> Pulled:
        for j, gradient in self.lane_gradients.items():
            self._add(self.wiring.lanes[j].source, gradient)
        for output, seed in zip(self.wiring.outputs, self._seeds(), strict=True):
            if seed is not None and output.lag == 0:
                self._add(output.source, jnp.where(self.device.stage == output.stage, seed, jnp.zeros_like(seed)))
        if self.loop.has_body:
            branch = self.device.run_before(self.moment, self.arrived, self.slots)
            body, pull_body = self._body_vjp(branch)
            late = self._pull_after(body, branch)
            self._pull_body(pull_body)
            self._pull_before()
        else:
            branch, body, late = self._pull_before(), {}, {}
        outputs = [
            late[p] if p in late else (body if isinstance(o.source, FromBody) else branch)[o.source.result]
            for p, o in enumerate(self.wiring.outputs)
        ]
        return Pulled([self.of_lanes[j] for j in sorted(self.of_lanes)], self.accumulators, outputs)

    def _seeds(self) -> list[Any]:
        """The gradient of the loss with respect to each output: a number for the first, nothing for the rest."""
        loss = self.loop.output_aval(0)
        return [jnp.full(loss.shape, self.seed, loss.dtype)] + [None] * (len(self.wiring.outputs) - 1)

    def _add(self, source: FromBody | FromBranch, gradient: Any) -> None:
        into = self.of_body if isinstance(source, FromBody) else self.of_branch
        into[source.result] = into[source.result] + gradient if source.result in into else gradient

    def _body_vjp(self, branch: list[Any]) -> tuple[dict[int, Any], Any]:
        reads = self.device.body_reads(self.moment, self.arrived, branch)
        shape = self.loop.alignment.parts[0].shape
        weights = self.slots[: len(shape.weights)]
        moving, fixed = _split_inexact([*weights, *reads])
        results, pull = jax.vjp(lambda moving: self.device.run_body(self.moment, _join(moving, fixed)), moving)
        return results, pull

    def _pull_body(self, pull: Any) -> None:
        shape, results = self.loop.alignment.parts[0].shape, self.wiring.body_results
        seeds = {}
        for j in results:
            aval = self.loop.program.avals[shape.made[j]]
            seeds[j] = _cotangent(aval, self.of_body.get(j))
        (gradients,) = pull(seeds)
        num_weights = len(shape.weights)
        for j, gradient in gradients.items():
            if j < num_weights:
                self._accumulate(j, gradient)
            else:
                self._pull_read(self.wiring.body_reads[j - num_weights], gradient)

    def _pull_read(self, source: Any, gradient: Any) -> None:
        if isinstance(source, FromBranch):
            self._add(source, gradient)
        elif hasattr(source, "lane"):
            self.of_lanes[source.lane] = self.of_lanes[source.lane] + gradient

    def _accumulate(self, slot: int, gradient: Any) -> None:
        self.accumulators[slot] = _accumulated(self.accumulators[slot], gradient, self.moment.is_active)

    def _pull_after(self, body: dict[int, Any], branch: list[Any]) -> dict[int, Any]:
        """Outputs of what follows the last stage's body; gradients of what it reads, and of its weights."""
        last, loop = self.loop.num_stages - 1, self.loop
        positions = [p for p, output in enumerate(self.wiring.outputs) if output.lag]
        if not loop.alignment.parts[last].after:
            return {}
        kept = {x: (body if isinstance(s, FromBody) else branch)[s.result] for x, s in self.wiring.kept}
        seeds = self._seeds()
        wanted = [loop.stages[last].outputs[p] for p in positions]

        def on_last(accumulators: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
            known = self.device.known(self.moment, last, self.slots) | kept
            results, of_kept, accumulators = self._pull_ops(
                last, loop.alignment.parts[last].after, known, kept, wanted, [seeds[p] for p in positions], accumulators
            )
            return [to_wire(x) for x in results], of_kept, accumulators

        def elsewhere(accumulators: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
            outputs = [fill(wire_aval(loop.output_aval(p)), 0.0) for p in positions]
            return outputs, [jnp.zeros_like(x) for x in kept.values() if is_inexact(x)], accumulators

        made, of_kept, self.accumulators = lax.cond(self.device.stage == last, on_last, elsewhere, self.accumulators)
        moving = [source for x, source in self.wiring.kept if is_inexact(kept[x])]
        for source, gradient in zip(moving, of_kept, strict=True):
            self._add(source, gradient)
        return {p: from_wire(x, loop.output_aval(p)) for p, x in zip(positions, made, strict=True)}

    def _pull_before(self) -> list[Any]:
        """The branches' results; gradients of what arrived and of the branches' weights."""
        if not self.wiring.needs_branch:
            return []
        branches = [partial(self._pull_branch, s) for s in range(self.loop.num_stages)]
        operands = (self.accumulators, dict(self.of_branch))
        if len(branches) == 1:
            results, of_lanes, self.accumulators = branches[0](*operands)
        else:
            results, of_lanes, self.accumulators = lax.switch(self.device.stage, branches, *operands)
        for j, gradient in of_lanes.items():
            self.of_lanes[j] = self.of_lanes[j] + gradient
        return [from_wire(x, aval) for x, (aval, _) in zip(results, self.wiring.branch_results, strict=True)]

    def _pull_branch(
        self, s: int, accumulators: list[Any], of_branch: dict[int, Any]
    ) -> tuple[list[Any], dict[int, Any], list[Any]]:
        part = self.loop.alignment.parts[s]
        late = {x for op in part.after for x in op.results}
        values = [row[s] for _, row in self.wiring.branch_results]
        asked = [r for r, x in enumerate(values) if x is not None and x not in late]
        arrived = self.device.arrived_values(s, self.arrived)
        known = self.device.known(self.moment, s, self.slots) | arrived
        results, of_arrived, accumulators = self._pull_ops(
            s, part.before, known, arrived, [values[r] for r in asked], [of_branch.get(r) for r in asked], accumulators
        )
        made = dict(zip(asked, results, strict=True))
        moving = [x for x, v in arrived.items() if is_inexact(v)]
        gradients = dict(zip(moving, of_arrived, strict=True))
        came = {j: lane.values[s - 1] if s else None for j, lane in enumerate(self.wiring.lanes) if j in self.of_lanes}
        of_lanes = {
            j: jnp.zeros_like(self.of_lanes[j]) if x not in gradients else gradients[x] for j, x in came.items()
        }
        rows = [
            to_wire(made[r]) if r in made else fill(wire_aval(aval), 0.0)
            for r, (aval, _) in enumerate(self.wiring.branch_results)
        ]
        return rows, of_lanes, accumulators

    def _pull_ops(
        self,
        s: int,
        ops: Sequence[Any],
        known: dict[Value, Any],
        reads: dict[Value, Any],
        wanted: Sequence[Any],
        seeds: Sequence[Any],
        accumulators: list[Any],
    ) -> tuple[list[Any], list[Any], list[Any]]:
        """The vjp of `ops` on stage s: wanted values, gradients of inexact reads, accumulators with the weights'."""
        used = {x for op in ops for x in op.values}
        slot_of = self.loop.placement.slot_of(s)
        weights = {x: slot_of[weight] for x, weight in self.loop.stages[s].weights.items() if x in used or x in wanted}
        moving = {x: known[x] for x in [*weights, *reads] if is_inexact(known[x])}
        results, pull = jax.vjp(lambda moving: self.device.evaluate(ops, known | moving, wanted, self.moment), moving)
        cotangents = [_cotangent(jax.typeof(x), seed) for x, seed in zip(results, seeds, strict=True)]
        (gradients,) = pull(cotangents)
        accumulators = list(accumulators)
        for x, slot in weights.items():
            if x in gradients and accumulators[slot] is not None:
                accumulators[slot] = _accumulated(accumulators[slot], gradients[x], self.moment.is_active)
        return list(results), [gradients[x] for x, v in reads.items() if is_inexact(v)], accumulators


def _accumulated(so_far: Any, gradient: Any, is_active: Any) -> Any:
    if so_far is None:
        return None
    return jnp.where(is_active, so_far + gradient.astype(so_far.dtype), so_far)


def is_inexact(x: Any) -> bool:
    """Whether an array, or a type, can have a gradient."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _split_inexact(values: Sequence[Any]) -> tuple[dict[int, Any], dict[int, Any]]:
    """Values by position: those that have gradients, and the others."""
    moving = {j: x for j, x in enumerate(values) if is_inexact(x)}
    return moving, {j: x for j, x in enumerate(values) if j not in moving}


def _join(moving: dict[int, Any], fixed: dict[int, Any]) -> list[Any]:
    return [x for _, x in sorted({**moving, **fixed}.items())]


def _cotangent(aval: Any, gradient: Any) -> Any:
    """A gradient as a vjp takes it: zeros where there is none, float0 for what has none."""
    if not jnp.issubdtype(aval.dtype, jnp.inexact):
        return np.zeros(aval.shape, jax.dtypes.float0)
    return jnp.zeros(aval.shape, aval.dtype) if gradient is None else gradient.astype(aval.dtype)
